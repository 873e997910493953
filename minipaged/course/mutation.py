"""Mutation: change our own code one operator at a time, and see whether a suite notices (`make mutation`).

The museum's bugs are what people made; these are what a machine makes: `<` for `<=`, `+` for `-`, a branch left out.
cosmic-ray makes them and runs the tests, in a copy of the repository, for it changes files in place. A mutant that
survives is either equivalent (it changes nothing that can be seen) and named so below, or a property is missing.

    python -m minipaged.course.mutation                                   memory/, engine/scheduler.py, attention/
    python -m minipaged.course.mutation block_allocator block_table       of these modules alone
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minipaged.course.chapters import repository

LEAST_KILLED = 0.95
SECONDS = 60  # of one mutant: an endless loop counts as killed

# Module -> the tests that must notice.
TARGETS: dict[str, tuple[str, ...]] = {
    "minipaged/memory/block_allocator.py": ("test_ch06_block_table.py",),
    "minipaged/memory/block_table.py": ("test_ch06_block_table.py", "test_ch09_sharing.py", "test_memory_trace.py"),
    "minipaged/memory/prefix_cache.py": ("test_ch09_prefix_cache.py", "test_memory_trace.py"),
    "minipaged/memory/swap.py": ("test_ch09_swap.py", "test_memory_trace.py"),
    "minipaged/memory/block_manager.py": ("test_ch10_scheduler.py", "test_ch03_contiguous_cache.py"),
    "minipaged/memory/reservation.py": ("test_ch04_fragmentation.py",),
    "minipaged/memory/page_table.py": ("test_ch05_page_table.py",),
    "minipaged/memory/process.py": ("test_ch05_page_table.py",),
    "minipaged/memory/sizes.py": ("test_ch05_page_table.py",),
    "minipaged/engine/scheduler.py": ("test_ch10_scheduler.py",),
    "minipaged/attention/contiguous.py": ("test_ch03_contiguous_cache.py", "test_ch07_paged_attention.py"),
    "minipaged/attention/paged.py": ("test_ch07_paged_attention.py", "test_ch03_contiguous_cache.py"),
    "minipaged/attention/online_softmax.py": ("test_ch07_paged_attention.py",),
}

# Survivors that were looked at and change nothing that can be seen: (module, the mutated line, stripped) -> why.
_ALLOCATOR, _NEVER_NEGATIVE = "minipaged/memory/block_allocator.py", "a count never falls below 0: `_in_use` saw to it"
EQUIVALENT: dict[tuple[str, str], str] = {
    (_ALLOCATOR, "if self._owners[block] <= 0:"): _NEVER_NEGATIVE,
    (_ALLOCATOR, "if self._owners[self._known(block)] <= 0:"): _NEVER_NEGATIVE,
    (
        "minipaged/memory/block_table.py",
        'def fork(self, /, seq: str | None = None) -> "BlockTable":',
    ): "the name may be given without its keyword, too: nothing that was allowed is refused",
}


def copy_of(root: Path, target: Path) -> None:
    """What the tests need of the working tree: cosmic-ray writes its mutants into this copy."""
    for name in ("minipaged", "kernels", "tests", "tutorials"):
        ignored = shutil.ignore_patterns("__pycache__", "*.ipynb")
        shutil.copytree(root / name, target / name, ignore=ignored)
    shutil.copy(root / "pyproject.toml", target)


def mutate(module: str, suites: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """All mutants of one module: {"killed", "outcome", "line", "diff"}."""
    tests = " ".join(f"tests/{suite}" for suite in suites)
    session, config = folder / "session.sqlite", folder / "cosmic-ray.toml"
    session.unlink(missing_ok=True)
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {SECONDS}.0\nexcluded-modules = []\n'
        f'test-command = "{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"\n'
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_PROFILE": "course",
    }

    def cosmic_ray(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cosmic_ray.cli", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"cosmic-ray {arguments[0]} ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout

    cosmic_ray("init", config.name, session.name)
    cosmic_ray("baseline", config.name)  # the suite must pass where nothing is changed
    cosmic_ray("exec", config.name, session.name)
    return [_mutant(line) for line in cosmic_ray("dump", session.name).splitlines() if line.strip()]


def _mutant(line: str) -> dict[str, Any]:
    item, result = json.loads(line)
    mutation = item["mutations"][0]
    diff = (result or {}).get("diff") or ""
    added = [text[1:].strip() for text in diff.splitlines() if text.startswith("+") and not text.startswith("+++")]
    return {
        "killed": (result or {}).get("test_outcome") == "killed",
        "outcome": (result or {}).get("test_outcome"),
        "line": mutation["start_pos"][0],
        "added": added[0] if added else "",
        "diff": "\n".join(text for text in diff.splitlines() if text[:1] in "+-" and text[:3] not in ("+++", "---")),
    }


def main(names: list[str]) -> int:
    """Returns 0 where enough are killed and every survivor is explained, 1 where not, 2 where it cannot be run."""
    if find_spec("cosmic_ray") is None:
        print("error: cosmic-ray is not installed: pip install -e '.[mutation]'", file=sys.stderr)
        return 2
    unknown = [name for name in names if not any(name == Path(target).stem for target in TARGETS)]
    if unknown:
        print(f"error: {unknown[0]} is none of {', '.join(Path(target).stem for target in TARGETS)}", file=sys.stderr)
        return 2
    failed = False
    for module, suites in TARGETS.items():
        if names and Path(module).stem not in names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            copy_of(repository(), Path(scratch))
            mutants = mutate(module, suites, Path(scratch))
        # The words of an error are for people, and no property pins them.
        words = [m for m in mutants if m["added"].startswith("raise ") and not m["killed"]]
        survivors = [m for m in mutants if not m["killed"] and m not in words]
        unexplained = [m for m in survivors if (module, m["added"]) not in EQUIVALENT]
        counted = len(mutants) - len(words) - (len(survivors) - len(unexplained))
        share = 1.0 - len(unexplained) / max(1, counted)
        counts = f"{len(mutants)} mutants, {len(words)} change the words of an error, {len(survivors)} others survive"
        print(f"{module}: {counts}, {len(survivors) - len(unexplained)} equivalent: {share:.1%} killed", flush=True)
        for mutant in unexplained:
            print(f"  line {mutant['line']} ({mutant['outcome']}):")
            print("    " + mutant["diff"].replace("\n", "\n    "))
        failed |= share < LEAST_KILLED
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
