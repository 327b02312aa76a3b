// What goes on at the server: robots that ask, and the episode in the simulator.

import { call, json, post } from "./api.js";
import { drawCompass, drawTrace, make, number, the } from "./draw.js";

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Robots -------------------------------------------------------------------------------------------------------------

const cards = new Map(); // number of a robot -> its card

export async function watchRobots(about) {
  for (;;) {
    if (!document.hidden) {
      try {
        showRobots((await json("robots", { quiet: true })).robots, about);
      } catch (error) {
        showRobots([], about); // what was true a while ago looks as if it were now
        the("no-robots").textContent = error.message;
      }
    }
    await pause(1000);
  }
}

function showRobots(robots, about) {
  the("no-robots").hidden = robots.length > 0;
  the("no-robots").textContent = "No robot has asked yet.";
  const known = new Set(robots.map((robot) => robot.number));
  for (const [key, card] of cards) if (!known.has(key)) removeCard(key, card);
  for (const robot of robots) {
    if (!cards.has(robot.number)) cards.set(robot.number, newCard());
    showRobot(cards.get(robot.number), robot, about);
  }
  const wanted = robots.map((robot) => cards.get(robot.number).element);
  if (wanted.some((element, index) => the("robots").children[index] !== element)) the("robots").replaceChildren(...wanted);
}

function newCard() {
  const card = { frame: 0, loading: false, images: make("div", { class: "seen" }), name: make("b"), mark: make("span", { class: "mark" }), told: make("p"), lines: make("p", { class: "note" }) };
  card.element = make("article", { class: "robot" }, card.images, make("div", {}, make("p", {}, card.mark, card.name), card.told, card.lines));
  return card;
}

function removeCard(key, card) {
  card.element.remove();
  cards.delete(key);
  showImages(card, []);
}

function ago(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s ago`;
  return seconds < 120 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`;
}

function condition(robot) {
  if (robot.waiting) return [robot.age > 5 ? "bad" : "good", "waiting"]; // of a robot that waits the server is silent
  if (robot.age > 5) return ["silent", robot.state === "ended" ? "ended" : "silent"];
  return [robot.state === "answered" ? "good" : "bad", robot.state];
}

function showRobot(card, robot, about) {
  const [kind, words] = condition(robot);
  card.mark.className = `mark ${kind}`;
  card.mark.title = words;
  card.name.textContent = robot.name || "without a session";
  card.told.textContent = robot.instruction;
  const latency = robot.latency_ms === null ? "" : `, ${Math.round(robot.latency_ms)} ms`;
  const lines = [
    `${words}, seen ${ago(robot.age)}${latency}`,
    Object.entries(robot.outcomes).map(([outcome, count]) => `${count} ${outcome}`).join(", "),
  ];
  if (robot.action.length) lines.push(`action ${robot.action.map((value) => number(value, 2)).join(" ")}`);
  if (robot.proprio.length) lines.push(`state ${robot.proprio.map((value) => number(value, 2)).join(" ")}`);
  card.lines.replaceChildren(...lines.flatMap((line) => [line, make("br")]));
  if (about.frames && robot.pictures && robot.frame !== card.frame && !card.loading) showFrame(card, robot);
}

// Its last picture of each camera. One at a time: of two requests the older might be answered last.
async function showFrame(card, robot) {
  card.loading = true;
  try {
    const cameras = [...Array(robot.pictures).keys()];
    const found = await Promise.all(cameras.map((camera) => call(`robots/${robot.number}/${camera}`, { quiet: true })));
    const blobs = await Promise.all(found.map((response) => response.blob()));
    card.frame = robot.frame;
    if (cards.get(robot.number) === card) showImages(card, blobs);
  } catch {
    showImages(card, []); // it was pushed out of the view meanwhile
  } finally {
    card.loading = false;
  }
}

function showImages(card, blobs) {
  for (const image of card.images.children) URL.revokeObjectURL(image.src);
  const alt = `What ${card.name.textContent} saw last`;
  card.images.replaceChildren(...blobs.map((blob) => make("img", { alt, src: URL.createObjectURL(blob) })));
}

// Simulator ----------------------------------------------------------------------------------------------------------

let running = false; // whether an episode is
const history = []; // [step, action] of it, those that were seen
let episode = 0; // which one it is of

export async function openSimulator(about, trouble) {
  const { tasks, seeds, name } = about.simulator;
  the("simulator").hidden = false;
  the("simulator").querySelector("h2").textContent = `In simulation: ${name}`;
  the("seed").max = seeds - 1;
  for (const task of Object.keys(tasks)) the("task").append(make("option", { value: task }, task));
  const usual = () => { the("words").value = tasks[the("task").value]; };
  the("task").onchange = usual;
  usual();
  const act = (work) => async (event) => {
    event.preventDefault();
    trouble(null);
    try {
      await work();
    } catch (error) {
      trouble(error);
    }
  };
  const words = () => the("words").value;
  the("episode").onsubmit = act(() => running
    ? post("episode/instruction", { instruction: words() })
    : post("episode", { task: the("task").value, seed: Number(the("seed").value), instruction: words() }));
  the("reword").onclick = act(() => post("episode/instruction", { instruction: words() }));
  the("stop").onclick = act(() => post("episode/stop", {}));
  for (let after = -1; ;) {
    try {
      const step = await json(`episode?after=${after}`, { quiet: true });
      if (step.number !== after) showEpisode(step, about);
      after = step.number;
      if (document.hidden) await pause(1000);
    } catch (error) {
      the("episode-words").textContent = error.message;
      after = -1; // a server that was started again counts from 0
      history.length = 0;
      await pause(2000);
    }
  }
}

function showEpisode(step, about) {
  running = step.running;
  if (step.episode !== episode) history.length = 0; // a tab that is not looked at misses complete episodes
  episode = step.episode;
  the("start").disabled = running;
  the("reword").disabled = the("stop").disabled = !running;
  the("progress").max = step.max_steps;
  the("progress").value = step.step;
  if (step.jpeg) {
    the("world").src = `data:image/jpeg;base64,${step.jpeg}`;
    the("world").hidden = false;
    the("world-hint").hidden = true;
  }
  const told = step.task ? `“${step.instruction}”, step ${step.step} of ${step.max_steps}. ` : "";
  const latency = running && step.latency_ms !== null ? `${Math.round(step.latency_ms)} ms for an answer. ` : "";
  the("episode-words").textContent = told + latency + step.message;
  the("episode-words").className = `note ${step.success === true ? "done" : step.success === false ? "failed" : ""}`;
  const dataset = about.datasets[step.unnorm_key];
  if (!dataset || !step.action.length) {
    history.length = 0;
    the("world-compass").replaceChildren();
    the("traces").replaceChildren();
    return;
  }
  drawCompass(the("world-compass"), dataset, [step.action]);
  if (history.at(-1)?.[0] !== step.step) history.push([step.step, step.action]);
  the("traces").replaceChildren(...dataset.spec.names.flatMap((name, dim) => {
    const low = dataset.low[dim] ?? -1, high = dataset.high[dim] ?? 1;
    if (!(low < high)) return []; // never changes
    const drawn = drawTrace(dim, low, high, history, step.max_steps);
    return [make("span", {}, name), drawn, make("span", {}, number(step.action[dim], 2))];
  }));
}
