"""Notebooks as pages: run by the build, kept by the hash of all that they depend on, and turned into Markdown.

    tutorials/06_block_table.ipynb  ---run--->  build/site/notebooks/06_block_table-<hash>.ipynb  --->  Markdown

The hash is over the notebook and over every module of ours that it imports, directly or through another. So an
unchanged notebook is not run again, and one whose code changed is: what a page shows is what the code does now.
"""

import ast
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from course import ROOT, fenced, folded
from run_notebooks import run

KEPT = ROOT / "build" / "site" / "notebooks"
SECONDS = 240.0  # for one notebook while the site is built; `make notebooks` holds them to less


def executed(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """The notebooks with their outputs. Runs what is not kept, two at a time. Raises RuntimeError if one fails."""
    kept = {path: KEPT / f"{path.stem}-{fingerprint(path)}.ipynb" for path in paths}
    if os.environ.get("MINIPAGED_NOTEBOOKS") == "kept":  # while one writes pages: what ran last, if it is old or not
        kept = {path: next(iter(KEPT.glob(f"{path.stem}-*.ipynb")), target) for path, target in kept.items()}
    missing = [path for path, target in kept.items() if not target.exists()]
    if missing:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        print(f"running {len(missing)} of {len(kept)} notebooks", flush=True)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_run, missing, [kept[path] for path in missing]))
    return {path: json.loads(target.read_text(encoding="utf-8")) for path, target in kept.items()}


def _run(path: Path, target: Path) -> None:
    folder = KEPT / f"running-{path.stem}"
    _, seconds, problem = run(path, SECONDS, folder)
    print(f"  {path.name:<34}{seconds:6.1f} s", flush=True)
    if problem:
        raise RuntimeError(f"{path.name}: {problem}")
    for old in KEPT.glob(f"{path.stem}-*.ipynb"):
        old.unlink()
    (folder / path.name).replace(target)
    folder.rmdir()


def fingerprint(path: Path) -> str:
    """16 hex digits over the notebook and the modules of ours that it reaches."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [_without_magics("".join(c["source"])) for c in notebook["cells"] if c["cell_type"] == "code"]
    found: set[Path] = set()
    waiting = [file for cell in code for file in _imports(cell, None)]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imports(file.read_text(encoding="utf-8"), file)
    digest = hashlib.sha256(path.read_bytes())
    for file in sorted(found):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _without_magics(cell: str) -> str:
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in cell.splitlines())


def _imports(source: str, file: Path | None) -> list[Path]:
    """The files of ours that a piece of Python imports, wherever in it the import stands."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell that shows what is no Python
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [found for name in names if (found := _file_of(name)) is not None]


def _file_of(module: str) -> Path | None:
    parts = module.split(".")
    if (ROOT / "tests" / "conformance" / f"{module}.py").is_file():  # chapter 14's: the notebook puts them on its path
        return ROOT / "tests" / "conformance" / f"{module}.py"
    if parts[:2] == ["minipaged", "kernels"]:
        parts = parts[1:]
    if parts[0] not in ("minipaged", "kernels"):
        return None
    path = ROOT.joinpath(*parts)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


# ---- Markdown --------------------------------------------------------------


def to_markdown(cell: dict[str, Any]) -> str:
    """A cell and its outputs as Markdown. Text is kept as it is; HTML that a cell displayed is kept as HTML.

    The tag `hide-input` folds the code of a cell that only draws, and `remove-cell` leaves a cell out (the names are
    Jupyter Book's).
    """
    source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
    if "remove-cell" in tags or not source.strip():
        return ""
    if cell["cell_type"] == "markdown":  # answers fold by <details>: Markdown inside of it is asked for
        return link_chapters(source.replace("<details>", '<details markdown="1">'))
    code = fenced(source, "python")
    shown = folded("How it is drawn", code, "code") if "hide-input" in tags else code
    outputs = "".join(_output(output) for output in cell["outputs"])
    return f'{shown}\n<div class="nb-out" data-search-exclude>{outputs}</div>' if outputs else shown


def link_chapters(source: str, folder: str = "") -> str:
    """ "chapter 6" in running text links to it; headings, code, formulas and links stay as they are."""
    lines, in_code = [], False
    for line in source.splitlines():
        in_code ^= line.lstrip().startswith("```")
        if not in_code and not line.startswith(("#", "    ")):
            pieces = re.split(r"(`[^`]*`|\$[^$]*\$|\[[^\]]*\]\([^)]*\))", line)
            pieces[::2] = [
                re.sub(r"\b[Cc]hapters? (1[0-4]|[1-9])\b", lambda m: f"[{m[0]}]({folder}ch{int(m[1]):02d}.md)", piece)
                for piece in pieces[::2]
            ]
            line = "".join(pieces)
        lines.append(line)
    return "\n".join(lines)


def _output(output: dict[str, Any]) -> str:
    """An output as one line, so that no blank line ends the block of HTML for Markdown. A keyboard can scroll it."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            return f'<div class="nb-html" tabindex="0">{one_block("".join(data[kind]))}</div>'
    text = html.escape("".join(data.get("text/plain", "")).rstrip().expandtabs())
    return f'<pre class="nb-text" tabindex="0">{text.replace(chr(10), "&#10;")}</pre>' if text.strip() else ""


def one_block(text: str) -> str:
    """HTML with no line break: where the break means something (pre), it is written as a character reference."""
    text = re.sub(r"<pre.*?</pre>", lambda m: m[0].replace("\n", "&#10;"), text, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", " ", text)
