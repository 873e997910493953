// A trace as a film: frame 0 is the empty pool, frame i the state after event i. Nothing here touches the page, so a
// test can hold every frame against Python's own replay.
//
// The document is what minipaged/viz/export.py writes. An event carries the entries that it changed in five maps
// (tables, host_tables, num_tokens, texts, cached), and null for an entry that is gone. A counterexample has a sixth:
// `lost`, the blocks that are taken and in no table.
//
// `marks` are the moments that matter, [[frame, caption], ...]: a film opens at the middle one.

const KEPT = 2_000; // frames of a live film
const EMPTY = { tables: {}, host_tables: {}, num_tokens: {}, texts: {}, cached: {} };

export class BlockFilm {
  constructor(document) {
    if (document.schema !== "minipaged.site" || document.version !== 1) {
      throw new Error(`expected minipaged.site version 1, got ${document.schema} version ${document.version}`);
    }
    this.document = document;
    this.isLive = document.events.length === 0; // a live server's begins with a state, and grows
    this.pool = document.trace;
    this.sequences = document.sequences;
    this.byName = Object.fromEntries(document.sequences.map((seq) => [seq.name, seq]));
    this.states = [document.base ?? EMPTY];
    this.queues = [document.queues ?? this.#firstQueue()];
    this.#add(document.events);
  }

  #add(events) {
    const last = Object.fromEntries(events.map((item, i) => [item.event.seq, i])); // each sequence's last event
    events.forEach((item, i) => {
      this.states.push(applied(this.states.at(-1), item.changes));
      this.queues.push(this.#queueAfter(this.queues.at(-1), item.event, this.states.at(-1), last[item.event.seq] > i));
    });
  }

  // What a live server adds: sequences that arrived, and events. Only the last frames are kept. Returns how many went.
  append({ sequences, events }) {
    for (const seq of sequences) {
      this.byName[seq.name] = seq;
      this.sequences.push(seq);
      this.queues.at(-1)[seq.name] = "waiting";
    }
    this.document.events.push(...events);
    this.#add(events);
    const gone = this.length - KEPT;
    if (gone < KEPT / 2) return 0;
    for (const list of [this.states, this.queues, this.document.events]) list.splice(0, gone);
    this.document.earlier = "Earlier events are not kept.";
    const seen = new Set(this.document.events.map((item) => item.event.seq));
    const lives = (seq) => seen.has(seq.name) || this.queues[0][seq.name] !== "done";
    this.document.sequences = this.sequences = this.sequences.filter(lives);
    this.byName = Object.fromEntries(this.sequences.map((seq) => [seq.name, seq]));
    return gone;
  }

  get length() {
    return this.states.length;
  }

  get marks() {
    return this.document.marks ?? [];
  }

  // Whether the film has such blocks at any moment: "shared", "cached" or "lost". Of a live film all is possible.
  shows(kind) {
    if (this.isLive) return kind !== "lost";
    this.kinds ??= new Set(this.states.flatMap((state, i) => [
      ...([...this.owners(i).values()].some((named) => named.length > 1) ? ["shared"] : []),
      ...(Object.keys(state.cached).length ? ["cached"] : []),
      ...(Object.keys(state.lost ?? {}).length ? ["lost"] : []),
    ]));
    return this.kinds.has(kind);
  }

  words(i) {
    if (i === 0 && this.document.base) return this.document.earlier ?? (this.isLive ? "The pool as the page found it." : "The step begins.");
    return i === 0 ? "The pool is empty." : this.document.events[i - 1].words;
  }

  step(i) {
    return i === 0 ? this.document.step ?? 0 : this.document.events[i - 1].event.step ?? i;
  }

  event(i) {
    return i === 0 ? null : this.document.events[i - 1].event;
  }

  // A counterexample is a script of calls: it has no queue.
  get hasQueues() {
    return this.document.queues || this.document.events.some((item) => item.event.event !== "call");
  }

  // What waits, runs and is done is told by the events, since a trace records no arrivals.
  #firstQueue() {
    return Object.fromEntries(this.sequences.map((seq) => [seq.name, "waiting"]));
  }

