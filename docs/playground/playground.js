// The page of the playground: two forms, and a worker that runs Python for them (worker.js, playground.py).

import { element } from "../player/dom.js";

const place = document.querySelector("#pg");
const status = place.querySelector("#pg-status");
const read = (name) => fetch(new URL(name, import.meta.url)).then((answer) => answer.json());

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

// Run one action with its button disabled. What goes wrong is said in one line.
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

// An example is played at once, as this site's build recorded it: the button runs what the form says.
const film = place.querySelector("#pg-film");
const examples = form.elements.example;
read("./examples.json").then((found) => {
  const show = async () => {
    fill(found[examples.selectedIndex]);
    await customElements.whenDefined("trace-player"); // the player is another module, and may come later
    await film.open(new URL(`./example${examples.selectedIndex}.json`, import.meta.url));
    if (!film.film) return; // it could not be loaded, and says so
    film.go(film.film.length >> 1);
    film.isPoster = true;
  };
  examples.append(...found.map((example) => element("option", {}, example.name)));
  examples.addEventListener("change", show);
  show();
});
form.querySelector("#pg-add").addEventListener("click", () => {
  list.append(requestRow({ prompt: "Once upon a time", max_tokens: 6, n: 1, arrives: 0 }));
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(form.querySelector("[type=submit]"), async () => {
    const document = await ask({ act: "run", settings: settingsOf() });
    film.load(document);
    film.document = document; // for the page's own tests
    say(`Done: ${document.events.length} events.`);
  });
});
// ---- edit and check ----------------------------------------------------------------------------------------------

const editor = place.querySelector("#pg-check");
const area = editor.querySelector("textarea"); // the source; where there is no editor (editor.js), it is written here
const result = place.querySelector("#pg-result");
let sources = {};
let edited = null;

editor.write = (source) => {
  area.value = source;
  edited?.write(source);
};

// A site that was built without npm has no Python to run, and its page says so instead of this form.
if (!document.querySelector(".pg-missing").textContent.trim()) {
  read("./manifest.json")
    .then(async (manifest) => {
      sources = manifest.editable;
      const { open } = await import("./editor.js");
      edited = open(area);
      if (!(await readLink())) showSource();
    })
    .catch((error) => say(`The source could not be loaded: ${error.message}`, true));
}

function showSource() {
  editor.write(sources[editor.elements.file.value] ?? "");
}

editor.elements.file.addEventListener("change", showSource);
editor.querySelector("#pg-reset").addEventListener("click", showSource);
editor.addEventListener("submit", (event) => {
  event.preventDefault();
  busy(editor.querySelector("[type=submit]"), async () => {
    stop(); // a Python process grades once: the next check begins with a fresh one
    const graded = await ask({ act: "check", file: editor.elements.file.value, source: area.value });
    stop();
    showGrade(graded);
  });
});

// A link that carries the code: #block_table.py=..., the source compressed, in base64 for addresses.
async function piped(bytes, through) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(through)).arrayBuffer());
}

editor.querySelector("#pg-link").addEventListener("click", async () => {
  const packed = await piped(new TextEncoder().encode(area.value), new CompressionStream("deflate-raw"));
  const text = btoa(String.fromCharCode(...packed)).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  history.replaceState(null, "", `#${editor.elements.file.value}=${text}`);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(copied ? "The link is copied: it carries the code as it is now." : "The address of this page carries the code now.");
});

async function readLink() {
  const [, file, text] = location.hash.match(/^#(\w+\.py)=([\w-]+)$/) ?? [];
  if (!(file in sources)) return false;
  const packed = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (sign) => sign.charCodeAt(0));
  editor.elements.file.value = file;
  editor.write(new TextDecoder().decode(await piped(packed, new DecompressionStream("deflate-raw"))));
  editor.scrollIntoView();
  return true;
}

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
  const { property, about, message, error } = graded.first;
  const said = message.split("\n")[0];
  result.append(
    element("p", {}, element("strong", {}, property), about ? ` (${about})` : ""),
    element("pre", {}, error === "AssertionError" ? said : `${error}: ${said}`),
  );
  if (graded.script.length) {
    result.append(element("p", {}, "The smallest script that shows it:"), element("pre", { class: "pg-script" }, graded.script.join("\n")));
  }
  if (graded.film) film.load(graded.film, -1);
}
