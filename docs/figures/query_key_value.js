// Figure 1. One step: the newest token's query meets the keys of all tokens, and the weights mix their values.

import { dot, softmax } from "./attention.js";
import { choice, controls, count, element, legend, range, stage, words } from "./parts.js";

const TOKENS = ["Four", "score", "and", "seven", "years", "ago", "our", "fathers"];
// Made up, two numbers a vector; a head of SmolLM2 has 64.
const QUERY = [[0.9, 0.2], [0.4, 1.1], [-0.3, 0.8], [1.2, 0.1], [0.7, 1.3], [0.2, 1.6], [-0.5, 1.2], [1.4, 0.6]];
const KEY = [[0.3, 0.8], [1.0, 0.5], [-0.6, 0.2], [0.9, 1.1], [0.4, 1.4], [-0.2, 0.9], [0.8, -0.4], [1.1, 0.3]];
const VALUE = [[1.0, 0.1], [0.6, 0.9], [-0.2, 0.3], [0.8, 1.2], [0.1, 1.5], [-0.4, 0.6], [0.5, -0.3], [1.3, 0.2]];

export function queryKeyValue(place) {
  let [step, kept] = [5, true];
  const grid = element("div", { class: "fig-qkv" });
  const said = words();

  function draw() {
    const scores = KEY.slice(0, step).map((key) => dot(QUERY[step - 1], key) / Math.SQRT2);
    const weights = softmax(scores);
    const output = [0, 1].map((i) => dot(weights, VALUE.map((value) => value[i]).slice(0, step)));
    const cells = ["token", "Q", "K", "V", "score", "weight"].map((name) => element("span", { class: "fig-head" }, name));
    TOKENS.forEach((token, row) => {
      const [now, past] = [row === step - 1, row < step - 1];
      const state = now || (past && !kept) ? "computed" : past ? "read" : "later";
      cells.push(element("span", { class: now ? "fig-token fig-now" : "fig-token" }, row < step ? token : "…"));
      cells.push(vector(QUERY[row], now || (past && !kept) ? "computed" : past ? "unused" : "later", "q", row));
      cells.push(vector(KEY[row], state, "k", row), vector(VALUE[row], state, "v", row));
      cells.push(element("span", { class: "fig-qk" }, row < step ? scores[row].toFixed(2) : ""));
      const width = row < step ? `${Math.round(100 * weights[row])}%` : "0";
      const bar = element("span", { class: "fig-bar", style: { width } });
      cells.push(element("span", { class: "fig-weight" }, bar, row < step ? weights[row].toFixed(2) : ""));
    });
    grid.replaceChildren(...cells);
    const sum = `Output for “${TOKENS[step - 1]}”: the values, weighted: [${output.map((x) => x.toFixed(2)).join(", ")}]. `;
    const before = count(step - 1, "earlier token");
    const cost = kept
      ? `Computed in this step: 3 vectors. Read from the cache: K and V of ${before}. Their queries are not needed.`
      : `Nothing was kept, so all ${count(step, "token")} go through the model again: ${3 * step} vectors in this step.`;
    said.textContent = sum + cost;
    place.dataset.computed = kept ? 3 : 3 * step;
  }

  const changed = (number) => { step = number; draw(); };
  const keep = (value) => { kept = value === "yes"; draw(); };
  place.replaceChildren(
    controls(
      range("Step", { min: 1, max: TOKENS.length, value: step }, (n) => `${n}: “${TOKENS[n - 1]}”`, changed),
      choice("Keep K and V", [["yes", "yes"], ["no", "no"]], "yes", keep),
    ),
    stage(grid),
    legend(["fig-computed", "computed now"], ["fig-read", "read from the cache"], ["fig-unused", "never used again"]),
    said,
  );
  draw();
}

function vector(numbers, state, name, row) {
  const shown = state === "later" || state === "unused" ? "" : numbers.map((x) => x.toFixed(1)).join(" ");
  return element("span", { class: `fig-cell fig-${state}`, "data-cell": `${name}${row}`, "data-state": state }, shown);
}