  #queueAfter(queue, event, state, comesBack) {
    const next = { ...queue };
    if (event.event === "reset") {
      for (const seq in next) if (next[seq] === "running") next[seq] = "waiting";
    } else if (event.event === "finish") next[event.seq] = "done";
    else if (event.event === "preempt") next[event.seq] = "waiting";
    else if (event.event === "swap_out") next[event.seq] = "waiting";
    else if (["allocate", "share", "fork", "write", "swap_in"].includes(event.event)) next[event.seq] = "running";
    else if (event.event === "free" && !(event.seq in state.tables) && next[event.seq] === "running") {
      next[event.seq] = comesBack ? "waiting" : "done"; // a script has no `finish`; a beam that dies has none either
    }
    return next;
  }

  // The entries that name each block of a pool: block -> [{seq, logical, fill}].
  owners(i, map = "tables") {
    const named = new Map();
    for (const [seq, blocks] of Object.entries(this.states[i][map])) {
      blocks.forEach((block, logical) => {
        if (block < 0) return;
        if (!named.has(block)) named.set(block, []);
        named.get(block).push({ seq, logical, fill: this.fill(i, seq, logical) });
      });
    }
    return named;
  }

  fill(i, seq, logical) {
    const size = this.pool.block_size;
    return Math.max(0, Math.min(size, (this.states[i].num_tokens[seq] ?? 0) - logical * size));
  }

  // The words of one logical block, as many as are written.
  texts(i, seq, logical) {
    const start = logical * this.pool.block_size;
    return (this.states[i].texts[seq] ?? []).slice(start, start + this.fill(i, seq, logical));
  }

  // The whole moment in sentences: what a screen reader is told, and what the page shows under the picture.
  sentences(i) {
    const state = this.states[i];
    const lines = [];
    for (const { name, label } of this.sequences) {
      const tables = [state.tables[name] ?? [], state.host_tables[name] ?? []];
      const count = Math.max(tables[0].length, tables[1].length);
      if (!count) continue;
      const places = Array.from({ length: count }, (_, logical) => place(tables, logical));
      const who = label === name ? label : `${label} (${name})`;
      lines.push(`${who} holds ${plural(state.num_tokens[name] ?? 0, "token")}, in ${places.join(", ")}.`);
    }
    const owners = this.owners(i);
    for (const [block, named] of [...owners].sort((a, b) => a[0] - b[0])) {
      if (named.length > 1) {
        const names = named.map((owner) => this.byName[owner.seq].label).join(" and ");
        lines.push(`Block ${block} is shared by ${names}.`);
      }
    }
    const kept = Object.keys(state.cached).filter((block) => !owners.has(Number(block)));
    if (kept.length) lines.push(`Kept with no owner, to be found again: ${kept.map((b) => `block ${b}`).join(", ")}.`);
    const lost = Object.keys(state.lost ?? {});
    if (lost.length) lines.push(`Lost, since no table names it: ${lost.map((b) => `block ${b}`).join(", ")}.`);
    const free = this.pool.num_blocks - owners.size - kept.length - lost.length;
    lines.push(`${owners.size} of ${this.pool.num_blocks} blocks are in use, ${free} are free.`);
    return lines;
  }

  // The frame with most to draw: the player gives the picture its height, so that the page does not jump.
  tallest() {
    const rows = (i) =>
      Object.values(this.states[i].tables).reduce((sum, blocks) => sum + blocks.length + 2, 0) +
      Object.values(this.states[i].host_tables).reduce((sum, blocks) => sum + blocks.length + 2, 0);
    let best = 0;
    for (let i = 1; i < this.length; i++) if (rows(i) > rows(best)) best = i;
    return best;
  }
}

// A state with an event's changes in it. Maps that did not change are shared with the state before.
export function applied(state, changes) {
  if ("" in changes) return EMPTY; // a reset of a live server
  const next = { ...state };
  for (const [map, entries] of Object.entries(changes)) {
    next[map] = { ...next[map] };
    for (const [key, value] of Object.entries(entries)) {
      if (value === null) delete next[map][key];
      else if (map === "texts" && !Array.isArray(value)) next[map][key] = [...(next[map][key] ?? []).slice(0, value.at), ...value.words];
      else next[map][key] = value;
    }
  }
  return next;
}

export function plural(count, word) {
  return count === 1 ? `1 ${word}` : `${count} ${word}s`;
}

function place([device, host], logical) {
  if ((device[logical] ?? -1) >= 0) return `block ${device[logical]}`;
  if ((host[logical] ?? -1) >= 0) return `host block ${host[logical]}`;
  return "no block";
}
