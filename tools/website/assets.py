"""What the site needs from elsewhere, brought in while it is built and never committed.

    pyodide, CodeMirror (npm)                         Python for the browser, four files, 14 MB; and an editor
    hypothesis, pytest and what they need (PyPI)      pure-Python wheels, unpacked in the browser
    minipaged.zip (here)                              our own plain-Python modules and the suite of chapter 6

Without npm the site builds all the same, and its Playground says that it cannot run. Files are kept in build/site.
"""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from course import ROOT

sys.path.insert(0, str(ROOT / "docs" / "playground"))
from playground import run

KEPT = ROOT / "build" / "site"
NPM = {
    "pyodide": "314.0.7",
    "codemirror": "6.0.2",
    "@codemirror/lang-python": "6.2.1",
    "esbuild": "0.28.2",
    "axe-core": "4.14.1",  # for the tests
}
RUNTIME = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
# Hypothesis has had a compiled part since 6.156; the last wheel of Python alone runs in the browser.
WHEELS = (
    "hypothesis==6.155.7",
    "attrs==26.1.0",
    "sortedcontainers==2.4.0",
    "pytest==9.2.0",
    "pluggy==1.7.0",
    "iniconfig==2.3.1",
    "packaging==26.3",
    "pygments==2.21.0",
)
# What runs in the browser: no torch, no NumPy, no typer.
OURS = (
    "pyproject.toml",
    "minipaged/__init__.py",
    "minipaged/cdiv.py",
    "minipaged/memory/*.py",
    "minipaged/engine/__init__.py",
    "minipaged/engine/arguments.py",
    "minipaged/engine/beam_scheduler.py",
    "minipaged/engine/scheduler.py",
    "minipaged/engine/scheduler_output.py",
    "minipaged/engine/sequence.py",
    "minipaged/simulator/*.py",
    "minipaged/viz/*.py",
    "minipaged/course/*.py",
    "tests/by_chapter.py",
    "tests/conftest.py",
    "tests/memory_model.py",
    "tests/operations.py",
    "tests/test_ch06_block_table.py",
)


def from_npm() -> Path | str:
    """The folder of npm's packages, or the sentence that says why they are not there. No package's script is run."""
    folder, wanted = KEPT / "npm", [f"{name}@{version}" for name, version in NPM.items()]
    mark = folder / "complete"
    if not mark.is_file() or mark.read_text() != "\n".join(wanted):
        npm = shutil.which("npm")
        if npm is None:
            return "npm is not on this machine, and brings Python for the browser"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [npm, "install", "--no-save", "--ignore-scripts", "--no-audit", "--silent", *wanted]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"npm could not bring {', '.join(wanted)}: {said}"
        mark.write_text("\n".join(wanted))
    return folder / "node_modules"


def editor(packages: Path) -> bytes:
    """CodeMirror with what we set, as one file."""
    source = (Path(__file__).parent / "editor.js").read_bytes()
    command = [packages / ".bin" / "esbuild", "--bundle", "--minify", "--format=esm"]
    return subprocess.run(command, cwd=packages.parent, input=source, capture_output=True, check=True).stdout


def wheels() -> list[Path] | str:
    """The pure-Python wheels, or why they are not there."""
    folder = KEPT / "wheels"
    mark = folder / "complete"
    if not mark.is_file() or mark.read_text() != "\n".join(WHEELS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        anywhere = ["--only-binary", ":all:", "--platform", "any", "--python-version", "3.14", "--abi", "none"]
        done = subprocess.run(
            [*pip, *anywhere, "--implementation", "py", "-d", str(folder), *WHEELS],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return f"pip could not bring the wheels: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
        mark.write_text("\n".join(WHEELS))
    return sorted(folder.glob("*.whl"))


def ours() -> bytes:
    """Our own modules as a zip. The same sources give the same bytes."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted({path for pattern in OURS for path in ROOT.glob(pattern)}):
            name = zipfile.ZipInfo(path.relative_to(ROOT).as_posix(), (1980, 1, 1, 0, 0, 0))
            name.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(name, path.read_bytes())
    return sink.getvalue()


def playground() -> tuple[dict[str, Path | bytes], str]:
    """(path in the site -> file or bytes, why it cannot run or "")."""
    packages, libraries, archive = from_npm(), wheels(), ours()
    if isinstance(packages, str) or isinstance(libraries, str):
        return {}, next(each for each in (packages, libraries) if isinstance(each, str))
    files: dict[str, Path | bytes] = {f"playground/runtime/{name}": packages / "pyodide" / name for name in RUNTIME}
    files |= {f"playground/wheels/{path.name}": path for path in libraries}
    files |= {"playground/minipaged.zip": archive, "playground/editor.js": editor(packages)}
    manifest = {
        "pyodide": NPM["pyodide"],
        "wheels": [path.name for path in libraries],
        "modules": hashlib.sha256(archive).hexdigest()[:16],
        "editable": {
            name: (ROOT / "minipaged" / "memory" / name).read_text(encoding="utf-8")
            for name in ("block_allocator.py", "block_table.py")
        },
    }
    files["playground/manifest.json"] = json.dumps(manifest, ensure_ascii=True).encode()
    return files, ""


def examples() -> dict[str, str]:
    """The playground's examples, as they were run now: they play before Python is there."""
    found = json.loads((ROOT / "docs" / "playground" / "examples.json").read_text(encoding="utf-8"))
    return {f"playground/example{number}.json": run(settings) for number, settings in enumerate(found)}
