"""The exercises: in step with the reference, importable as they are, and taken in the reference's place."""

import ast
import shutil
import subprocess
import sys

import pytest

from minipaged.course import impl
from minipaged.course.chapters import CHAPTERS, Exercise, all_exercises, repository
from minipaged.course.generate import exercise_text, source_of

EXERCISES = all_exercises()
FOLDER = repository() / "tutorials" / "exercises"
each = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.file)


@each
def test_an_exercise_is_what_the_reference_gives_today(exercise):
    shipped = (FOLDER / exercise.file).read_text(encoding="utf-8")
    assert shipped == exercise_text(exercise), "run: python -m minipaged.course.generate"


@each
def test_signatures_and_docstrings_are_the_references(exercise):
    """Whatever is in the exercise is in the reference under the same name, arguments and docstring."""

    def promises(source):
        found = {}
        for node in ast.parse(source).body:
            for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
                if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                    name = inner.name if inner is node else f"{node.name}.{inner.name}"
                    arguments = ast.unparse(inner.args) if isinstance(inner, ast.FunctionDef) else ""
                    found[name] = arguments, ast.get_docstring(inner)
        return found

    theirs = promises((FOLDER / exercise.file).read_text(encoding="utf-8"))
    ours = promises(source_of(exercise.module).read_text(encoding="utf-8"))
    assert theirs.items() <= ours.items()


@each
def test_an_exercise_has_something_to_write_and_no_solution_in_it(exercise):
    stubs = impl.unwritten(FOLDER / exercise.file)
    assert stubs
    assert exercise.chapter in CHAPTERS
    for name in exercise.blank:
        assert name in stubs
    assert not impl.unwritten(source_of(exercise.module)), "the reference has no stub"


def test_every_file_in_the_folder_belongs_to_the_course():
    known = {exercise.file for exercise in EXERCISES} | {chapter.properties_file for chapter in CHAPTERS.values()}
    assert {path.name for path in FOLDER.glob("*.py")} <= known


def test_a_wrong_map_is_refused():
    with pytest.raises(ValueError, match=r"has no BlockTable\.forks"):
        exercise_text(Exercise("ch06_x.py", "minipaged.memory.block_table", 1, blank=("BlockTable.forks",)))


def test_of_the_chapter_asked_for_every_file_and_of_others_what_is_finished(tmp_path):
    with pytest.raises(ValueError, match="minipaged start"):
        impl.choose(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no exercise"):
        impl.choose(tmp_path)
    shutil.copy(FOLDER / "ch06_block_allocator.py", tmp_path)
    shutil.copy(FOLDER / "ch09_swap.py", tmp_path)
    shutil.copy(source_of("minipaged.memory.block_table"), tmp_path / "ch06_block_table.py")  # it need not have fork
    shutil.copy(source_of("minipaged.reference"), tmp_path / "ch01_masked_attention.py")
    assert {path.name for path in impl.choose(tmp_path, {9}).values()} == {
        "ch09_swap.py",
        "ch01_masked_attention.py",
    }
    assert {path.name for path in impl.choose(tmp_path, {6}).values()} == {
        "ch06_block_allocator.py",
        "ch06_block_table.py",
        "ch01_masked_attention.py",
    }
    assert len(impl.choose(tmp_path)) == 4
    shutil.copy(FOLDER / "ch09_sharing.py", tmp_path)  # the same module, in another chapter's file
    assert impl.choose(tmp_path, {9})["minipaged.memory.block_table"].name == "ch09_sharing.py"
    assert impl.choose(tmp_path, {6})["minipaged.memory.block_table"].name == "ch06_block_table.py"


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_learners_class_is_met_everywhere_and_what_it_lacks_is_said(tmp_path):
    (tmp_path / "ch06_block_allocator.py").write_text(
        "class BlockAllocator:\n    'the learners'\n    def __init__(self, num_blocks):\n        self.num_blocks = 7\n"
    )
    code = """
import sys
from pathlib import Path
from minipaged.course import impl
impl.install(impl.choose(Path(sys.argv[1])))
from minipaged.memory import block_allocator
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.prefix_cache import PrefixCache
print(block_allocator.BlockAllocator.__doc__, PrefixCache.__mro__[1].__doc__)
print(issubclass(block_allocator.OutOfBlocks, RuntimeError), BlockManager(3, 2).device.num_blocks)
try:
    block_allocator.BlockAllocator(3).allocate()
except NotImplementedError as error:
    print(impl.not_written(error))
try:
    impl.install(impl.choose(Path(sys.argv[1])))
except ValueError as error:
    print(error)
"""
    assert run(code, tmp_path) == [
        "the learners the learners",
        "True 7",
        "BlockAllocator.allocate",
        "minipaged.memory.block_allocator is imported already: a learner's file must come before it",
    ]
    assert not (tmp_path / "__pycache__").exists()


def test_a_stub_behind_other_errors_is_still_a_stub():
    inner = NotImplementedError("ch08: write_kv_kernel")
    outer = RuntimeError("the interpreter failed")
    outer.__cause__ = inner
    assert impl.not_written(outer) == impl.not_written(inner) == "write_kv_kernel"
    assert impl.not_written(RuntimeError(repr(inner))) == "write_kv_kernel"
    assert impl.not_written(NotImplementedError("something else")) is None
    assert impl.not_written(ValueError("ch08: 3")) is None
