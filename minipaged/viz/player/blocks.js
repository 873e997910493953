// The picture of one frame of a BlockFilm: who waits and runs, the requests as they see themselves, the pool as it is.
//
//   Waiting [B]   Running [A]   Done [ ]
//   A  7 tokens                            Physical blocks, 9 of 12 free
//   0 [Four|score|and|seven]  -> 5         0 [            ]   5 [Four|score|and|seven] A
//   1 [years|ago|our|     ]   -> 1         1 [years|ago|our|] A
//
// A colour never speaks alone: every block also carries its number and the letters of its owners.

import { element } from "./dom.js";
import { plural } from "./film.js";

const SLOTS_UP_TO = 8; // tokens a block: a larger block is one bar
const DRAWN_UP_TO = 128; // blocks: of a larger pool, free ones are left out
const SVG = "http://www.w3.org/2000/svg";

export function drawBlocks(film, i, stage) {
  const event = film.event(i);
  const owners = film.owners(i);
  const hosts = film.owners(i, "host_tables");
  const parts = [...(film.hasQueues ? [queues(film, i)] : []), element("div", { class: "tp-columns" }, requests(film, i), pools(film, i, owners, hosts, event))];
  const title = element("span", { class: "tp-step" }, i === 0 ? "Before the first event" : `${film.hasQueues ? "Step" : "Call"} ${film.step(i)}`);
  stage.replaceChildren(title, ...parts);
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

function chip(seq, note = "") {
  const attributes = { class: "tp-chip", "data-seq": seq.name, title: seq.name + (note && `, ${note}`) };
  const made = element("span", { ...attributes, style: { "--tp-fill": seq.colour } }, seq.label);
  if (note) made.classList.add("tp-away");
  return made;
}

function requests(film, i) {
  const state = film.states[i];
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
      return element(
        "div",
        { class: "tp-row", "data-seq": seq.name, "data-logical": logical, "data-target": target },
        element("span", { class: "tp-number" }, String(logical)),
        strip(film, film.fill(i, seq.name, logical), film.texts(i, seq.name, logical), [seq.colour]),
        element("span", { class: "tp-entry" }, `→ ${target}`),
      );
    });
    const name = seq.label === seq.name ? "" : `${seq.name}, `;
    const held = element("span", { class: "tp-soft" }, `${name}${plural(state.num_tokens[seq.name] ?? 0, "token")}`);
    cards.push(element("div", { class: "tp-card" }, element("div", { class: "tp-head" }, chip(seq), held), ...rows));
  }
  if (!cards.length) cards.push(element("p", { class: "tp-soft" }, "No request holds a block."));
  const heading = element("div", { class: "tp-title" }, "Logical blocks → block table");
  return element("div", { class: "tp-requests" }, heading, ...cards);
}

function pools(film, i, owners, hosts, event) {
  const { num_blocks, num_host_blocks } = film.pool;
  const cached = film.states[i].cached;
  const kept = Object.keys(cached).filter((block) => !owners.has(Number(block))).length;
  const free = num_blocks - owners.size - kept;
  const column = element("div", { class: "tp-pools" });
  column.append(
    element("div", { class: "tp-title" }, "Physical blocks"),
    element("div", { class: "tp-soft" }, `${owners.size} of ${num_blocks} in use, ${kept ? `${kept} kept, ` : ""}${free} free`),
    grid(film, i, num_blocks, owners, cached, event, ""),
  );
  if (num_host_blocks) {
    column.append(
      element("div", { class: "tp-title" }, "Host's memory"),
      grid(film, i, num_host_blocks, hosts, {}, event, "h"),
    );
  }
  return column;
}

