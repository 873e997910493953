"""What the site needs from elsewhere, brought in while it is built and never committed.

    pyodide, CodeMirror (npm)                         Python for the browser, four files, 14 MB; and an editor
    hypothesis, pytest and what they need (PyPI)      pure-Python wheels, unpacked in the browser
    minipaged.zip (here)                              our own package and the suite of chapter 6

Without npm the site builds all the same, and its Playground says that it cannot run. Files are kept in build/site.
"""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from course import ROOT, found
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
# The browser imports of it what needs no torch, no NumPy and no typer.
OURS = (
    "pyproject.toml",
    "minipaged/**/*.py",
    "tests/by_chapter.py",
    "tests/conftest.py",
    "tests/memory_model.py",
    "tests/operations.py",
    "tests/test_ch06_block_table.py",
)


def brought(folder: Path, wanted: Sequence[str], command: Sequence[str]) -> None:
    """Fill a folder by a command that is given what is wanted, once. Raises RuntimeError with why it cannot."""
    mark = folder / "complete"
    if mark.is_file() and mark.read_text() == "\n".join(wanted):
        return
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not on this machine, and brings Python for the browser")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done = subprocess.run([*command, *wanted], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise RuntimeError(f"{Path(command[0]).name} could not bring {', '.join(wanted)}: {said}")
    mark.write_text("\n".join(wanted))


def from_npm() -> Path:
    """The folder of npm's packages. No package's script is run."""
    wanted = [f"{name}@{version}" for name, version in NPM.items()]
    brought(KEPT / "npm", wanted, ["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--silent"])
    return KEPT / "npm" / "node_modules"


def wheels() -> list[Path]:
    """The pure-Python wheels."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    anywhere = ["--only-binary", ":all:", "--platform", "any", "--python-version", "3.14", "--abi", "none"]
    brought(KEPT / "wheels", WHEELS, [*pip, *anywhere, "--implementation", "py"])
    return sorted((KEPT / "wheels").glob("*.whl"))


def editor(packages: Path) -> bytes:
    """CodeMirror with what we set, as one file."""
    source = (Path(__file__).parent / "editor.js").read_bytes()
    command = [packages / ".bin" / "esbuild", "--bundle", "--minify", "--format=esm"]
    return subprocess.run(command, cwd=packages.parent, input=source, capture_output=True, check=True).stdout


def ours() -> bytes:
    """Our own modules as a zip. The same sources give the same bytes."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(found(OURS)):
            name = zipfile.ZipInfo(path.relative_to(ROOT).as_posix(), (1980, 1, 1, 0, 0, 0))
            archive.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return sink.getvalue()


def playground() -> dict[str, Path | bytes]:
    """Path in the site -> file or bytes. Raises RuntimeError with why the playground cannot run."""
    packages, libraries = from_npm(), wheels()
    manifest = {
        "wheels": [path.name for path in libraries],
        "editable": {
            name: (ROOT / "minipaged" / "memory" / name).read_text(encoding="utf-8")
            for name in ("block_allocator.py", "block_table.py")
        },
    }
    files: dict[str, Path | bytes] = {f"runtime/{name}": packages / "pyodide" / name for name in RUNTIME}
    files |= {f"wheels/{path.name}": path for path in libraries}
    files |= {"minipaged.zip": ours(), "editor.js": editor(packages), "manifest.json": json.dumps(manifest).encode()}
    return {f"playground/{name}": content for name, content in files.items()}


def examples() -> dict[str, str]:
    """The playground's examples, as they were run now: they play before Python is there."""
    settings = json.loads((ROOT / "docs" / "playground" / "examples.json").read_text(encoding="utf-8"))
    return {f"playground/example{number}.json": run(each) for number, each in enumerate(settings)}
