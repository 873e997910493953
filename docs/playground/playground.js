// The page of the playground: two forms, and a worker that runs Python for them (worker.js, playground.py).

import { element } from "../player/dom.js";

const place = document.querySelector("#pg");
const status = place.querySelector("#pg-status");
const EXAMPLES = {
  "two requests": {
    requests: [
      { prompt: "Four score and seven years ago our", max_tokens: 6, n: 1, arrives: 0 },
      { prompt: "It was the best of", max_tokens: 8, n: 1, arrives: 1 },
    ],
    num_blocks: 12, block_size: 4, num_host_blocks: 6, preemption: "recompute", prefix_caching: false,
    max_num_batched_tokens: 64, max_num_seqs: 8,
  },
  "three samples of one prompt": {
    requests: [{ prompt: "The moon is a place where", max_tokens: 6, n: 3, arrives: 0 }],
    num_blocks: 14, block_size: 4, num_host_blocks: 6, preemption: "recompute", prefix_caching: false,
    max_num_batched_tokens: 64, max_num_seqs: 8,
  },
  "a shared beginning": {
    requests: [
      { prompt: "You are a kind poet. Sing of the rain", max_tokens: 3, n: 1, arrives: 0 },
      { prompt: "You are a kind poet. Sing of the snow", max_tokens: 5, n: 1, arrives: 2 },
      { prompt: "You are a kind poet. Say nothing at all", max_tokens: 5, n: 1, arrives: 5 },
    ],
    num_blocks: 14, block_size: 4, num_host_blocks: 6, preemption: "recompute", prefix_caching: true,
    max_num_batched_tokens: 64, max_num_seqs: 8,
  },
  "a pool that is too small": {
    requests: [
      { prompt: "Four score and seven years ago our", max_tokens: 9, n: 1, arrives: 0 },
      { prompt: "It was the best of", max_tokens: 9, n: 1, arrives: 0 },
    ],
    num_blocks: 5, block_size: 4, num_host_blocks: 6, preemption: "swap", prefix_caching: false,
    max_num_batched_tokens: 64, max_num_seqs: 8,
  },
};

// ---- the worker --------------------------------------------------------------------------------------------------

let worker = null;
let asked = 0;
const waiting = new Map();

function start() {
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }) => {
    if (data.status) return say(data.status);
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error !== undefined) reject(new Error(data.error));
    else resolve(data.result);
  });
  worker.addEventListener("error", (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || "Python could not be loaded"));
    waiting.clear();
    worker = null;
  });
}

function stop() {
  worker?.terminate();
  worker = null;
  for (const { reject } of waiting.values()) reject(new Error("stopped"));
  waiting.clear();
}

function ask(message) {
  if (!worker) start();
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, ...message });
  });
}

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("pg-error", isError);
}

// Run one action with its button disabled. Whatever goes wrong is said in one line.
async function busy(button, act) {
  button.disabled = true;
  place.querySelector("#pg-stop").hidden = false;
  try {
    await act();
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
    place.querySelector("#pg-stop").hidden = true;
  }
}

// ---- run requests ------------------------------------------------------------------------------------------------

const form = place.querySelector("#pg-run");
const list = form.querySelector("#pg-requests");
const NUMBERS = ["num_blocks", "block_size", "num_host_blocks", "max_num_batched_tokens", "max_num_seqs"];

function requestRow(request) {
  const number = (name, label, least, most) =>
    element("label", {}, label, element("input", { type: "number", name, min: least, max: most, value: request[name], required: true }));
  const remove = element("button", { type: "button", "aria-label": "Remove this request", title: "Remove" }, "×");
  const row = element(
    "div",
    { class: "pg-request" },
    element("label", { class: "pg-prompt" }, "prompt", element("input", { type: "text", name: "prompt", value: request.prompt, required: true })),
    number("max_tokens", "new tokens", 1, 64),
    number("n", "samples", 1, 8),
    number("arrives", "arrives at", 0, 100),
    remove,
  );
  remove.addEventListener("click", () => row.remove());
  return row;
}

