// Pictures of an action: a compass of its translation, and what each number was chosen from.

const SVG = "http://www.w3.org/2000/svg";
// Where one unit of x, y, z goes on the paper: x towards the reader, y to the right, z up.
const PAPER = { x: [-0.6, 0.42], y: [0.88, 0.22], z: [0, -0.92] };
const REACH = 40; // length of an axis, of 120
const [LEFT, TOP] = [58, 62]; // the origin

export const the = (id) => document.getElementById(id);

// An element with attributes and children. Text is only ever text.
export function make(name, attributes = {}, ...children) {
  const element = ["svg", "g", "line", "path", "circle", "rect", "text", "polyline", "title"].includes(name)
    ? document.createElementNS(SVG, name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  return `${value < 0 && Number(text) !== 0 ? "−" : "+"}${text}`;
}

function place([x, y, z]) {
  const on = (axis) => x * PAPER.x[axis] + y * PAPER.y[axis] + z * PAPER.z[axis];
  return [LEFT + REACH * on(0), TOP + REACH * on(1)];
}

// Whether an action has x, y, z that can be drawn, and what the drawing says.
export function translation(dataset) {
  const { names, relative, frame } = dataset.spec;
  const places = ["x", "y", "z"].map((name) => names.indexOf(name));
  if (places.includes(-1)) return { places: null, words: "The numbers of this action have no x, y, z: no arrow is drawn." };
  if (!places.every((index) => relative[index])) return { places: null, words: "x, y, z are places to go to and no changes: no arrow is drawn." };
  const whose = frame ? `in the frame that its data calls ‘${frame}’` : "in its own frame, which its data does not name";
  return {
    places,
    words: `The arrow is a compass: x, y, z of the action ${whose}, drawn obliquely (x towards you, y right, z up). ` +
      "Where the camera stands is not known, so it says nothing about pixels. The longer, the larger the step.",
  };
}

// The arrow of one step, and the way of a complete chunk, into an svg of 120 by 120.
export function drawCompass(svg, dataset, actions, step = 0) {
  svg.replaceChildren();
  const { places } = translation(dataset);
  if (!places) return;
  const most = Math.max(...places.map((index) => Math.max(Math.abs(dataset.low[index] ?? 1), Math.abs(dataset.high[index] ?? 1)))) || 1;
  const vectors = actions.map((action) => places.map((index) => action[index] / most));
  svg.append(make("rect", { class: "paper", x: 1, y: 1, width: 118, height: 118, rx: 10 }));
  for (const [index, name] of ["x", "y", "z"].entries()) {
    const end = [0, 0, 0];
    end[index] = 1;
    const [right, down] = place(end);
    const [further, below] = place(end.map((value) => value * 1.2));
    svg.append(make("line", { class: `axis ${name}`, x1: LEFT, y1: TOP, x2: right, y2: down }));
    svg.append(make("text", { class: `axis-name ${name}`, x: further, y: below }, name));
  }
  if (vectors.length > 1) {
    const way = [[0, 0, 0]];
    for (const vector of vectors) way.push(vector.map((value, axis) => value + way.at(-1)[axis]));
    const longest = Math.max(1, ...way.flat().map(Math.abs));
    const points = way.map((point) => place(point.map((value) => value / longest)).map((value) => value.toFixed(1)).join(","));
    svg.append(make("polyline", { class: "way", points: points.join(" ") }, make("title", {}, "The way of the complete chunk")));
  }
  const vector = vectors[step];
  const length = Math.hypot(...vector);
  const long = length < 0.01 ? 0 : 0.3 + 0.8 * Math.min(1, length); // of a small step the direction is seen as well
  const shown = vector.map((value) => (value * long) / (length || 1));
  const [tipX, tipY] = place(shown);
  const [footX, footY] = place([shown[0], shown[1], 0]);
  svg.append(make("polyline", { class: "foot", points: `${LEFT},${TOP} ${footX},${footY} ${tipX},${tipY}` }));
  svg.append(make("line", { class: "arrow", x1: LEFT, y1: TOP, x2: tipX, y2: tipY }));
  svg.append(head(tipX, tipY, Math.atan2(tipY - TOP, tipX - LEFT), Math.hypot(tipX - LEFT, tipY - TOP)));
  drawGripper(svg, dataset, actions[step]);
}

function head(x, y, angle, length) {
  if (length < 3) return make("circle", { class: "tip", cx: x, cy: y, r: 3.5 });
  const size = Math.min(9, 3 + length / 4);
  const corner = (turn) => `${x - size * Math.cos(angle + turn)},${y - size * Math.sin(angle + turn)}`;
  return make("path", { class: "tip", d: `M${x},${y} L${corner(0.45)} L${corner(-0.45)} Z` });
}

// Two jaws, as far apart as the gripper is open, where that is known: of 0 to 100, or metres, 1 is nearly closed.
function drawGripper(svg, dataset, action) {
  const index = dataset.spec.grippers.find((dim) => !dataset.spec.as_recorded?.includes(dim));
  if (index === undefined) return;
  const open = Math.min(1, Math.max(0, action[index]));
  const half = 2 + 9 * open;
  for (const side of [-1, 1]) svg.append(make("line", { class: "jaw", x1: 20 + side * half, y1: 98, x2: 20 + side * half, y2: 110 }));
  svg.append(make("line", { class: "palm", x1: 20 - half, y1: 98, x2: 20 + half, y2: 98 }));
  svg.append(make("title", {}, `gripper ${Math.round(100 * open)}% open`));
}

// One number of an episode over its steps, [step, action] each, from `low` to `high`.
export function drawTrace(dim, low, high, history, steps) {
  const svg = make("svg", { class: "trace", viewBox: `0 0 ${steps} 20`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const at = (value) => 19 - (18 * (Math.min(high, Math.max(low, value)) - low)) / (high - low);
  if (low < 0 && high > 0) svg.append(make("line", { class: "zero", x1: 0, y1: at(0), x2: steps, y2: at(0) }));
  svg.append(make("polyline", { points: history.map(([step, action]) => `${step},${at(action[dim]).toFixed(2)}`).join(" ") }));
  return svg;
}

// What one number was chosen from: bins from `low` to `high`, on a paper 256 wide; the one that was chosen marked.
export function drawDistribution(low, high, value, probabilities, interval) {
  const svg = make("svg", { class: "bins", viewBox: "0 0 256 48", preserveAspectRatio: "none", role: "img" });
  const bins = probabilities?.length ?? 256;
  const bin = 256 / bins; // its width; the last of them has no middle of its own
  const at = (unit) => Math.min(256 - bin, Math.max(0, ((256 - bin) * (unit - low)) / (high - low)));
  if (interval) {
    const [left, right] = interval.map(at);
    svg.append(make("rect", { class: "middle", x: left - bin / 2, y: 0, width: right - left + bin, height: 40 }));
  }
  if (low < 0 && high > 0) svg.append(make("line", { class: "zero", x1: at(0), y1: 0, x2: at(0), y2: 40 }));
  if (probabilities) {
    const wide = 2; // bins of one bar
    const bars = [];
    for (let first = 0; first < bins; first += wide) bars.push(probabilities.slice(first, first + wide).reduce((sum, share) => sum + share, 0));
    const most = Math.max(...bars);
    for (const [index, share] of bars.entries()) {
      const height = (38 * share) / most;
      if (height > 0.2) svg.append(make("rect", { class: "bar", x: index * wide * bin, y: 40 - height, width: (wide - 0.3) * bin, height }));
    }
  }
  svg.append(make("line", { class: "base", x1: 0, y1: 40, x2: 256, y2: 40 }));
  svg.append(make("path", { class: "chosen", d: `M${at(value)},41 l3.5,7 h-7 Z` }));
  return svg;
}
