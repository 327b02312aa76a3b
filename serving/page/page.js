// The page: one picture, one instruction, one action. Robots and the simulator are in watch.js.

import { call, json } from "./api.js";
import { drawCompass, drawDistribution, make, number, the, translation } from "./draw.js";
import { watchRobots, openSimulator } from "./watch.js";

const pictures = new Map(); // camera -> File or Blob
let about, answer, shown; // what the server said of itself, its last answer, the dataset of that
let turn = 0; // counts pictures and questions: an answer that comes after its picture was changed is not shown
let question = new AbortController(); // the last one: nobody waits for its answer once there is another

function trouble(error) {
  the("trouble").textContent = error ? error.message : "";
  the("trouble").hidden = !error;
}

function dataset() {
  return about.datasets[the("key").value];
}

// Cameras ------------------------------------------------------------------------------------------------------------

function addCamera(name, first) {
  const input = make("input", { type: "file", accept: "image/jpeg,image/png", "aria-label": `Picture of ${name}` });
  const image = make("img", { alt: "" });
  const hint = make("span", { class: "hint" }, "Drop a picture here, or choose one");
  const compass = first ? make("svg", { class: "compass", viewBox: "0 0 120 120", id: "compass", "aria-hidden": "true" }) : null;
  image.hidden = true;
  const area = make("label", { class: "picture drop" }, input, image, compass, hint);
  let last; // that was chosen: of two files the older may be read last
  const show = async (file) => {
    last = file;
    let picture;
    try { // a copy: what is shown is asked, whatever becomes of the file
      picture = new Blob([await file.arrayBuffer()], { type: file.type });
    } catch {
      return trouble(new Error("The browser cannot read this file: choose it again."));
    }
    if (file !== last) return;
    pictures.set(name, picture);
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(picture);
    image.alt = `What ${name} sees`;
    image.hidden = false;
    hint.hidden = true;
    forget();
  };
  image.onerror = () => trouble(new Error("The browser cannot show this file: choose a JPEG or PNG picture."));
  input.onchange = () => input.files[0] && show(input.files[0]);
  area.ondragover = (event) => { event.preventDefault(); area.classList.add("over"); };
  area.ondragleave = () => area.classList.remove("over");
  area.ondrop = (event) => {
    event.preventDefault();
    area.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) show(file);
  };
  const several = about.cameras.length > 1;
  the("cameras").append(several ? make("div", {}, make("p", { class: "note" }, name), area) : area);
  return show;
}

function addExample(example, shows) {
  const image = make("img", { alt: "" });
  const button = make("button", { type: "button", class: "example", title: example.instruction }, image, make("span", {}, example.instruction));
  const loaded = call(`examples/${encodeURIComponent(example.name)}`).then((response) => response.blob());
  loaded.then((blob) => { image.src = URL.createObjectURL(blob); }).catch(trouble);
  button.onclick = async () => {
    try {
      const blob = await loaded;
      for (const show of shows) await show(blob);
      the("instruction").value = example.instruction;
      await predict();
    } catch (error) {
      trouble(error);
    }
  };
  the("examples").append(button);
}

// The answer ---------------------------------------------------------------------------------------------------------

// What is shown belongs to a picture that is shown no more.
function forget() {
  answer = null;
  turn += 1;
  question.abort();
  question = new AbortController();
  the("compass")?.replaceChildren();
  the("numbers").replaceChildren();
  the("steps").hidden = true;
  the("meaning").textContent = "";
  the("waiting").textContent = "Say what to do with this picture.";
}

async function predict() {
  trouble(null);
  const missing = about.cameras.filter((camera) => !pictures.has(camera));
  if (missing.length) return trouble(new Error(`Choose a picture first (${missing.join(", ")}).`));
  if (!the("instruction").value.trim()) return trouble(new Error("Say what to do, for example “open the drawer”."));
  const body = new FormData();
  for (const camera of about.cameras) body.append(camera, pictures.get(camera), "picture");
  body.append("instruction", the("instruction").value);
  body.append("unnorm_key", the("key").value);
  if (dataset().state_dim !== null) body.append("state", `[${the("state").value}]`);
  forget();
  const mine = turn;
  the("waiting").textContent = "The model looks …";
  const begun = performance.now();
  try {
    const found = await json("act", { method: "POST", body, signal: question.signal });
    if (mine !== turn) return;
    answer = found;
    shown = about.datasets[answer.unnorm_key];
    const took = Math.round(performance.now() - begun);
    const model = answer.timing.infer_ms === undefined ? "" : `, of which the model ${Math.round(answer.timing.infer_ms)}`;
    the("waiting").textContent = `“${body.get("instruction")}”, answered in ${took} ms${model}.`;
    the("step").max = answer.actions.length;
    the("step").value = 1;
    the("steps").hidden = answer.actions.length === 1;
    showStep();
  } catch (error) {
    if (mine !== turn) return;
    the("waiting").textContent = "No action.";
    trouble(error);
  }
}

