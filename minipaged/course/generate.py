"""The exercises, out of the reference's own source: `python -m minipaged.course.generate` writes tutorials/exercises/.

The text of a module is kept, header, imports, signatures, docstrings and comments; what changes is done to lines:

    def allocate(self) -> int:                    def allocate(self) -> int:
        \"\"\"Take a free block ...\"\"\"   ----->        \"\"\"Take a free block ...\"\"\"
        if not self._free:                            raise NotImplementedError("ch06: BlockAllocator.allocate")
            ...

So an exercise cannot drift from the reference: a test makes the files again and compares.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import wrap

from minipaged.course.chapters import Exercise, all_exercises, repository

Function = ast.FunctionDef | ast.AsyncFunctionDef
CONVENTIONS = (  # of all exercises
    "What is given may be changed too. Any way that keeps the docstrings' promises is right.",
    "A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;",
    "where two errors are due, either is right.",
)


def source_of(module: str) -> Path:
    """The file of one of our modules, found without importing it."""
    package, _, name = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{module} is not installed")
    for folder in spec.submodule_search_locations:
        if (path := Path(folder) / f"{name}.py").is_file():
            return path
    raise ValueError(f"{module} is not in {', '.join(spec.submodule_search_locations)}")


@cache
def exercise_text(exercise: Exercise) -> str:
    """The exercise's file. Raises ValueError where the map names a function that the module does not have."""
    source = source_of(exercise.module).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    known = {name for name, _, _ in _definitions(tree)}
    for name in (*exercise.blank, *exercise.given, *exercise.left_out):
        if name not in known:
            raise ValueError(f"{exercise.file}: {exercise.module} has no {name}")
    replaced: list[tuple[int, int, list[str]]] = []  # from line, up to line (counted from 0), the new lines
    blanked = []
    for name, node, parent in _definitions(tree):
        if any(
            name.startswith(f"{gone}.") for gone, gone_node, _ in _definitions(tree) if _drop(exercise, gone, gone_node)
        ):
            continue
        if _drop(exercise, name, node):
            replaced.append((*_with_its_blank_lines(node, lines, nested=parent is not tree), []))
        elif isinstance(node, Function) and _is_blank(exercise, name):
            blanked.append(name)
            replaced.append(_emptied(node, f"ch{exercise.chapter:02d}: {name}"))
    for start, end, new in sorted(replaced, reverse=True):
        lines[start:end] = new
    came = re.match(r'r?"""Chapter (\d+)\. ', lines[0])
    if came and int(came[1]) != exercise.chapter:  # a module that an earlier chapter began
        lines[0] = lines[0].replace(f"Chapter {came[1]}.", f"Chapter {exercise.chapter} (begun in {came[1]}).", 1)
    header = tree.body[0].end_lineno or 1  # the module's docstring
    lines[header:header] = ["", *_steps(exercise, blanked)]
    return "\n".join(lines).rstrip("\n") + "\n"


def interface(name: str) -> list[str]:
    """What a class or function outside the exercise offers, out of its source: "minipaged.memory.swap.Swap". Of a class
    all public methods and fields, or those that are named: "minipaged.memory.trace.Trace: record"."""
    name, _, only = name.partition(": ")
    module, _, name = name.rpartition(".")
    source = source_of(module).read_text(encoding="utf-8")
    found = {of: node for of, node, _ in _definitions(ast.parse(source))}
    node, path = found[name], module.replace(".", "/").replace("minipaged/kernels", "kernels") + ".py"
    if isinstance(node, Function):
        return [f"Given, in {path}:", "", *_described(node)]
    lines = [f"Given: {name}, in {path}.", ""]
    assert isinstance(node, ast.ClassDef)
    wanted = only.split(", ") if only else None
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            if not inner.target.id.startswith("_") and (wanted is None or inner.target.id in wanted):
                line = source.splitlines()[inner.lineno - 1].strip()
                lines.append(f"  {re.sub(r' = field[(][^)]*[)]', '', line)}")
        elif isinstance(inner, Function) and (inner.name in wanted if wanted else not inner.name.startswith("_")):
            lines += _described(inner)
    return lines


