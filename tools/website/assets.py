"""What the playground needs from elsewhere, brought in while the site is built and never committed.

    pyodide (npm)                                     Python for the browser: four files, 14 MB
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
import tarfile
import zipfile
from pathlib import Path

from course import ROOT

KEPT = ROOT / "build" / "site"
PYODIDE = "314.0.7"
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
    "minipaged/engine/scheduler.py",
    "minipaged/engine/scheduler_output.py",
    "minipaged/engine/sequence.py",
    "minipaged/engine/beam_scheduler.py",
    "minipaged/simulator/*.py",
    "minipaged/viz/*.py",
    "minipaged/course/*.py",
    "tests/by_chapter.py",
    "tests/conftest.py",
    "tests/memory_model.py",
    "tests/test_ch06_block_table.py",
)


def pyodide() -> dict[str, Path] | str:
    """Name -> file of the runtime, or the sentence that says why it is not there."""
    return from_npm("pyodide", PYODIDE, RUNTIME)


def from_npm(package: str, version: str, names: tuple[str, ...]) -> dict[str, Path] | str:
    """Files of an npm package, by name, or the sentence that says why they are not there. No package is run."""
    folder = KEPT / f"{package}-{version}"
    if not all((folder / name).is_file() for name in names):
        npm = shutil.which("npm")
        if npm is None:
            return f"npm is not on this machine, and brings {package}"
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [npm, "pack", f"{package}@{version}", "--silent"], cwd=folder, capture_output=True, text=True, check=False
        )
        packed = folder / f"{package}-{version}.tgz"
        if done.returncode or not packed.is_file():
            return (
                f"npm could not bring {package} {version}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        with tarfile.open(packed) as archive:
            for name in names:
                member = archive.extractfile(f"package/{name}")
                assert member is not None, f"{package} {version} has no {name}"
                (folder / name).write_bytes(member.read())
        packed.unlink()
    return {name: folder / name for name in names}


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
    runtime, libraries, archive = pyodide(), wheels(), ours()
    problem = next((each for each in (runtime, libraries) if isinstance(each, str)), "")
    if isinstance(runtime, str) or isinstance(libraries, str):
        return {}, problem
    files: dict[str, Path | bytes] = {f"playground/runtime/{name}": path for name, path in runtime.items()}
    files |= {f"playground/wheels/{path.name}": path for path in libraries}
    files["playground/minipaged.zip"] = archive
    manifest = {
        "pyodide": PYODIDE,
        "wheels": [path.name for path in libraries],
        "modules": hashlib.sha256(archive).hexdigest()[:16],
        "editable": {
            name: (ROOT / "minipaged" / "memory" / name).read_text(encoding="utf-8")
            for name in ("block_allocator.py", "block_table.py")
        },
    }
    files["playground/manifest.json"] = json.dumps(manifest, ensure_ascii=True).encode()
    return files, ""