function fill(settings) {
  list.replaceChildren(...settings.requests.map(requestRow));
  for (const name of NUMBERS) form.elements[name].value = settings[name];
  form.elements.preemption.value = settings.preemption;
  form.elements.prefix_caching.checked = settings.prefix_caching;
}

export function settingsOf() {
  const requests = [...list.children].map((row) => {
    const value = (name) => row.querySelector(`[name=${name}]`).value;
    return { prompt: value("prompt"), max_tokens: Number(value("max_tokens")), n: Number(value("n")), arrives: Number(value("arrives")) };
  });
  const numbers = Object.fromEntries(NUMBERS.map((name) => [name, Number(form.elements[name].value)]));
  return { requests, ...numbers, preemption: form.elements.preemption.value, prefix_caching: form.elements.prefix_caching.checked };
}

const examples = form.elements.example;
examples.append(...Object.keys(EXAMPLES).map((name) => element("option", {}, name)));
examples.addEventListener("change", () => fill(EXAMPLES[examples.value]));
form.querySelector("#pg-add").addEventListener("click", () => {
  list.append(requestRow({ prompt: "Once upon a time", max_tokens: 6, n: 1, arrives: 0 }));
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(form.querySelector("[type=submit]"), async () => {
    const document = await ask({ act: "run", settings: settingsOf() });
    const player = place.querySelector("#pg-film");
    player.load(document);
    player.document = document; // for whoever looks: the page's own tests
    say(`Done: ${document.events.length} events.`);
  });
});
fill(EXAMPLES["two requests"]);

// ---- edit and check ----------------------------------------------------------------------------------------------

const editor = place.querySelector("#pg-check");
const area = editor.querySelector("textarea");
const result = place.querySelector("#pg-result");
let sources = {};

// A site that was built without npm has no Python to run, and its page says so instead of this form.
const missing = document.querySelector(".pg-missing").textContent.trim();
(missing ? Promise.resolve({ editable: {} }) : fetch(new URL("./manifest.json", import.meta.url)).then((answer) => answer.json()))
  .then((manifest) => {
    sources = manifest.editable;
    showSource();
  })
  .catch((error) => say(`The source could not be loaded: ${error.message}`, true));

function showSource() {
  area.value = sources[editor.elements.file.value] ?? "";
}

editor.elements.file.addEventListener("change", showSource);
editor.querySelector("#pg-reset").addEventListener("click", showSource);
area.addEventListener("keydown", (event) => {
  // Tab indents, as in an editor; Escape and then Tab leaves the field, so that a keyboard is not caught in it.
  if (event.key === "Escape") area.dataset.leaving = "1";
  else if (event.key === "Tab" && !event.shiftKey && !area.dataset.leaving) {
    event.preventDefault();
    area.setRangeText("    ", area.selectionStart, area.selectionEnd, "end");
  } else delete area.dataset.leaving;
});
editor.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(editor.querySelector("[type=submit]"), async () => {
    stop(); // a Python process grades once: the next check begins with a fresh one
    const graded = await ask({ act: "check", file: editor.elements.file.value, source: area.value });
    stop();
    showGrade(graded);
  });
});
place.querySelector("#pg-stop").addEventListener("click", stop);

function showGrade(graded) {
  const film = place.querySelector("#pg-counterexample");
  result.replaceChildren();
  result.dataset.wrong = graded.wrong;
  film.hidden = !graded.film;
  if (graded.errors.length) {
    say("The module could not be imported.", true);
    result.append(element("p", {}, graded.errors.join(" ")));
    return;
  }
  if (!graded.wrong) {
    say(`Right: all ${graded.holds} properties hold.`);
    return;
  }
  const before = graded.holds === 1 ? "1 property that holds" : `${graded.holds} properties that hold`;
  say(graded.holds ? `Caught, after ${before}.` : "Caught by the first property that was tried.", true);
  const { property, about, message } = graded.first;
  result.append(
    element("p", {}, element("strong", {}, property), about ? ` (${about})` : ""),
    element("pre", {}, message.split("\n")[0]),
  );
  if (graded.film) film.load(graded.film, -1);
}
