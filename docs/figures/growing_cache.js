// Figure 2. The cache grows by one column of K and V a token, and a GPU has room for so many.

import { button, bytes, controls, count, element, legend, range, stage, words } from "./parts.js";

const TOKEN = 2 * 40 * 5120 * 2; // bytes of OPT-13B: K and V, 40 layers, 5,120 numbers wide, 2 bytes a number
const ROOM = 12 * 2 ** 30; // the PagedAttention paper, Table 1: what is left for K and V beside 26 GB of weights
const MOST = 2048; // tokens of a request
const GPU = 40e9;

export function growingCache(place) {
  let [tokens, requests, writing] = [300, 8, null];
  const one = element("div", { class: "fig-track" });
  const all = element("div", { class: "fig-track" });
  const said = words();

  function draw() {
    const need = requests * tokens * TOKEN;
    const fit = Math.floor(ROOM / (tokens * TOKEN));
    const labels = [bytes(tokens * TOKEN), ""]; // beside the tokens while there is no room in them
    if (tokens < MOST / 4) labels.reverse();
    one.replaceChildren(part("fig-read", tokens / MOST, labels[0]), part("", 1 - tokens / MOST, labels[1]));
    const shown = Math.min(need, ROOM);
    const cells = Array.from({ length: Math.min(requests, fit) }, () => part("fig-read", (tokens * TOKEN) / GPU, ""));
    const rest = Math.max(0, shown - cells.length * tokens * TOKEN);
    all.replaceChildren(
      part("fig-weights", 26e9 / GPU, "weights"),
      ...cells,
      part(need > ROOM ? "fig-wrong" : "", rest / GPU, ""),
      part("", (ROOM - shown) / GPU, ""),
    );
    const sum = `${count(requests, "request")} of ${count(tokens, "token")}: ${requests} × ${tokens.toLocaleString("en")} × 800 KiB = ${bytes(need)}.`;
    const verdict = need <= ROOM ? ` It fits in the 12 GiB; ${fit} such requests would.` : ` Only ${fit} of them fit in the 12 GiB.`;
    said.textContent = sum + verdict;
    place.dataset.bytes = need;
    place.dataset.fit = fit;
  }

  const length = range("Tokens of a request", { min: 1, max: MOST, value: tokens }, (n) => n.toLocaleString("en"), (n) => { tokens = n; draw(); });
  const crowd = range("Requests", { min: 1, max: 64, value: requests }, String, (n) => { requests = n; draw(); });
  const write = button("Write", () => (writing ? stop() : start()));

  function start() {
    if (tokens === MOST) tokens = 0;
    write.textContent = "Stop";
    writing = setInterval(() => {
      tokens = Math.min(MOST, tokens + 8);
      length.set(tokens);
      draw();
      if (tokens === MOST) stop();
    }, 60);
  }

  function stop() {
    clearInterval(writing);
    writing = null;
    write.textContent = "Write";
  }

  place.replaceChildren(
    controls(length, write, crowd),
    stage(
      element("p", { class: "fig-head" }, "K and V of one request, of at most 2,048 tokens"),
      one,
      element("p", { class: "fig-head" }, "A GPU of 40 GB: the weights of OPT-13B, and all requests"),
      all,
    ),
    legend(["fig-read", "K and V"], ["fig-weights", "weights, 26 GB"], ["fig-wrong", "does not fit"]),
    said,
  );
  draw();
}

function part(kind, share, label) {
  return element("span", { class: `fig-part ${kind}`, style: { flex: `${share} 0 0` } }, label);
}
