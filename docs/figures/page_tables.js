// Figure 4. The same lookup three times: a page table of one level, of three levels, and a block table. Under it, what
// tables cost in full size.

import { bytes, choice, controls, count, element, range, stage, words } from "./parts.js";

const FRAME = 6; // where the one page of the walk lies
const START = 21; // of the slider below: 126 pages or blocks
const LAYOUTS = {
  one: { bits: [6], offset: 3, names: ["page table"] },
  three: { bits: [2, 2, 2], offset: 3, names: ["top table", "middle table", "page table"] },
};
const BLOCKS = [5, 1, 6, 2]; // a block table, blocks of 4 tokens
const [ENTRY, LEVEL_BITS, LEVELS] = [8, 12, 3]; // a tree for 48 bits: 3 levels of 12 bits, then 12 bits of offset
const TABLE = ENTRY * 2 ** LEVEL_BITS;

// Bytes of the three-level tree when so many neighbouring pages are in use: the top, and a table for each full stretch.
export function treeBytes(pages) {
  let tables = 0;
  for (let level = 0; level < LEVELS; level++) tables += Math.max(level ? 0 : 1, Math.ceil(pages / 2 ** (LEVEL_BITS * (LEVELS - level))));
  return tables * TABLE;
}

export function pageTables(place) {
  let [kind, address] = ["one", 363];
  let pages = number(START);
  const walk = element("div", { class: "fig-walk" });
  const costs = element("table", { class: "fig-costs" });
  const said = words();
  const slider = range("Address", { min: 0, max: 511, value: address }, String, (n) => { address = n; draw(); });

  function draw() {
    if (kind === "blocks") drawBlocks();
    else drawPages(LAYOUTS[kind]);
  }

  function drawPages({ bits, offset, names }) {
    const page = address >> offset;
    const inside = address & (2 ** offset - 1);
    const cuts = [];
    let rest = page;
    for (const width of [...bits].reverse()) {
      cuts.unshift(rest & (2 ** width - 1));
      rest >>= width;
    }
    const shown = cuts.map((cut, i) => cut.toString(2).padStart(bits[i], "0"));
    const parts = [...shown, inside.toString(2).padStart(offset, "0")];
    walk.replaceChildren(
      spelled(`address ${address}`, parts),
      ...cuts.map((cut, i) => table(names[i], 2 ** bits[i], cut, i === cuts.length - 1 ? `frame ${FRAME}` : "next table")),
      cells(`frame ${FRAME}`, 2 ** offset, inside),
    );
    const where = FRAME * 2 ** offset + inside;
    const path = cuts.length === 1 ? `entry ${cuts[0]} of ${2 ** bits[0]}` : `entries ${cuts.join(", ")} of three tables of 4`;
    said.textContent = `Address ${address} is page ${page}, offset ${inside}. Read ${path}: frame ${FRAME}. So it lies at ${FRAME} × 8 + ${inside} = ${where}.`;
    place.dataset.physical = where;
  }

  function drawBlocks() {
    const [logical, offset] = [Math.floor(address / 4), address % 4];
    walk.replaceChildren(
      spelled(`token ${address}`, [`${address} ÷ 4 = ${logical}`, `rest ${offset}`]),
      table("block table", BLOCKS.length, logical, `block ${BLOCKS[logical]}`, BLOCKS),
      cells(`block ${BLOCKS[logical]}`, 4, offset),
    );
    const slot = BLOCKS[logical] * 4 + offset;
    said.textContent = `Token ${address} is in logical block ${logical}, at offset ${offset}. The block table says block ${BLOCKS[logical]}. So it lies in slot ${BLOCKS[logical]} × 4 + ${offset} = ${slot}.`;
    place.dataset.physical = slot;
  }

  function drawCosts() {
    const rows = [
      ["one level, 32-bit addresses", "2²⁰ entries of 4 bytes", bytes(4 * 2 ** 20)],
      ["one level, 48-bit addresses", "2³⁶ entries of 8 bytes", bytes(8 * 2 ** 36)],
      ["three levels, 48-bit addresses", `${count(treeBytes(pages) / TABLE, "table")} of 32 KiB`, bytes(treeBytes(pages))],
      ["block table", `${count(pages, "entry").replace("entrys", "entries")} of 4 bytes`, bytes(4 * pages)],
    ];
    costs.replaceChildren(...rows.map(([name, how, size]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, how), element("td", {}, size))));
    place.dataset.tree = treeBytes(pages);
  }

  const kinds = [["one", "page table, one level"], ["three", "three levels"], ["blocks", "block table"]];
  const chosen = (value) => {
    kind = value;
    slider.firstChild.textContent = kind === "blocks" ? "Token" : "Address";
    address = kind === "blocks" ? 6 : 363;
    slider.set(address, kind === "blocks" ? 4 * BLOCKS.length - 1 : 511);
    draw();
  };
  const used = range("Pages or blocks in use", { min: 0, max: 60, value: START }, (n) => number(n).toLocaleString("en"), (n) => { pages = number(n); drawCosts(); });
  place.replaceChildren(
    controls(choice("Look up in a", kinds, kind, chosen), slider),
    stage(walk),
    said,
    controls(used),
    element("div", { class: "fig-scroll", tabindex: 0 }, costs),
  );
  draw();
  drawCosts();
}

// 0 .. 60 to 1 .. 1,000,000, ten positions for each power of ten.
function number(position) {
  return Math.round(10 ** (position / 10));
}

function spelled(name, parts) {
  const bits = parts.map((part) => element("code", {}, part));
  return element("div", { class: "fig-step" }, element("p", { class: "fig-head" }, name), element("p", { class: "fig-bits" }, ...bits));
}

function table(name, entries, chosen, found, all = null) {
  const rows = Array.from({ length: entries }, (_, i) => {
    const label = i === chosen ? found : all ? `block ${all[i]}` : "";
    const shown = entries <= 8 || i === chosen;
    return element("span", { class: i === chosen ? "fig-entry fig-now" : "fig-entry", "data-entry": i }, shown ? `${i}: ${label || "–"}` : "");
  });
  return element("div", { class: entries > 8 ? "fig-step fig-long" : "fig-step" }, element("p", { class: "fig-head" }, name), ...rows);
}

function cells(name, places, chosen) {
  const all = Array.from({ length: places }, (_, i) => element("span", { class: i === chosen ? "fig-place fig-now" : "fig-place" }, String(i)));
  return element("div", { class: "fig-step" }, element("p", { class: "fig-head" }, name), element("p", { class: "fig-places" }, ...all));
}
