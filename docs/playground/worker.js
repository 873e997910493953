// Python beside the page: Pyodide in a worker, so that the page stays alive while the scheduler runs or Hypothesis
// searches. Everything comes from this site's own folder.
//
//   page -> {id, act: "run", settings}  or  {id, act: "check", file, source}
//   page <- {id, result}  or  {id, error}, and before that {status: "..."}

import { loadPyodide } from "./runtime/pyodide.mjs";

const here = (path) => new URL(path, import.meta.url).href;
const HOME = "/home/pyodide/minipaged";
const ready = prepare();
let wheels = null;

async function prepare() {
  postMessage({ status: "Loading Python (14 MB, once)" });
  const python = await loadPyodide({ indexURL: here("./runtime/") });
  postMessage({ status: "Loading minipaged" });
  python.unpackArchive(await bytes("./minipaged.zip"), "zip", { extractDir: HOME });
  python.FS.writeFile(`${HOME}/playground.py`, new Uint8Array(await bytes("./playground.py")));
  python.runPython(`import sys; sys.path.insert(0, "${HOME}")`);
  return python;
}

// Hypothesis, pytest and what they need: only where something is checked.
async function unpackWheels(python) {
  const manifest = await (await fetch(here("./manifest.json"))).json();
  const site = python.runPython("import site; site.getsitepackages()[0]");
  for (const name of manifest.wheels) {
    python.unpackArchive(await bytes(`./wheels/${name}`), "whl", { extractDir: site });
  }
  python.runPython("import importlib; importlib.invalidate_caches()");
}

async function bytes(path) {
  const answer = await fetch(here(path));
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer.arrayBuffer();
}

addEventListener("message", async ({ data }) => {
  try {
    const python = await ready;
    const playground = python.pyimport("playground");
    let result;
    if (data.act === "run") {
      postMessage({ status: "Running" });
      result = playground.run(python.toPy(data.settings));
    } else {
      postMessage({ status: "Loading Hypothesis" });
      await (wheels ??= unpackWheels(python));
      postMessage({ status: "Trying the properties of chapter 6" });
      result = playground.check(data.file, data.source, HOME);
    }
    postMessage({ id: data.id, result: JSON.parse(result) });
  } catch (error) {
    // Python's traceback ends with the line that matters.
    const line = String(error.message ?? error).trim().split("\n").at(-1);
    postMessage({ id: data.id, error: line.replace(/^\w*Error: /, "") });
  }
});
