// The live page: the feed of /live drawn by the site's player, and a prompt box that is a client like any other.
// Text of users and models is always text: it is set as textContent, and never as HTML.

import { element } from "../player/dom.js";
import "../player/player.js";

const find = (selector) => document.querySelector(selector);
const [player, status, answer] = [find("trace-player"), find("#status"), find("#answer")];
let hold = false;

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

// fetch, with the key; an error of the server is thrown with its own message.
async function ask(url, body) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(url, body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) });
  if (response.status === 401) find("#key").hidden = false;
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

// Server-sent events, read from a fetch, since an EventSource sends no key.
async function* events(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function follow() {
  for (;;) {
    try {
      for await (const message of events(await ask("live"))) {
        if (message.schema) {
          player.load(message, -1);
          find("#model").textContent = message.model;
          find("#steps").hidden = !message.stepping;
          say(message.stepping ? "Connected. The engine waits for its step." : "Connected.");
        } else player.append(message, hold);
        const rows = Object.entries(message.counters).map(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]);
        find("#counters").replaceChildren(...rows.flat());
      }
      say("The server ended the feed.", true);
    } catch (error) {
      say(`No feed: ${error.message}`, true);
    }
    if (!find("#key").hidden) return;
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

find("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", find("#key input").value);
  find("#key").hidden = true;
  follow();
});

find("#ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = { prompt: find("#ask textarea").value, stream: true };
  for (const input of find("#ask").querySelectorAll("input")) body[input.name] = Number(input.value);
  const texts = Array(body.n).fill("");
  answer.textContent = "";
  try {
    for await (const chunk of events(await ask("v1/completions", body))) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
      answer.textContent = body.n === 1 ? texts[0] : texts.map((text, i) => `[${i}] ${text}`).join("\n");
    }
  } catch (error) {
    answer.textContent += `\n(${error.message})`;
  }
});

find("#hold").addEventListener("click", () => {
  hold = !hold;
  find("#hold").setAttribute("aria-pressed", hold);
  if (!hold) player.go(player.film.length - 1);
});

for (const button of document.querySelectorAll("[data-steps]")) {
  const steps = button.dataset.steps === "" ? null : Number(button.dataset.steps);
  button.addEventListener("click", () => ask("live", { steps }).catch((error) => say(error.message, true)));
}

follow();
