"""Chapter 14. `make conformance`: an engine under the kit, and a failing script drawn as block tables.

    python tests/conformance/run.py minipaged --scripts 10000
    python tests/conformance/run.py toy:freed_twice --seed 7     one class of a file, always the same scripts
    python tests/conformance/run.py path/to/adapter.py

The exit status is 0 where all adapters of the file held, and 1 where one failed. An engine that is not here, or not in
the version that its adapter was written for, is skipped with the reason.
"""

import argparse
import importlib.util
import io
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]  # an environment of another engine's has no minipaged in it

import kit  # noqa: E402

ENGINES = {"minipaged": "ours.py", "toy": "toy.py", "transformers": "transformers_cb.py", "vllm": "vllm_v1.py"}


def load(name):
    """The adapters of an engine or a file; of "file.py:Class" the one class. Raises ImportError, with the reason, where
    the engine is not here."""
    path, _, wanted = name.partition(":")
    path = FOLDER / ENGINES[path] if path in ENGINES else Path(path)
    if not path.is_file():
        raise SystemExit(f"error: {name} is no adapter: give {', '.join(ENGINES)}, or the path of a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if wanted and not hasattr(module, wanted):
        raise SystemExit(f"error: {path.name} has no {wanted}")
    return [getattr(module, wanted)] if wanted else module.ADAPTERS


def drawn(machine):
    """The block tables that a failing script left, by the viewer of the course."""
    from rich.console import Console

    from minipaged.viz.snapshot import Snapshot
    from minipaged.viz.terminal import draw

    tables = {seq: kit.Table(*table) for seq, table in machine.engine.tables().items()} or machine.held
    if not tables:
        return "no sequence holds a block"
    pools = {pool: {seq: t.blocks for seq, t in tables.items() if t.pool == pool} for pool in ("device", "host")}
    sizes = {pool: max([0, *(block + 1 for t in held.values() for block in t)]) for pool, held in pools.items()}
    texts = {seq: [str(token) for token in machine.text[seq].tokens] for seq in tables if seq in machine.text}
    snapshot = Snapshot(
        num_blocks=max(sizes["device"], machine.total["device"]),
        block_size=machine.block_size,
        tables=pools["device"],
        num_tokens={seq: table.computed for seq, table in tables.items()},
        texts=texts,
        num_host_blocks=max(sizes["host"], machine.total.get("host", 0)),
        host_tables=pools["host"],
    )
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(draw(snapshot))
    return "\n" + console.file.getvalue().rstrip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", help=f"{', '.join(ENGINES)}, or an adapter's file; FILE:CLASS for one class of it")
    parser.add_argument("--scripts", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="the same scripts again")
    told = parser.parse_args()
    if told.scripts < 1:
        parser.error(f"--scripts must be at least 1, got {told.scripts}")
    try:
        adapters = load(told.engine)
    except ImportError as reason:
        return print(f"skipped, and nothing was tried: {reason}")
    return sys.exit(bool(kit.main(adapters, told.scripts, told.seed, drawn)))


if __name__ == "__main__":
    main()
