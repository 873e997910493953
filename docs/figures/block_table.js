// Figure 5. You are the allocator: requests write tokens, blocks are taken from one pool as they are needed.

import { button, controls, count, element, links, range, stage, words } from "./parts.js";

const SIZE = 4; // tokens a block
const FREE = [5, 1, 6, 2, 7, 0, 3, 4]; // in the order in which they are taken: none is a neighbour of the one before
const TEXT = {
  A: "Four score and seven years ago our fathers brought forth on this continent a new nation conceived in Liberty".split(" "),
  B: "It was the best of times it was the worst of times it was the age of".split(" "),
};
const PROMPT = { A: 7, B: 5 };

export function blockTable(place) {
  let free, tables, lengths, note, looked, pairs;
  const requests = element("div", { class: "fig-requests" });
  const pool = element("div", { class: "fig-pool" });
  const both = stage(requests, pool);
  both.classList.add("fig-two");
  const said = words();
  const buttons = { A: button("", () => act("A")), B: button("", () => act("B")) };
  const ends = { A: button("A ends", () => end("A")), B: button("B ends", () => end("B")) };
  const finder = range("Find a token of A", { min: 0, max: 1, value: 0 }, (n) => `number ${n}`, (n) => { looked = n; draw(); });

  function start() {
    [free, tables, lengths, looked] = [[...FREE], {}, { A: 0, B: 0 }, null];
    write("A", PROMPT.A);
    note = "A’s prompt of 7 tokens takes two blocks: 5, then 1. The second has room for one more token.";
    draw();
  }

  function act(name) {
    looked = null;
    write(name, tables[name] ? 1 : PROMPT[name]);
    draw();
  }

  // Store more tokens of a request: one table entry for each block that is begun. All of it, or nothing.
  function write(name, more) {
    const blocks = tables[name] ?? [];
    const need = Math.ceil((lengths[name] + more) / SIZE) - blocks.length;
    if (need > free.length) {
      note = `${name} needs ${count(need, "block")}, and ${free.length || "none"} is free: it waits until the other request ends.`;
      return;
    }
    const taken = free.splice(0, need);
    tables[name] = [...blocks, ...taken];
    lengths[name] += more;
    note = taken.length
      ? `${name}’s last block is full, so it takes block ${taken.join(" and ")}, ${blocks.length ? "which need not be a neighbour" : "the first that are free"}.`
      : `There is room in ${name}’s last block, ${blocks.at(-1)}: no block is taken.`;
    if (!blocks.length) note = `${name} arrives with ${lengths[name]} tokens and takes blocks ${taken.join(" and ")}.`;
  }

  function end(name) {
    note = `${name} ends. Blocks ${tables[name].join(", ")} are free again, for any request.`;
    free.push(...tables[name]);
    delete tables[name];
    lengths[name] = 0;
    looked = null;
    draw();
  }

  function draw() {
    pairs = [];
    const owner = {};
    for (const name of Object.keys(tables)) tables[name].forEach((block, logical) => { owner[block] = [name, logical]; });
    const physical = Array.from({ length: FREE.length }, (_, block) => {
      const [name, logical] = owner[block] ?? [];
      const found = name === "A" && looked !== null && Math.floor(looked / SIZE) === logical ? looked % SIZE : -1;
      return element(
        "div",
        { class: "fig-block", "data-block": block, "data-owner": name ? `${name}:${logical}` : "" },
        element("b", {}, String(block)),
        strip(name, logical, found),
        element("b", {}, name ?? ""),
      );
    });
    pool.replaceChildren(element("p", { class: "fig-head" }, "The pool: physical blocks"), ...physical,
      element("p", { class: "fig-head" }, `Free list: ${free.join(" ") || "empty"}`));
    requests.replaceChildren(element("p", { class: "fig-head" }, "Logical blocks → block table"));
    for (const name of Object.keys(tables).sort()) {
      requests.append(element("p", { class: "fig-name" }, element("b", {}, name), ` ${count(lengths[name], "token")}`));
      tables[name].forEach((block, logical) => {
        const found = name === "A" && looked !== null && Math.floor(looked / SIZE) === logical ? looked % SIZE : -1;
        const entry = element("span", { class: "fig-target" }, `→ ${block}`);
        const row = { class: "fig-block", "data-row": `${name}:${logical}`, "data-target": block };
        requests.append(element("div", row, element("b", {}, String(logical)), strip(name, logical, found), entry));
        pairs.push([entry, physical[block], `fig-of-${name}`]);
      });
    }
    for (const name of ["A", "B"]) {
      const most = TEXT[name].length;
      buttons[name].textContent = tables[name] ? `${name} writes a token` : `${name} arrives`;
      buttons[name].disabled = lengths[name] === most;
      ends[name].disabled = !tables[name];
    }
    finder.input.disabled = !tables.A;
    if (tables.A) finder.set(Math.min(looked ?? finder.input.value, lengths.A - 1), lengths.A - 1);
    if (looked !== null && tables.A) {
      const [logical, offset] = [Math.floor(looked / SIZE), looked % SIZE];
      note = `Token ${looked} of A, “${TEXT.A[looked]}”: ${looked} ÷ 4 is ${logical}, rest ${offset}. Entry ${logical} of A’s table is block ${tables.A[logical]}, so it lies in slot ${tables.A[logical]} × 4 + ${offset} = ${tables.A[logical] * SIZE + offset}.`;
    }
    said.textContent = `${note} ${free.length} of ${FREE.length} blocks are free.`;
    links(both, pairs);
  }

  function strip(name, logical, found) {
    const slots = Array.from({ length: SIZE }, (_, offset) => {
      const position = logical * SIZE + offset;
      const full = name && position < lengths[name];
      const kind = `fig-slot${full ? ` fig-fill-${name}` : ""}${offset === found ? " fig-found" : ""}`;
      return element("span", { class: kind, title: full ? TEXT[name][position] : undefined }, full ? TEXT[name][position] : "");
    });
    return element("span", { class: "fig-strip" }, ...slots);
  }

  place.replaceChildren(
    controls(buttons.A, buttons.B, ends.A, ends.B, button("Start again", start)),
    controls(finder),
    both,
    said,
  );
  start();
  new ResizeObserver(() => links(both, pairs)).observe(both);
}
