"""Chapter 8 on the GPU of this machine: its suite, its benchmark, and one table, in a file to paste into an issue.

    make colab-check                    writes colab-check.md; --quick for few sizes

The table says what decode reads a second, beside the bandwidth of a copy on the same card. With no GPU, one line says
so, and nothing else is done.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer


def report(figures: dict[str, Any] | None, suite: str, errors: str) -> str:
    """Markdown. figures: what `minipaged bench kernels` wrote, None where it failed; suite: the last line of pytest."""
    lines = [f"suite of chapter 8: {suite}", ""]
    if figures is None:
        return "\n".join([*lines, "the benchmark failed:", "", "```", errors.strip(), "```", ""])
    copy = figures["copy"]
    lines += [f"{figures['machine']}; copy {copy / 1e9:,.0f} GB/s", ""]
    lines += ["| shape | sequences | context | decode [us] | K and V [GB/s] | of copy |", "|---|--:|--:|--:|--:|--:|"]
    for row in figures["rows"]:
        if row["num_queries"] == 1 and "minipaged" in row["ms"]:
            milliseconds = row["ms"]["minipaged"]
            rate = row["kv_bytes"] / milliseconds * 1e3
            cells = row["shape"], row["num_seqs"], row["context"], f"{milliseconds * 1e3:,.0f}"
            lines.append("| " + " | ".join(map(str, (*cells, f"{rate / 1e9:,.0f}", f"{rate / copy:.0%}"))) + " |")
    return "\n".join([*lines, ""])


def main(
    quick: Annotated[bool, typer.Option("--quick/--all", help="few sizes")] = True,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("colab-check.md"),
) -> None:
    """Run chapter 8's suite and its benchmark on this GPU, and write one table."""
    if not torch.cuda.is_available():
        print("there is no GPU here: `make colab-check` needs one, such as the T4 of a Colab notebook")
        return
    machine = f"{torch.cuda.get_device_name()}, Python {platform.python_version()}"
    print(f"{machine}: the suite of chapter 8, some minutes", flush=True)
    tests = sorted(map(str, (Path(__file__).parents[2] / "tests").glob("test_ch08_*.py")))
    suite = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], stdout=subprocess.PIPE, text=True)
    print(suite.stdout)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "minipaged", "bench", "kernels", "--json", str(written)]
        bench = subprocess.run([*command, *["--scale", "0.1"] * quick], stderr=subprocess.PIPE, text=True)
        figures = json.loads(written.read_text()) if bench.returncode == 0 else None
    last = (suite.stdout.strip().splitlines() or ["no output"])[-1]
    text = f"# {machine}\n\n" + report(figures, last, bench.stderr)
    out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {out}")
    raise typer.Exit(suite.returncode or bench.returncode)


if __name__ == "__main__":
    typer.run(main)