function showStep() {
  if (!answer) return;
  const step = Number(the("step").value) - 1;
  the("step-words").textContent = `Step ${step + 1} of ${answer.actions.length}`;
  the("numbers").replaceChildren(...shown.spec.names.map((name, dim) => row(name, dim, step)));
  if (the("compass")) drawCompass(the("compass"), shown, answer.actions, step);
  const { unit, hz } = shown.spec;
  const said = [`units of “${answer.unnorm_key}”${unit ? `: ${unit}` : ""}`];
  if (!shown.stated) said.push("what the numbers mean, changes or places, is not said by the data: a guess");
  if (hz) said.push(`${hz} actions in a second`);
  said.push(answer.distributions
    ? "bars: the probability of each bin, from the lowest number that the model can say to the highest; shaded: the middle 90%; the mark: what was chosen"
    : "this model gives numbers and no tokens, so it has no probabilities");
  the("meaning").textContent = `${said.join("; ")}.`;
}

function row(name, dim, step) {
  const value = answer.actions[step][dim];
  const low = shown.low[dim] ?? -1, high = shown.high[dim] ?? 1;
  const gripper = shown.spec.grippers.includes(dim);
  const own = shown.spec.as_recorded?.includes(dim);
  const kind = gripper ? (own ? "gripper, as recorded" : "1 open, 0 closed") : shown.spec.relative[dim] ? "change" : "place";
  const interval = answer.distributions ? [answer.low[step][dim], answer.high[step][dim]] : null;
  const share = answer.probabilities ? `${Math.round(100 * answer.probabilities[step][dim])}%` : "";
  const drawn = make("div", { class: "spread" });
  if (low < high) {
    const svg = drawDistribution(low, high, value, answer.distributions?.[step][dim], interval);
    svg.setAttribute("aria-label", interval ? `${name}: 90% between ${number(interval[0])} and ${number(interval[1])}` : name);
    drawn.append(svg, make("span", { class: "ends" }, make("span", {}, number(low, 2)), make("span", {}, number(high, 2))));
  } else {
    drawn.append(make("span", { class: "note" }, "never changes in the data"));
  }
  return make("div", { class: "number" },
    make("div", { class: "name" }, make("b", {}, name), make("span", { class: "note" }, kind)),
    make("div", { class: "value" },
      make("b", {}, number(value)),
      make("span", { class: "note" }, interval && low < high ? `${number(interval[0], 2)} to ${number(interval[1], 2)}` : "")),
    make("div", { class: "share", title: "probability of the token that was chosen" }, share),
    drawn);
}

// Beginning ----------------------------------------------------------------------------------------------------------

function showKey() {
  const { state_dim: numbers } = dataset();
  the("state-label").hidden = numbers === null;
  the("state").placeholder = numbers === null ? "" : `${numbers} numbers, with commas between them`;
  the("caption").textContent = translation(dataset()).words;
}

async function open() {
  try {
    about = await json("about");
  } catch (error) {
    return trouble(error);
  }
  const cameras = about.cameras.length > 1 ? `sees ${about.cameras.join(", ")}` : "sees one picture";
  const steps = about.chunk > 1 ? `${about.chunk} steps an answer` : "one step an answer";
  the("model").textContent = [about.model, cameras, steps].join(" · ");
  for (const key of Object.keys(about.datasets).sort()) the("key").append(make("option", { value: key }, key));
  the("key").value = about.default_key ?? Object.keys(about.datasets).sort()[0];
  the("key").onchange = showKey;
  showKey();
  const shows = about.cameras.map((camera, index) => addCamera(camera, index === 0));
  for (const example of about.examples) addExample(example, shows);
  the("ask").onsubmit = (event) => { event.preventDefault(); predict(); };
  the("step").oninput = showStep;
  document.onpaste = (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file) shows[0](file);
  };
  watchRobots(about);
  if (about.simulator) openSimulator(about, trouble);
}

open();