function grid(film, i, count, owners, cached, event, prefix) {
  const fresh = changedBlock(event, prefix);
  const all = Array.from({ length: count }, (_, block) => block);
  const drawn = count <= DRAWN_UP_TO ? all : all.filter((block) => owners.has(block) || String(block) in cached);
  const cells = drawn.map((block) => {
    const named = owners.get(block) ?? [];
    const found = String(block) in cached;
    const fill = found ? film.pool.block_size : Math.max(0, ...named.map((owner) => owner.fill));
    const widest = named.reduce((best, owner) => (best && best.fill >= owner.fill ? best : owner), null);
    const words = found ? cached[block] : widest ? film.texts(i, widest.seq, widest.logical) : [];
    const colours = named.map((owner) => film.byName[owner.seq].colour);
    const letters = named.map((owner) => film.byName[owner.seq].label).join("") + (found ? "#" : "");
    return element(
      "div",
      {
        class: "tp-block" + (block === fresh ? " tp-new" : "") + (named.length ? "" : found ? " tp-kept" : " tp-free"),
        "data-block": prefix + block,
        "data-owners": named.map((owner) => `${owner.seq}:${owner.logical}`).join(" "),
        "data-fill": fill,
      },
      element("span", { class: "tp-number" }, prefix + block),
      strip(film, fill, words, colours),
      element("span", { class: "tp-owners", title: named.length > 1 ? `${named.length} references` : undefined }, letters),
    );
  });
  return element("div", { class: "tp-grid" }, ...cells);
}

function changedBlock(event, prefix) {
  if (!event) return null;
  if (prefix === "h") return event.event === "swap_out" ? event.host_block : null;
  return event.target ?? (event.event === "swap_out" ? null : event.block) ?? null;
}

// One block: a cell for each slot with its word, or a bar where slots are many.
function strip(film, fill, words, colours) {
  const size = film.pool.block_size;
  const many = colours.length > 1;
  const paint = many ? `linear-gradient(90deg, ${stripes(colours)})` : colours[0] ?? "var(--tp-kept)";
  const made = element("span", { class: "tp-strip" + (many ? " tp-shared" : ""), style: { "--tp-fill": paint } });
  if (size > SLOTS_UP_TO) {
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

// Lines over the picture: the table of the request that the event is about, and the arrow of a copy.
export function drawLinks(film, i, stage) {
  stage.querySelector("svg.tp-links")?.remove();
  const event = film.event(i);
  if (!event || event.seq === undefined) return;
  const frame = stage.getBoundingClientRect();
  if (!frame.width) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "tp-links");
  svg.setAttribute("aria-hidden", "true");
  const colour = film.byName[event.seq]?.colour ?? "currentColor";
  for (const row of stage.querySelectorAll(".tp-row")) {
    if (row.dataset.seq !== event.seq) continue;
    const from = row.querySelector(".tp-entry").getBoundingClientRect();
    const to = stage.querySelector(`.tp-block[data-block="${row.dataset.target}"]`)?.getBoundingClientRect();
    if (!to || to.left < from.right) continue; // one above the other on a narrow page: the numbers say it
    svg.append(curve(from.right - frame.left, middle(from) - frame.top, to.left - frame.left, middle(to) - frame.top, colour));
  }
  if (event.event === "copy") {
    const [from, to] = [event.source, event.target].map((block) =>
      stage.querySelector(`.tp-block[data-block="${block}"]`)?.getBoundingClientRect(),
    );
    if (from && to) {
      const arrow = curve(from.right - frame.left - 8, middle(from) - frame.top, to.right - frame.left - 8, middle(to) - frame.top, "currentColor", 28);
      arrow.setAttribute("class", "tp-copy");
      svg.append(arrow);
    }
  }
  stage.append(svg);
}

function middle(box) {
  return (box.top + box.bottom) / 2;
}

function curve(x1, y1, x2, y2, colour, bulge = null) {
  const path = document.createElementNS(SVG, "path");
  const [a, b] = bulge === null ? [(x1 + x2) / 2, (x1 + x2) / 2] : [x1 + bulge, x2 + bulge];
  path.setAttribute("d", `M${x1.toFixed(1)} ${y1.toFixed(1)} C${a.toFixed(1)} ${y1.toFixed(1)} ${b.toFixed(1)} ${y2.toFixed(1)} ${x2.toFixed(1)} ${y2.toFixed(1)}`);
  path.setAttribute("stroke", colour);
  return path;
}
