// Figure 7. One program of a kernel: the block table of its sequence says which block it loads next.

import { dot } from "./attention.js";
import { button, choice, controls, element, links, range, stage, words } from "./parts.js";

const SIZE = 4;
const TABLES = { A: [5, 1, 6], B: [2, 7] };
const LENGTHS = { A: 10, B: 6 };
const CODE = [
  "seq, head = program_id(0), program_id(1)",
  "q = query[seq, head]; m, l, a = -inf, 0, 0",
  "for i in range(ceil(seq_len[seq] / 4)):",
  "    block = block_table[seq, i]",
  "    k = key_cache[block, head]; v = value_cache[block, head]",
  "    s = q @ k;  s[past the end] = -inf",
  "    m, l, a = rescale and add (figure 6)",
  "out[seq, head] = a / l",
];

// Made-up keys and values, so that the numbers move: of a slot, for a head.
const key = (block, slot, head) => [((block * 7 + slot * 3 + head) % 5) / 2 - 1, ((block + slot * 5 + 2 * head) % 7) / 3 - 1];
const value = (block, slot, head) => ((block * 3 + slot * 2 + head * 4) % 10) / 2;
const query = (seq, head) => [seq === "A" ? 1.5 : -0.5, head ? 1 : -1];

export function kernelProgram(place) {
  let [seq, head, moment, pairs] = ["A", 0, 5, []];
  const code = element("ol", { class: "fig-code", tabindex: 0, "aria-label": "The kernel" });
  const tables = element("div", { class: "fig-requests" });
  const pool = element("div", { class: "fig-pool" });
  const both = stage(tables, pool);
  both.classList.add("fig-two");
  const registers = element("p", { class: "fig-registers" });
  const said = words();
  const slider = range("Step of the program", { min: 0, max: 1, value: 0 }, (n) => String(n + 1), (n) => { moment = n; draw(); });

  // Every moment of the program: [line, state after it, words].
  function run() {
    const moments = [];
    const state = { i: null, block: null, m: -Infinity, l: 0, a: 0, scores: null };
    const say = (line, text) => moments.push([line, { ...state }, text]);
    say(0, `This is program (${seq}, head ${head}). Others run the same code at the same time, for other sequences and heads.`);
    say(1, "It loads its query. Its running maximum, sum and weighted sum are empty.");
    const steps = Math.ceil(LENGTHS[seq] / SIZE);
    for (let i = 0; i < steps; i++) {
      state.i = i;
      say(2, `Logical block ${i} of ${steps}.`);
      state.block = TABLES[seq][i];
      say(3, `Entry ${i} of ${seq}’s block table is ${state.block}.`);
      say(4, `It loads the keys and values of head ${head} out of block ${state.block}, ${state.block} × (size of a block) behind the beginning of the cache.`);
      const filled = Math.min(SIZE, LENGTHS[seq] - i * SIZE);
      state.scores = Array.from({ length: filled }, (_, slot) => dot(query(seq, head), key(state.block, slot, head)));
      const masked = filled < SIZE ? ` The other ${SIZE - filled} slots lie past the end of ${seq}: their score is −∞, their weight 0.` : "";
      say(5, `${filled} scores: ${state.scores.map((s) => s.toFixed(1)).join(", ")}.${masked}`);
      const most = Math.max(state.m, ...state.scores);
      const factor = Math.exp(state.m - most);
      const parts = state.scores.map((s) => Math.exp(s - most));
      state.l = state.l * factor + parts.reduce((x, y) => x + y, 0);
      state.a = state.a * factor + dot(parts, parts.map((_, slot) => value(state.block, slot, head)));
      state.m = most;
      say(6, `The old sums are multiplied by ${factor.toFixed(2)}, and the block is added.`);
    }
    say(7, `It writes a / l = ${(state.a / state.l).toFixed(2)}. No block was copied, and no program waited for another.`);
    return moments;
  }

  function draw() {
    const moments = run();
    moment = Math.min(moment, moments.length - 1);
    slider.set(moment, moments.length - 1);
    const [line, state, text] = moments[moment];
    code.replaceChildren(...CODE.map((source, i) => element("li", { class: i === line ? "fig-now" : "", "aria-current": i === line ? "step" : undefined }, element("code", {}, source))));
    pairs = [];
    const blocks = Array.from({ length: 8 }, (_, block) => {
      const owner = Object.keys(TABLES).find((name) => TABLES[name].includes(block)) ?? "";
      const reads = block === state.block && line >= 4 && line <= 6;
      const full = owner ? Math.min(SIZE, LENGTHS[owner] - TABLES[owner].indexOf(block) * SIZE) : 0;
      const slots = Array.from({ length: SIZE }, (_, slot) => element("span", { class: `fig-slot${slot < full ? ` fig-fill-${owner}` : ""}` }, reads && slot < full ? "k v" : ""));
      return element("div", { class: reads ? "fig-block fig-now" : "fig-block", "data-block": block }, element("b", {}, String(block)), element("span", { class: "fig-strip" }, ...slots), element("b", {}, owner));
    });
    pool.replaceChildren(element("p", { class: "fig-head" }, `The cache, one layer, head ${head}`), ...blocks);
    tables.replaceChildren(element("p", { class: "fig-head" }, "Block tables"));
    for (const name of Object.keys(TABLES)) {
      const entries = TABLES[name].map((block, i) => {
        const now = name === seq && i === state.i && line >= 3 && line <= 6;
        const entry = element("span", { class: now ? "fig-entry fig-now" : "fig-entry", "data-entry": `${name}:${i}` }, `${i}: ${block}`);
        if (now) pairs.push([entry, blocks[block], `fig-of-${name}`]);
        return entry;
      });
      tables.append(element("p", { class: "fig-name" }, element("b", {}, name), ` ${LENGTHS[name]} tokens`), element("p", { class: "fig-entries" }, ...entries));
    }
    const shown = (x) => (Number.isFinite(x) ? x.toFixed(2) : "−∞");
    registers.textContent = `i ${state.i ?? "–"}   block ${state.block ?? "–"}   m ${shown(state.m)}   l ${shown(state.l)}   a ${shown(state.a)}`;
    said.textContent = text;
    place.dataset.block = state.block ?? "";
    place.dataset.answer = line === 7 ? state.a / state.l : "";
    links(both, pairs);
  }

  const programs = [["A0", "A, head 0"], ["A1", "A, head 1"], ["B0", "B, head 0"], ["B1", "B, head 1"]];
  const chosen = (name) => { [seq, head] = [name[0], Number(name[1])]; draw(); };
  const go = (by) => () => { moment = Math.max(0, moment + by); draw(); };
  place.replaceChildren(
    controls(choice("Program", programs, "A0", chosen)),
    controls(button("Back", go(-1)), button("Next", go(1)), slider),
    code,
    registers,
    both,
    said,
  );
  draw();
  new ResizeObserver(() => links(both, pairs)).observe(both);
}
