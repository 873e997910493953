"""Run the notebooks from fresh kernels, two at a time, and say what each took. (make notebooks)

    python tutorials/run_notebooks.py                         all of them
    python tutorials/run_notebooks.py 06 07                   those whose names begin so
    python tutorials/run_notebooks.py --keep site/tutorials   and write what ran, with its outputs, into a folder
    python tutorials/run_notebooks.py --strip                 run nothing: take outputs, counts and ids out of the files

A notebook fails where a cell raises, where one writes to stderr (a warning; minipaged's notice that it compiles, which
comes once on a machine, is none), or where it takes longer than allowed.
"""

import json
import os
import re
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer

FOLDER = Path(__file__).parent
NOTICE = re.compile(r"^minipaged: compiling loops .*$", re.MULTILINE)
# The first cell of code: what a notebook needs that stands alone, on Colab for example. The site leaves it out.
SETUP = """\
# Where minipaged is not installed: clone it, install it, and work in the clone.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("minipaged") is None:
    repository = "{repository}"
    subprocess.run(["git", "clone", "-q", "--depth", "1", repository, "minipaged"], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "./minipaged[tutorials]"], check=True)
    os.chdir("minipaged/tutorials")"""
SECONDS = 60.0  # what one notebook may take on two cores (the course's promise)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="beginnings of names: 06 07 (default: all)")] = None,
    keep: Annotated[Path | None, typer.Option(help="write what ran, with outputs, into this folder")] = None,
    jobs: Annotated[int, typer.Option(help="notebooks at once")] = 2,
    limit: Annotated[float, typer.Option(help="seconds that a notebook may take")] = SECONDS,
    strip: Annotated[bool, typer.Option("--strip", help="run nothing, take outputs, counts and ids out")] = False,
) -> None:
    """Run the notebooks, or strip them."""
    every = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    paths = [path for path in every if any(path.name.startswith(name) for name in names)] if names else every
    if not paths:
        print(f"error: no notebook begins with {' or '.join(names or [])}", file=sys.stderr)
        raise typer.Exit(2)
    if jobs < 1 or limit <= 0:
        print(f"error: jobs must be at least 1 and limit above 0, got {jobs} and {limit}", file=sys.stderr)
        raise typer.Exit(2)
    if strip:
        for path in paths:
            stripped(path)
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # two kernels on two cores: one core each
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // jobs)))
    start, total, failed, one_by_one = time.perf_counter(), len(paths), dict[str, str](), 0.0
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run, path, limit, keep) for path in paths]
        for number, done in enumerate(as_completed(runs), start=1):
            path, seconds, problem = done.result()
            print(f"[{number}/{total}] {path.name:<34}{seconds:6.1f} s  {'failed' if problem else 'ran'}", flush=True)
            one_by_one += seconds
            if problem:
                failed[path.name] = problem
    print(f"{total} notebooks in {time.perf_counter() - start:.1f} s, {one_by_one:.1f} s one by one")
    for name, problem in sorted(failed.items()):
        print(f"\n{name}: {problem}", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


def run(path: Path, limit: float, keep: Path | None) -> tuple[Path, float, str | None]:
    """One notebook in a kernel of its own: (path, seconds, what is wrong with it or None)."""
    # Here, so that --strip needs no Jupyter.
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=round(limit),
        coalesce_streams=True,  # what a cell printed in one piece
        resources={"metadata": {"path": FOLDER}},
        extra_arguments=["--log-level=ERROR"],  # of the kernel: it warns of its own port
    )
    start, problem = time.perf_counter(), None
    try:
        client.execute()
    except CellExecutionError as error:
        problem = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without the colours of a terminal
    except (CellTimeoutError, DeadKernelError) as error:
        problem = str(error).strip().splitlines()[0]
    seconds = time.perf_counter() - start
    if problem is None and seconds > limit:
        problem = f"took {seconds:.1f} s, and may take {limit:.0f}"
    problem = problem or next((f"a cell wrote to stderr: {text[:500]}" for text in _stderr(notebook)), None)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, keep / path.name)
    return path, seconds, problem


def _stderr(notebook: Any) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = (output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    return [text for text in texts if NOTICE.sub("", text).strip()]


def stripped(path: Path) -> None:
    """Rewrite a notebook as it is kept: no outputs, no counts, no ids, no metadata of the editor that saved it but a
    cell's tags, which the site reads (tools/website/notebooks.py). Its first cell of code gets the repository's address
    from pyproject.toml."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = SETUP.format(repository=project["urls"]["Repository"])
    setup = {"cell_type": "code", "metadata": {"tags": ["remove-cell"]}, "source": [source]}
    title, *others = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = []
    for cell in [title, setup, *(cell for cell in others if "remove-cell" not in cell["metadata"].get("tags", ()))]:
        source = "".join(cell["source"]).splitlines(keepends=True)
        tags = {"tags": cell["metadata"]["tags"]} if cell["metadata"].get("tags") else {}
        kept: dict[str, Any] = {"cell_type": cell["cell_type"], "metadata": tags, "source": source}
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(kept)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    # Format 4.4 has no ids of cells: 4.5 has, and they change.
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
