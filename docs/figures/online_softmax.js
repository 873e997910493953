// Figure 6. Attention that walks a block table: read the blocks in any order, drag the scores, and the answer stays right.

import { dot, online, softmax } from "./attention.js";
import { button, controls, element, stage, words } from "./parts.js";

const TABLE = [5, 1, 6]; // the block table of A: 10 tokens in blocks of 4
const START = [[0.5, 1.5, -0.5, 1.0], [2.0, 0.0, -1.0, 0.5], [1.0, 3.0]];
const VALUES = [[2, 7, 1, 4], [6, 3, 9, 5], [8, 1]]; // one number of each value

export function onlineSoftmax(place) {
  const scores = START.map((block) => [...block]);
  let order = [];
  const rows = element("tbody", {});
  const said = words();
  const readers = TABLE.map((block, i) => button(`Read block ${block}`, () => { order.push(i); draw(); }));
  const outputs = scores.map((block) => block.map(() => element("output", {})));

  function draw() {
    const states = online(order.map((i) => ({ scores: scores[i], values: VALUES[i] })));
    rows.replaceChildren(
      ...states.map(({ m, factor, l, a }, i) =>
        element("tr", {}, ...[TABLE[order[i]], number(m), i ? number(factor) : "–", number(l), number(a), number(a / l)].map((x) => element("td", {}, String(x)))),
      ),
    );
    scores.forEach((block, i) => block.forEach((score, j) => { outputs[i][j].textContent = score.toFixed(1); }));
    readers.forEach((reader, i) => { reader.disabled = order.includes(i); });
    const weights = softmax(scores.flat());
    const whole = dot(weights, VALUES.flat());
    const last = states.at(-1);
    const left = TABLE.length - order.length;
    const begin = "Nothing is read yet: m = −∞, l = 0, a = 0. Choose the block to read first.";
    const now = left
      ? `After ${order.length} of 3 blocks: a / l = ${number(last?.a / last?.l)}. That is the answer for the tokens read so far.`
      : `All blocks are read. a / l = ${number(last?.a / last?.l)}; softmax over all ten scores at once gives ${number(whole)}.`;
    const jump = order.length > 1 && last.factor < 1 ? ` The last block raised the maximum, so l and a were multiplied by ${number(last.factor)} first.` : "";
    said.textContent = order.length ? now + jump : begin;
    place.dataset.whole = whole;
    place.dataset.answer = last ? last.a / last.l : "";
  }

  const blocks = scores.map((block, i) => {
    const sliders = block.map((score, j) => {
      const input = element("input", { type: "range", min: -3, max: 4, step: 0.1, value: score, "aria-label": `Score of token ${4 * i + j}` });
      input.addEventListener("input", () => { scores[i][j] = Number(input.value); draw(); });
      return element("label", { class: "fig-score" }, outputs[i][j], input, element("span", {}, `v ${VALUES[i][j]}`));
    });
    return element("div", { class: "fig-scores" }, element("div", { class: "fig-sliders" }, ...sliders), readers[i]);
  });
  const head = ["block", "m", "factor", "l", "a", "a / l"].map((name) => element("th", { scope: "col" }, name));
  const rules = controls(
    button("In another order", () => { order = order.length === 3 ? [order[1], order[2], order[0]] : [2, 0, 1]; draw(); }),
    button("Start again", () => { order = []; draw(); }),
  );
  place.replaceChildren(
    stage(
      element("p", { class: "fig-head" }, "Scores of one query with ten keys: drag them"),
      element("div", { class: "fig-blocks" }, ...blocks),
      rules,
      element("table", { class: "fig-costs" }, element("thead", {}, element("tr", {}, ...head)), rows),
    ),
    said,
  );
  order = [0];
  draw();
}

function number(x) {
  return x.toFixed(2);
}
