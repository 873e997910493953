// <side-by-side src="figures/side_by_side.film">: two servers with the same memory under the same requests, one that
// reserves and one that pages. minipaged/simulator/side_by_side.py made the film (gzipped JSON), and makes another one in a worker
// (Pyodide) when a slider is moved. What stands inside the element is what a page without scripts shows.
//
// The attribute `missing` says why there is no Python: the sliders are then left out.

import { button, controls, count, element, legend, range, svg } from "./parts.js";

const ACROSS = 1024; // slots in a row of the picture
const [WIDE, STEP, HIGH] = [0.5, 15, 13]; // of a slot; from row to row; of a row
const COLOURS = 8; // then they come again
const FRAME = 125; // milliseconds: 8 of the servers' seconds in one of the reader's
const POSTER = 0.6;
const POLICIES = { max: "the longest: 2,048 slots each", pow2: "a power of two", oracle: "the exact length", paged: "paged, blocks of 16" };
const NAMES = { max: "Contiguous: the longest is reserved", pow2: "Contiguous: a power of two is reserved", oracle: "Contiguous: the exact length is reserved" };
const COUNTERS = ["holds tokens", "running", "waiting", "finished"];

class SideBySide extends HTMLElement {
  async connectedCallback() {
    if (this.film) return;
    try {
      const answer = await fetch(this.getAttribute("src"));
      if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
      const film = await new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).json();
      this.settings = { ...film.settings };
      this.films = new Map([[JSON.stringify(film.settings), film]]);
      this.#build(film);
      this.show(film);
      this.go(Math.round(this.last * POSTER));
      this.#playWhenSeen();
    } catch (error) {
      this.append(element("p", { role: "alert" }, `The run could not be loaded: ${error.message}`));
    }
  }

  disconnectedCallback() {
    this.pause();
    this.seen?.disconnect();
  }

  // Once, from the beginning, when it comes into sight; not for a reader who wants nothing to move.
  #playWhenSeen() {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    this.seen = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) return;
      this.seen.disconnect();
      this.go(0);
      this.play();
    }, { threshold: 0.6 });
    this.seen.observe(this.panels[1].drawing);
  }

  // Show a film. Of each pool every frame's places are kept: request -> its run, or its blocks.
  show(film) {
    this.pause();
    this.film = film;
    this.last = film.pools[0].frames.length - 1;
    this.places = film.pools.map((pool) => {
      let before = {};
      return pool.frames.map(({ tokens, given }) => {
        const now = {};
        for (const request in tokens) {
          const news = given[request];
          if (!news) now[request] = before[request];
          else now[request] = pool.block_size ? [...(before[request] ?? []).slice(0, news[0]), ...news.slice(1)] : news;
        }
        return (before = now);
      });
    });
    film.pools.forEach((pool, i) => {
      this.panels[i].title.textContent = pool.block_size ? `Paged: blocks of ${pool.block_size} tokens` : NAMES[pool.name];
    });
    this.moment.set(Math.min(this.frame ?? 0, this.last), this.last);
  }

  go(frame) {
    this.frame = Math.max(0, Math.min(this.last, frame));
    this.moment.set(this.frame);
    this.film.pools.forEach((pool, i) => {
      const { account, queues } = pool.frames[this.frame];
      const panel = this.panels[i];
      const held = `${((100 * account[0]) / this.film.num_slots).toFixed(1)} %`;
      [held, ...queues].forEach((value, n) => { panel.counters[n].textContent = String(value); });
      this.#draw(panel, pool, this.places[i][this.frame], pool.frames[this.frame].tokens);
      panel.drawing.setAttribute("aria-label", `${panel.title.textContent}. ${held} of the memory holds tokens; ${queues[0]} running, ${queues[1]} waiting, ${queues[2]} finished.`);
    });
    if (this.frame === this.last) this.pause();
  }

  play() {
    if (this.timer) return;
    if (this.frame === this.last) this.go(0);
    this.timer = setInterval(() => this.go(this.frame + 1), FRAME);
    this.toggle.textContent = "Pause";
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.toggle) this.toggle.textContent = "Play";
  }

  #build(film) {
    this.panels = film.pools.map(() => panel(film.num_slots));
    this.toggle = button("Play", () => (this.timer ? this.pause() : this.play()));
    const length = film.pools[0].frames.length - 1;
    this.moment = range("Second", { min: 0, max: length, value: 0 }, String, (n) => { this.pause(); this.go(n); });
    this.status = element("p", { class: "sbs-status", role: "status" });
    const kinds = [["sbs-held", "holds a token"], ["sbs-later", "filled later"], ["sbs-never", "never filled"], ["sbs-free", "free"]];
    const missing = this.getAttribute("missing");
    this.replaceChildren(
      element("div", { class: "sbs-panels" }, ...this.panels.map((each) => each.face)),
      controls(this.toggle, this.moment),
      legend(...kinds),
      missing ? element("p", { class: "sbs-status" }, `The sliders need Python in the browser: ${missing}.`) : this.#sliders(film.settings),
      this.status,
    );
  }

  #sliders({ rate, spread, block_size }) {
    const set = (name, value) => {
      this.settings[name] = value;
      clearTimeout(this.soon);
      this.soon = setTimeout(() => this.#ask(), 400);
    };
    const ratio = (sigma) => `the long tenth is ${Math.exp(2.563 * sigma).toFixed(sigma < 0.8 ? 1 : 0)} times the short tenth`;
    const policy = element("select", {}, ...Object.entries(POLICIES).map(([value, words]) => element("option", { value }, words)));
    policy.value = this.settings.policy;
    policy.addEventListener("change", () => set("policy", policy.value));
    return element(
      "fieldset",
      { class: "sbs-settings" },
      element("legend", {}, "Change the traffic"),
      range("Arrivals", { min: 0.25, max: 5, step: 0.25, value: rate }, (n) => `${n} a second`, (n) => set("rate", n)),
      range("Spread of lengths", { min: 0.166, max: 1.466, step: 0.1, value: spread }, ratio, (n) => set("spread", n)),
      element("label", { class: "fig-range" }, element("span", {}, "Left: reserve"), policy),
      range("Right: block size", { min: 0, max: 8, value: Math.log2(block_size) }, (n) => count(2 ** n, "token"), (n) => set("block_size", 2 ** n)),
    );
  }

  // Run both servers with the settings as they are now. What was run before is kept; only the last question counts.
  async #ask() {
    const key = JSON.stringify(this.settings);
    this.asked = key;
    this.setAttribute("aria-busy", "true");
    try {
      if (!this.films.has(key)) this.films.set(key, await python(this.settings, (text) => { this.status.textContent = text; }));
      if (this.asked !== key) return;
      this.show(this.films.get(key));
      this.status.textContent = `${count(this.film.requests, "request")} in ${this.film.seconds} seconds, served twice.`;
      this.go(0);
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.go(Math.round(this.last * POSTER));
      else this.play();
    } catch (error) {
      if (this.asked === key) this.status.textContent = error.message;
    }
    if (this.asked === key) this.removeAttribute("aria-busy");
  }

  #draw({ paths }, pool, places, tokens) {
    const strokes = Object.fromEntries(Object.keys(paths).map((name) => [name, ""]));
    for (const [request, place] of Object.entries(places)) {
      const colour = request % COLOURS;
      const held = tokens[request];
      if (pool.block_size) {
        const size = pool.block_size;
        place.forEach((block, logical) => {
          const full = Math.max(0, Math.min(size, held - logical * size));
          const gap = size > 4 ? 0.6 : 0;
          strokes[`held${colour}`] += strip(block * size, full, full === size ? gap : 0);
          strokes[`later${colour}`] += strip(block * size + full, size - full, gap);
        });
      } else {
        const [start, final, , size] = place;
        strokes[`held${colour}`] += strip(start, held);
        strokes[`later${colour}`] += strip(start + held, final - held);
        strokes.never += strip(start + final, size - final);
        strokes.edges += edge(start);
      }
    }
    for (const [name, path] of Object.entries(paths)) path.setAttribute("d", strokes[name]);
  }
}

