// The picture of one frame of a BlockFilm: which requests wait and run, their logical blocks, the block tables, the pool.
//
//   Waiting [B]   Running [A]   Done [ ]
//   Logical blocks               Block table     Physical blocks, 9 of 12 free
//   A  7 tokens                                  0 [            ]
//   0 [Four|score|and|seven]       [ 5 ]---.     1 [years|ago|our|] A
//   1 [years|ago|our|     ]        [ 1 ]----\--- 5 [Four|score|and|seven] A
//
// The pool is one column at any width, so that a line from an entry of a table ends at the block that the entry names.
// A colour never speaks alone: every block also carries its number and the letters of its owners.

import { element } from "./dom.js";
import { plural } from "./film.js";

const SLOTS_UP_TO = 8; // tokens a block: a larger block is one bar
const ALL_UP_TO = 32; // blocks: in a larger pool, neighbours that are free are one row
const RUN_FROM = 3; // so many of them
const SVG = "http://www.w3.org/2000/svg";

export function drawBlocks(film, i, stage) {
  const columns = element("div", { class: "tp-columns" }, requests(film, i), pools(film, i));
  const title = element("span", { class: "tp-step" }, i === 0 ? "Before the first event" : `${film.hasQueues ? "Step" : "Call"} ${film.step(i)}`);
  stage.style.setProperty("--tp-half", Math.ceil(film.pool.block_size / 2));
  stage.replaceChildren(title, ...(film.hasQueues ? [queues(film, i)] : []), ...sums(film.event(i)), columns, legend(film));
  drawLinks(film, i, stage);
}

function queues(film, i) {
  const lanes = { waiting: "Waiting", running: "Running", done: "Done" };
  const lists = Object.entries(lanes).map(([lane, name]) => {
    const inside = film.sequences.filter((seq) => film.queues[i][seq.name] === lane);
    const chips = inside.map((seq) => chip(seq, seq.name in film.states[i].host_tables ? "on the host" : ""));
    return element("div", { class: "tp-lane", "data-lane": lane }, element("span", { class: "tp-soft" }, name), ...chips);
  });
  return element("div", { class: "tp-queues" }, ...lists);
}

// What a query keeps while it goes from block to block (chapter 7).
function sums(event) {
  if (event?.event !== "read") return [];
  const kept = [`m = ${event.m}`, `l = ${event.l}`, `before: × ${event.rescaled}`];
  return [element("div", { class: "tp-sums" }, ...kept.map((words) => element("span", {}, words)))];
}

function chip(seq, note = "") {
  const attributes = { class: "tp-chip", "data-seq": seq.name, title: seq.name + (note && `, ${note}`) };
  const made = element("span", { ...attributes, style: { "--tp-fill": seq.colour } }, seq.label);
  if (note) made.classList.add("tp-away");
  return made;
}

function requests(film, i) {
  const state = film.states[i];
  const event = film.event(i);
  const cards = [];
  for (const seq of film.sequences) {
    const device = state.tables[seq.name] ?? [];
    const host = state.host_tables[seq.name] ?? [];
    const count = Math.max(device.length, host.length);
    if (!count) continue;
    const rows = Array.from({ length: count }, (_, logical) => {
      const onHost = (device[logical] ?? -1) < 0;
      const block = onHost ? host[logical] ?? -1 : device[logical];
      const target = block < 0 ? "?" : onHost ? `h${block}` : String(block);
      const current = event?.seq === seq.name && event.logical === logical;
      return element(
        "div",
        { class: "tp-row", "data-seq": seq.name, "data-logical": logical, "data-target": target },
        element("span", { class: "tp-number" }, String(logical)),
        strip(film, film.fill(i, seq.name, logical), film.texts(i, seq.name, logical), [seq.colour]),
        element("span", { class: "tp-entry" + (current ? " tp-current" : "") }, target),
      );
    });
    const name = seq.label === seq.name ? "" : `${seq.name}, `;
    const held = element("span", { class: "tp-soft" }, `${name}${plural(state.num_tokens[seq.name] ?? 0, "token")}`);
    cards.push(element("div", { class: "tp-card" }, element("div", { class: "tp-head" }, chip(seq), held), ...rows));
  }
  if (!cards.length) cards.push(element("p", { class: "tp-soft" }, "No request holds a block."));
  const headings = [element("span", {}, "Logical blocks"), element("span", {}, "Block table")];
  return element("div", { class: "tp-requests" }, element("div", { class: "tp-title tp-titles" }, ...headings), ...cards);
}

