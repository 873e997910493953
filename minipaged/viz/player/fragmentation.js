// The same requests under three reservation policies: a film with the same face as BlockFilm, and its picture.
//
//   max     [AAA......................][BB.......................]     2 run, 3 wait
//   pow2    [AAA..--][BB.--][CCC..]                                    the letters are tokens, the rest is waste
//
// tools/traces.py wrote the document and says what it holds.

import { element } from "./dom.js";
import { plural } from "./film.js";

const NAMES = { max: "max: as long as the model allows", pow2: "pow2: the output rounded up", oracle: "oracle: exactly, as if the length were known" };
const STATE_NAMES = ["held", "reserved", "over-reserved", "rounding", "external", "free"];

export class FragmentationFilm {
  constructor(document) {
    if (document.schema !== "minipaged.site.fragmentation" || document.version !== 1) {
      throw new Error(`expected minipaged.site.fragmentation version 1, got ${document.schema} version ${document.version}`);
    }
    this.document = document;
    this.frames = document.frames;
  }

  get length() {
    return this.frames.length;
  }

  get marks() {
    return this.document.marks ?? [];
  }

  words(i) {
    return this.frames[i].words;
  }

  step(i) {
    return i + 1;
  }

  sentences(i) {
    return this.document.policies.map((policy) => {
      const pool = this.frames[i].pools[policy];
      const share = (100 * pool.account[0]) / this.document.num_slots;
      const runs = plural(pool.runs.length, "request");
      const verb = pool.runs.length === 1 ? "runs" : "run";
      return `${policy}: ${runs} ${verb}, ${pool.waiting.length} wait, ${pool.done} done; ${share.toFixed(0)} % of the pool holds tokens.`;
    });
  }

  tallest() {
    return 0;
  }
}

export function drawFragmentation(film, i, stage) {
  const { num_slots, policies } = film.document;
  const rows = policies.map((policy) => {
    const pool = film.frames[i].pools[policy];
    const bar = element("div", { class: "tp-memory", "data-policy": policy });
    for (const [name, start, held, final, asked, size] of pool.runs) {
      const edges = [0, held, final, asked, size];
      const run = element("div", { class: "tp-run", "data-run": name, "data-held": held, style: place(start, size, num_slots) });
      for (let part = 0; part < 4; part++) {
        const width = edges[part + 1] - edges[part];
        if (width > 0) run.append(element("span", { class: `tp-part tp-s${part}`, style: { flex: String(width) } }, part === 0 ? name : ""));
      }
      bar.append(run);
    }
    const share = Math.round((100 * pool.account[0]) / num_slots);
    const waiting = pool.waiting.length ? `waiting: ${pool.waiting.join(" ")}` : "none waits";
    return element(
      "div",
      { class: "tp-policy" },
      element("div", { class: "tp-title" }, NAMES[policy] ?? policy),
      bar,
      element("div", { class: "tp-soft" }, `${share} % holds tokens; ${pool.runs.length} run, ${pool.done} done, ${waiting}`),
    );
  });
  const legend = STATE_NAMES.slice(0, 4).map((name, part) =>
    element("span", { class: "tp-legend" }, element("span", { class: `tp-part tp-s${part}` }), name),
  );
  const step = element("span", { class: "tp-step" }, `Step ${film.step(i)} of ${film.length}`);
  stage.replaceChildren(step, ...rows, element("div", { class: "tp-legends" }, ...legend));
}

function place(start, size, total) {
  return { left: `${(100 * start) / total}%`, width: `${(100 * size) / total}%` };
}
