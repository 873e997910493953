"""The learner's own properties, graded by what they do: hold for what is right, and fail for the bugs given with them.

test_reference_counts_are_entries_of_tables
    holds for the reference                         a property that refuses what is right refuses too much
    holds for an allocator of another order         so that no block number and no order is pinned
    refuses ch09_fork_without_a_reference           one that lets a bug pass says too little
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from minipaged.course.chapters import Chapter, repository
from minipaged.course.generate import source_of
from minipaged.course.grade import EVERY, HOLDS, NOT_WRITTEN, WRONG, environment, read
from minipaged.course.impl import unwritten
from minipaged.course.museum import load_bugs
from minipaged.course.report import say

# Property -> the planted bugs that it must refuse.
PROPERTIES: dict[int, dict[str, tuple[str, ...]]] = {
    6: {
        "test_free_and_used_blocks_are_the_whole_pool": ("ch06_count_not_raised", "ch06_freed_while_shared"),
        "test_what_is_refused_changes_nothing": (
            "ch06_freed_twice",
            "ch06_minus_one_is_the_last_block",
            "ch06_half_an_append",
        ),
        "test_two_sequences_never_share_a_slot": ("ch06_not_translated", "ch06_truncate_leaks"),
    },
    7: {
        "test_online_softmax_equals_the_oracle": (
            "ch07_no_rescaling",
            "ch07_nan_of_an_empty_row",
            "ch07_wrong_kv_head_of_a_group",
        ),
        "test_a_write_reaches_its_slots_and_no_other": ("ch07_stored_at_minus_one",),
    },
    9: {
        "test_after_a_fork_each_reads_what_it_wrote": ("ch09_copied_and_not_named", "ch09_named_and_not_copied"),
        "test_reference_counts_are_entries_of_tables": ("ch09_fork_without_a_reference",),
        "test_a_prompt_finds_the_blocks_of_its_own_prefix_alone": (
            "ch09_stale_key_of_a_reused_block",
            "ch09_the_whole_prompt_is_found",
            "ch09_parent_not_in_the_key",
            "ch09_salt_not_in_the_key",
        ),
        "test_a_group_comes_back_from_the_host_as_it_went": (
            "ch09_last_partial_block_not_swapped",
            "ch09_one_reference_on_the_host",
        ),
    },
    10: {
        "test_an_aborted_request_leaves_nothing_behind": ("ch10_leak_on_abort",),
        "test_what_can_never_run_is_refused": ("ch10_outgrows_the_pool",),
    },
}


RIGHT = {  # what a property must hold for
    "reference": "the reference itself",
    "reordered": "a right allocator, which hands out other blocks in another order",
}

# Behind the reference's allocator: the same pool, which hands out the last of its free blocks and not the first.
REORDERED = """

class _Reordered(BlockAllocator):
    def allocate(self):
        taken = [super().allocate()]
        while BlockAllocator.num_free.fget(self):
            taken.append(super().allocate())
        block = taken.pop()
        for other in taken:  # back to the pool, in their order
            super().free(other)
        return block