// The picture of one pool, and its counters.
function panel(slots) {
  const rows = Math.ceil(slots / ACROSS);
  const drawing = svg("svg", { class: "sbs-pool", role: "img", viewBox: `0 0 ${ACROSS * WIDE} ${rows * STEP - STEP + HIGH}` });
  const pattern = svg("pattern", { id: `sbs-hatch-${++panels}`, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  pattern.append(svg("rect", { class: "sbs-hatch", width: 2, height: 5 }));
  drawing.append(svg("defs", {}, pattern), svg("path", { class: "sbs-empty", d: strip(0, slots) }));
  const paths = {};
  const add = (name, attributes) => drawing.append((paths[name] = svg("path", attributes)));
  for (let colour = 0; colour < COLOURS; colour++) {
    add(`later${colour}`, { class: `sbs-c${colour} sbs-pale` });
    add(`held${colour}`, { class: `sbs-c${colour}` });
  }
  add("never", { fill: `url(#sbs-hatch-${panels})` });
  add("edges", { class: "sbs-edges" });
  const title = element("p", { class: "sbs-title" });
  const counters = COUNTERS.map((name) => element("dd", { "data-count": name }));
  const list = element("dl", { class: "sbs-counters" }, ...COUNTERS.map((name, i) => element("div", {}, element("dt", {}, name), counters[i])));
  return { face: element("div", { class: "sbs-panel" }, title, drawing, list), title, drawing, paths, counters };
}

let panels = 0;

// `length` slots from `start` on, as a path: a rectangle in each row that they touch.
function strip(start, length, gap = 0) {
  let path = "";
  while (length > 0) {
    const x = start % ACROSS;
    const here = Math.min(length, ACROSS - x);
    const wide = Math.max(0.1, here * WIDE - gap);
    path += `M${x * WIDE} ${Math.floor(start / ACROSS) * STEP}h${wide}v${HIGH}h-${wide}z`;
    start += here;
    length -= here;
  }
  return path;
}

// Where a run begins.
function edge(start) {
  return `M${(start % ACROSS) * WIDE + 1} ${Math.floor(start / ACROSS) * STEP}v${HIGH}`;
}

// ---- Python, when it is first needed ---------------------------------------------------------------------------------

let worker = null;
let asked = 0;
const waiting = new Map();

function python(settings, say) {
  if (!worker) {
    worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    worker.addEventListener("message", ({ data }) => {
      const { resolve, reject, say } = waiting.get(data.id);
      if (data.status) return say(data.status);
      waiting.delete(data.id);
      if (data.error !== undefined) reject(new Error(data.error));
      else resolve(data.film);
    });
    worker.addEventListener("error", (event) => {
      for (const { reject } of waiting.values()) reject(new Error(event.message || "Python could not be loaded"));
      waiting.clear();
      worker = null;
    });
  }
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, say });
    worker.postMessage({ id, settings });
  });
}

customElements.define("side-by-side", SideBySide);
