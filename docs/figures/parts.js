// What the figures are built with: elements, labelled controls, and the sentence under each picture that says in words
// what it shows now. A figure is a function of its place on the page; it keeps its own state and draws all of it again.

import { element } from "../player/dom.js";

export { element };
const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function button(label, act) {
  const made = element("button", { type: "button" }, label);
  made.addEventListener("click", act);
  return made;
}

// A slider with its name before it and its value, in words, behind it. `said` makes the words from the number.
export function range(name, { min, max, step = 1, value }, said, act) {
  const input = element("input", { type: "range", min, max, step, value });
  const output = element("output", {});
  const say = () => {
    output.textContent = said(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    say();
    act(Number(input.value));
  });
  const made = element("label", { class: "fig-range" }, element("span", {}, name), input, output);
  made.input = input;
  made.set = (number, most = input.max) => {
    input.max = most;
    input.value = number;
    say();
  };
  say();
  return made;
}

let groups = 0;

// One of several: radio buttons that look like a row of buttons. options: [[value, words], ...]
export function choice(name, options, value, act) {
  const group = `fig-choice-${++groups}`;
  const made = element("fieldset", { class: "fig-choice" }, element("legend", {}, name));
  for (const [each, words] of options) {
    const input = element("input", { type: "radio", name: group, value: each, checked: each === value });
    input.addEventListener("change", () => act(each));
    made.append(element("label", {}, input, element("span", {}, words)));
  }
  return made;
}

export function controls(...parts) {
  return element("div", { class: "fig-controls" }, ...parts);
}

// The words of a figure. A screen reader is told them when they change.
export function words() {
  return element("p", { class: "fig-said", "aria-live": "polite" });
}

export function stage(...parts) {
  return element("div", { class: "fig-stage" }, ...parts);
}

export function legend(...entries) {
  const made = entries.map(([kind, name]) =>
    element("span", {}, element("span", { class: `fig-key ${kind}`, "aria-hidden": "true" }), name),
  );
  return element("p", { class: "fig-legend" }, ...made);
}

export function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

const UNITS = ["bytes", "KiB", "MiB", "GiB"];

export function bytes(number) {
  const power = Math.min(3, number < 1 ? 0 : Math.floor(Math.log2(number) / 10));
  const size = number / 2 ** (10 * power);
  return `${size.toLocaleString("en", { maximumFractionDigits: size < 10 ? 1 : 0 })} ${UNITS[power]}`;
}

// Lines over a stage, from the right edge of one element to the left edge of another: [[from, to, class], ...].
export function links(place, pairs) {
  place.querySelector("svg.fig-links")?.remove();
  const frame = place.getBoundingClientRect();
  const drawing = svg("svg", { class: "fig-links", "aria-hidden": "true" });
  for (const [from, to, kind] of pairs) {
    const [a, b] = [from.getBoundingClientRect(), to.getBoundingClientRect()];
    if (b.left < a.right + 4) continue; // one under the other on a narrow page: the numbers say it
    const [x1, y1] = [a.right - frame.left, (a.top + a.bottom) / 2 - frame.top];
    const [x2, y2] = [b.left - frame.left, (b.top + b.bottom) / 2 - frame.top];
    const middle = (x1 + x2) / 2;
    drawing.append(svg("path", { class: kind, d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}` }));
  }
  place.append(drawing);
}