function pools(film, i) {
  const { num_blocks, num_host_blocks } = film.pool;
  const { cached, lost } = film.states[i];
  const owners = film.owners(i);
  const kept = Object.keys(cached).filter((block) => !owners.has(Number(block))).length;
  const away = Object.keys(lost ?? {}).length;
  const counts = [`${owners.size} of ${num_blocks} in use`, kept && `${kept} kept`, away && `${away} lost`, `${num_blocks - owners.size - kept - away} free`];
  const column = element("div", { class: "tp-pools" });
  column.append(
    element("div", { class: "tp-title" }, "Physical blocks"),
    element("div", { class: "tp-soft" }, counts.filter(Boolean).join(", ")),
    ...pool(film, i, num_blocks, owners, ""),
  );
  if (num_host_blocks) {
    const heading = element("div", { class: "tp-title" }, "Host's memory");
    column.append(heading, ...pool(film, i, num_host_blocks, film.owners(i, "host_tables"), "h"));
  }
  return column;
}

// The blocks of one memory, each a row.
function pool(film, i, count, owners, prefix) {
  const cached = prefix ? {} : film.states[i].cached;
  const lost = prefix ? {} : film.states[i].lost ?? {};
  const fresh = changedBlock(film.event(i), prefix);
  const isFree = (block) => !owners.has(block) && !(block in cached) && !(block in lost);
  const rows = [];
  for (let block = 0; block < count; block++) {
    let end = block;
    while (count > ALL_UP_TO && end < count && isFree(end) && prefix + end !== fresh) end++;
    if (end - block >= RUN_FROM) {
      rows.push(element("div", { class: "tp-many tp-soft" }, `${prefix}${block} to ${prefix}${end - 1} are free`));
      block = end - 1;
    } else rows.push(drawBlock(film, i, block, prefix, owners.get(block) ?? [], cached[block], block in lost, prefix + block === fresh));
  }
  return rows;
}

function drawBlock(film, i, block, prefix, named, cached, isLost, isFresh) {
  const widest = named.reduce((best, owner) => (best && best.fill >= owner.fill ? best : owner), null);
  const fill = cached ? film.pool.block_size : widest?.fill ?? 0;
  const scores = film.event(i)?.event === "read" && isFresh ? film.event(i).scores.map(String) : null;
  const words = scores ?? cached ?? (widest ? film.texts(i, widest.seq, widest.logical) : []);
  const colours = named.map((owner) => film.byName[owner.seq].colour);
  const letters = named.map((owner) => film.byName[owner.seq].label).join("") + (cached ? "#" : "") + (isLost ? "lost" : "");
  const kind = named.length ? "" : cached ? " tp-kept" : isLost ? " tp-lost" : " tp-free";
  return element(
    "div",
    {
      class: `tp-block${isFresh ? " tp-new" : ""}${kind}`,
      "data-block": prefix + block,
      "data-owners": named.map((owner) => `${owner.seq}:${owner.logical}`).join(" "),
      "data-fill": fill,
    },
    element("span", { class: "tp-number" }, prefix + block),
    strip(film, fill, words, colours),
    element("span", { class: "tp-owners", title: named.length > 1 ? `${named.length} references` : undefined }, letters),
  );
}

// "3" or "h3": the block that the event is about, in the pool that `prefix` stands for.
function changedBlock(event, prefix) {
  if (!event) return null;
  const block = prefix ? (event.event === "swap_out" ? event.host_block : null) : event.target ?? (event.event === "swap_out" ? null : event.block);
  return block === null || block === undefined ? null : `${prefix}${block}`;
}