_Reordered.__name__ = _Reordered.__qualname__ = "BlockAllocator"
BlockAllocator = _Reordered
"""


@dataclass
class Verdict:
    """What one property did."""

    name: str
    about: str = ""
    unwritten: bool = False
    problem: str = ""  # the property refuses what is right: the reference, or one of another order
    missed: list[str] = field(default_factory=list)  # the bugs that it let pass, by what they are
    refused: int = 0

    @property
    def code(self) -> int:
        if self.unwritten:
            return NOT_WRITTEN
        return WRONG if self.problem or self.missed else HOLDS


def grade_properties(chapter: Chapter, folder: Path) -> list[Verdict]:
    """One verdict a property. Raises ValueError where the chapter has none, or the file is not there."""
    if chapter.number not in PROPERTIES:
        raise ValueError(f"chapter {chapter.number} has no properties to write: {', '.join(map(str, PROPERTIES))} have")
    file = folder / chapter.properties_file
    if not file.is_file():
        raise ValueError(f"{file} is not there: `minipaged start {folder}` puts it there")
    asked = PROPERTIES[chapter.number]
    stubs = set(unwritten(file))
    bugs = {bug.name: bug for bug in load_bugs()}
    verdicts = {name: Verdict(name, unwritten=name in stubs) for name in asked}
    written = [name for name in asked if name not in stubs]
    if not written:
        return list(verdicts.values())
    with tempfile.TemporaryDirectory() as scratch:
        for right in RIGHT:
            (Path(scratch) / right).mkdir()
        allocator = source_of("minipaged.memory.block_allocator").read_text(encoding="utf-8")
        (Path(scratch) / "reordered" / "ch06_block_allocator.py").write_text(allocator + REORDERED, encoding="utf-8")
        wanted = [*RIGHT, *dict.fromkeys(bug for name in written for bug in asked[name])]
        for bug in wanted[len(RIGHT) :]:
            bugs[bug].plant(Path(scratch) / bug)
        with ThreadPoolExecutor(2) as pool:
            outcomes = pool.map(lambda name: _outcomes(chapter, file, Path(scratch) / name), wanted)
            runs = dict(zip(wanted, outcomes, strict=True))
    for name in written:
        verdict = verdicts[name]
        for right, what in RIGHT.items():
            outcome, message = runs[right].get(name, ("wrong", "it was not found, or could not be imported"))
            if outcome != "holds":
                verdict.problem = f"{what}: {message or outcome}"
                break
        if verdict.problem:
            continue
        for bug in asked[name]:
            if runs[bug].get(name, ("wrong", ""))[0] == "wrong":
                verdict.refused += 1
            else:
                verdict.missed.append(" ".join(bugs[bug].about.split()))
    return list(verdicts.values())


def _outcomes(chapter: Chapter, file: Path, planted: Path) -> dict[str, tuple[str, str]]:
    """Each property's outcome and message over the modules of a folder; over ours where it is the reference's."""
    aside = planted.with_name(f"{planted.name}_run")  # the property is not part of the code that it judges
    aside.mkdir()
    report, copy = aside / "report.json", aside / file.name
    copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")  # away from any other conftest.py
    command = [sys.executable, "-m", "pytest", "-p", "minipaged.course.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=no", "-c", str(repository() / "pyproject.toml"), "--rootdir", str(repository())]
    command += ["--confcutdir", str(repository()), "-p", "conftest"]
    if planted.name != "reference":
        command += ["--impl", str(planted)]
    settings = environment(chapter, report, 100) | {"PYTHONPATH": str(repository() / "tests"), EVERY: "1"}
    subprocess.run(
        [*command, str(copy)],
        cwd=repository(),
        env={**os.environ, **settings},
        capture_output=True,
        check=False,
    )
    if not report.is_file():
        return {}
    found = read(chapter, report, [])
    return {
        finding["test"].rpartition("::")[2]: (finding["outcome"], finding.get("message", "").partition("\n")[0])
        for finding in found.findings
    }


def print_verdicts(chapter: Chapter, verdicts: list[Verdict], console: Console) -> int:
    """Print them; returns the exit code: wrong before not written before done."""
    console.print(Text(f"Chapter {chapter.number}: the properties you write", style="bold"))
    for verdict in verdicts:
        words = verdict.name.removeprefix("test_").replace("_", " ")
        if verdict.unwritten:
            say(console, f"not written  {words}")
        elif verdict.problem:
            say(console, f"TOO STRICT   {words}")
            say(console, f"             it refuses {verdict.problem}")
        elif verdict.missed:
            say(console, f"TOO WEAK     {words}")
            say(console, f"             it refuses {verdict.refused} planted bugs, and lets this one pass:")
            say(console, f"             {verdict.missed[0]}")
        else:
            say(console, f"good         {words}: holds for what is right, refuses {verdict.refused} planted bugs")
    codes = {verdict.code for verdict in verdicts}
    return WRONG if WRONG in codes else NOT_WRITTEN if NOT_WRITTEN in codes else HOLDS
