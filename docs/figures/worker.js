// Python beside the page: minipaged/simulator/side_by_side.py in Pyodide, in a worker, out of this site's own folders.
//
//   page -> {id, settings}        page <- {id, status: "..."}, then {id, film} or {id, error}

import { loadPyodide } from "../playground/runtime/pyodide.mjs";

const here = (path) => new URL(path, import.meta.url).href;
const HOME = "/home/pyodide/minipaged";
let ready = null;

async function prepare() {
  const python = await loadPyodide({ indexURL: here("../playground/runtime/") });
  const answer = await fetch(here("../playground/minipaged.zip"));
  if (!answer.ok) throw new Error(`minipaged.zip: ${answer.status} ${answer.statusText}`);
  python.unpackArchive(await answer.arrayBuffer(), "zip", { extractDir: HOME });
  python.runPython(`import sys; sys.path.insert(0, "${HOME}")`);
  return python.runPython(`
import json
from minipaged.simulator.side_by_side import film
lambda settings: json.dumps(film(**settings.to_py()))
`);
}

addEventListener("message", async ({ data: { id, settings } }) => {
  try {
    if (!ready) postMessage({ id, status: "Loading Python (14 MB, once)" });
    const run = await (ready ??= prepare()).catch((error) => {
      ready = null; // the next question tries again
      throw error;
    });
    postMessage({ id, status: "Serving the requests, twice" });
    postMessage({ id, film: JSON.parse(run(settings)) });
  } catch (error) {
    const line = String(error.message ?? error).trim().split("\n").at(-1); // Python's traceback ends with what matters
    postMessage({ id, error: line.replace(/^\w*Error: /, "") });
  }
});