// One block: a cell for each slot with its word, or a bar where slots are many.
function strip(film, fill, words, colours) {
  const size = film.pool.block_size;
  const many = colours.length > 1;
  const paint = many ? `linear-gradient(90deg, ${stripes(colours)})` : colours[0] ?? "var(--tp-kept)";
  const made = element("span", { class: "tp-strip" + (many ? " tp-shared" : ""), style: { "--tp-fill": paint } });
  if (size > SLOTS_UP_TO) {
    made.classList.add("tp-long");
    made.append(
      element("span", { class: "tp-bar", style: { width: `${(100 * fill) / size}%` } }),
      element("span", { class: "tp-label" }, words.length ? words.join(" ") : fill ? `${fill}/${size}` : ""),
    );
    return made;
  }
  for (let slot = 0; slot < size; slot++) {
    const word = slot < fill ? words[slot] ?? "" : "";
    made.append(element("span", { class: slot < fill ? "tp-slot tp-on" : "tp-slot", title: word || undefined }, word));
  }
  return made;
}

function stripes(colours) {
  return colours.map((c, n) => `${c} ${(100 * n) / colours.length}% ${(100 * (n + 1)) / colours.length}%`).join(", ");
}

// What the signs mean: those that this film shows.
function legend(film) {
  const signs = [["tp-on", "a token; the colour is its request"], ["tp-free", "free"]];
  if (film.shows("shared")) signs.push(["tp-shared", "named by several tables: a stripe for each"]);
  if (film.shows("cached")) signs.push(["tp-kept", "#: in the prefix cache, found by its tokens; grey when no request names it"]);
  if (film.shows("lost")) signs.push(["tp-lost", "lost: taken, and in no table"]);
  const shown = signs.map(([kind, words]) => element("span", { class: "tp-legend" }, element("span", { class: `tp-sign ${kind}` }), words));
  return element("div", { class: "tp-legends" }, ...shown);
}

// Lines over the picture: from each entry of a table to the block that it names, those of the event's request strong;
// and the arrow of a copy, at the right of the blocks.
export function drawLinks(film, i, stage) {
  stage.querySelector("svg.tp-links")?.remove();
  const frame = stage.getBoundingClientRect();
  if (!frame.width) return;
  const event = film.event(i);
  const svg = vector("svg", { class: "tp-links", "aria-hidden": "true" });
  const box = (selector) => stage.querySelector(selector)?.getBoundingClientRect();
  const draw = (kind, from, to, colour, data = {}) => {
    const [x1, y1, x2, y2] = [from.x - frame.left, from.y - frame.top, to.x - frame.left, to.y - frame.top].map((n) => n.toFixed(1));
    const bend = kind === "tp-copy" ? [Number(x1) + 22, Number(x2) + 22] : [x1, x2].map(() => (Number(x1) + Number(x2)) / 2);
    svg.append(vector("path", { class: kind, d: `M${x1} ${y1} C${bend[0]} ${y1} ${bend[1]} ${y2} ${x2} ${y2}`, stroke: colour, ...data }));
    if (kind === "tp-copy") svg.append(vector("path", { class: "tp-head-of", d: `M${Number(x2) + 6} ${Number(y2) - 4} L${x2} ${y2} l6 4` }));
    else svg.append(vector("circle", { cx: x2, cy: y2, r: kind === "tp-strong" ? 3.5 : 2.5, fill: colour }));
  };
  const rows = [...stage.querySelectorAll(".tp-row")];
  const isStrong = (row) => row.dataset.seq === event?.seq;
  for (const row of rows.sort((a, b) => isStrong(a) - isStrong(b))) {
    const to = box(`.tp-block[data-block="${row.dataset.target}"]`);
    if (!to) continue;
    const from = row.querySelector(".tp-entry").getBoundingClientRect();
    const { seq, logical, target } = row.dataset;
    const ends = [{ x: from.right, y: middle(from) }, { x: to.left, y: middle(to) }];
    draw(isStrong(row) ? "tp-strong" : "tp-weak", ...ends, film.byName[seq].colour, { "data-seq": seq, "data-logical": logical, "data-target": target });
  }
  if (event?.event === "copy") {
    const [from, to] = [event.source, event.target].map((block) => box(`.tp-block[data-block="${block}"]`));
    if (from && to) draw("tp-copy", { x: from.right, y: middle(from) }, { x: to.right, y: middle(to) }, "currentColor");
  }
  stage.append(svg);
}

function middle(box) {
  return (box.top + box.bottom) / 2;
}

function vector(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