def _described(node: Function) -> list[str]:
    """A function's signature, and below it its docstring."""
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    reads = any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)
    head = f"  {node.name}{returns}" if reads else f"  {node.name}({arguments}){returns}"
    paragraph = " ".join((ast.get_docstring(node) or "").split())
    return [
        *wrap(head, 108, subsequent_indent="      ", break_long_words=False),
        *wrap(paragraph, 108, initial_indent="      ", subsequent_indent="      "),
    ]


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt, ast.AST]]:
    """Classes, functions and methods, in their order: ("BlockTable.fork", node, where it stands)."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node, tree
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Function):
                    yield f"{node.name}.{inner.name}", inner, node


def _is_blank(exercise: Exercise, name: str) -> bool:
    if exercise.blank:
        return name in exercise.blank
    return name not in exercise.given and name.split(".")[0] not in exercise.given


def _drop(exercise: Exercise, name: str, node: ast.AST) -> bool:
    """A private helper is ours: the learner has their own."""
    last = name.rpartition(".")[2]
    private = last.startswith("_") and not last.endswith("__")
    return name in exercise.left_out or (private and not exercise.blank and name not in exercise.given)


def _emptied(node: Function, what: str) -> tuple[int, int, list[str]]:
    """Everything behind the docstring (or the signature) becomes one line."""
    first = node.body[0]
    start, indent = first.lineno - 1, " " * first.col_offset
    if ast.get_docstring(node) is not None:
        start = first.end_lineno or start
    raising = f'{indent}raise NotImplementedError("{what}")'
    return start, node.end_lineno or start, [raising]


def _with_its_blank_lines(node: ast.stmt, lines: list[str], nested: bool) -> tuple[int, int]:
    decorators = node.decorator_list if isinstance(node, Function | ast.ClassDef) else []
    start = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    while start > 0 and not lines[start - 1].strip():  # the blank lines before it go with it
        start -= 1
    return start, node.end_lineno or start


def _steps(exercise: Exercise, blanked: list[str]) -> list[str]:
    lines = [
        f"# Exercise {exercise.file.removesuffix('.py')}, about {exercise.minutes} minutes. Write what raises",
        f"# NotImplementedError, in this order, and run `minipaged check {exercise.chapter}` after each step:",
        "#",
    ]
    lines += [f"#   {number}. {name}" for number, name in enumerate(blanked, start=1)]
    lines += ["#", *(f"# {line}" for line in CONVENTIONS)]
    if exercise.note:
        lines += ["#", f"# {exercise.note}"]
    for name in exercise.uses:
        lines += ["#", *(f"# {line}".rstrip() for line in interface(name))]
    lines.append("#")
    if exercise.left_out:
        others = [name for name in exercise.left_out if not name.rpartition(".")[2].startswith("_")]
        if others:
            lines.append(
                f"# Left out here, and met in a later chapter: {', '.join(n.rpartition('.')[2] for n in others)}."
            )
    lines.append(f"# Made from {exercise.module.replace('.', '/')}.py by minipaged/course/generate.py.")
    return lines


def write_all(folder: Path) -> list[Path]:
    """Write every exercise. The properties of a chapter are written by hand, and stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for exercise in all_exercises():
        paths.append(folder / exercise.file)
        paths[-1].write_text(exercise_text(exercise), encoding="utf-8")
    return paths


def write_solutions(folder: Path) -> None:
    """The reference as a learner's folder, with everything done."""
    for exercise in all_exercises():
        (folder / exercise.file).write_text(source_of(exercise.module).read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    for path in write_all(repository() / "tutorials" / "exercises"):
        print(path.name)
