// Figure 3. One contiguous run a request, reserved when it arrives: a recorded run of the reservation pool of chapter 4.

import { choice, controls, count, element, legend, range, stage, words } from "./parts.js";

const POLICIES = [["max", "the longest"], ["pow2", "a power of two"], ["oracle", "the exact length"]];
const PARTS = ["held", "reserved", "over", "rounding"];

export async function reservations(place) {
  const answer = await fetch(new URL("../traces/fragmentation.json", import.meta.url));
  const film = await answer.json();
  let [policy, frame] = ["max", 24];
  const memory = element("div", { class: "fig-memory" });
  const shares = element("div", { class: "fig-track" });
  const said = words();

  function draw() {
    const pool = film.frames[frame].pools[policy];
    const runs = pool.runs.map(([name, start, held, final, asked, size]) => {
      const edges = [0, held, final, asked, size];
      const pieces = PARTS.map((part, i) => [part, edges[i + 1] - edges[i]]).filter(([, length]) => length > 0);
      const inside = pieces.map(([part, length]) =>
        element("span", { class: `fig-part fig-${part}`, style: { flex: `${length} 0 0` } }, part === "held" ? name : ""),
      );
      const at = { left: `${(100 * start) / film.num_slots}%`, width: `${(100 * size) / film.num_slots}%` };
      return element("div", { class: "fig-run", "data-run": name, style: at }, ...inside);
    });
    memory.replaceChildren(...runs);
    const [held, reserved, over, rounding, external, free] = pool.account;
    const parts = [["held", held], ["reserved", reserved], ["over", over], ["rounding", rounding], ["external", external], ["", free]];
    shares.replaceChildren(
      ...parts.map(([part, slots]) => element("span", { class: `fig-part fig-${part}`, style: { flex: `${slots} 0 0` } })),
    );
    const queue = pool.waiting.length ? `${count(pool.waiting.length, "request")} waiting (${pool.waiting.join(" ")})` : "none waiting";
    const waste = external ? ` ${count(external, "free slot")} cannot be used: no piece is large enough for ${pool.waiting[0]}.` : "";
    said.textContent =
      `${count(pool.runs.length, "request")} running, ${queue}, ${pool.done} finished. ${held} of ${film.num_slots} slots ` +
      `(${Math.round((100 * held) / film.num_slots)} %) hold a token; ${reserved} will be filled later; ` +
      `${over + rounding} never.${waste}`;
    place.dataset.account = pool.account.join(" ");
  }

  place.replaceChildren(
    controls(
      choice("Reserve", POLICIES, policy, (value) => { policy = value; draw(); }),
      range("Step", { min: 0, max: film.frames.length - 1, value: frame }, (n) => `${n + 1} of ${film.frames.length}`, (n) => { frame = n; draw(); }),
    ),
    stage(
      element("p", { class: "fig-head" }, "64 slots, and who has them"),
      memory,
      element("p", { class: "fig-head" }, "The same slots, sorted by what they hold"),
      shares,
    ),
    legend(
      ["fig-held", "holds a token"],
      ["fig-reserved", "reserved: filled later"],
      ["fig-over", "internal: never filled"],
      ["fig-rounding", "internal: only rounded up to"],
      ["fig-external", "external: free, in pieces too small"],
    ),
    said,
  );
  draw();
}
