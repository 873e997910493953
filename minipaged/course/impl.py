"""A learner's file stands for a module of ours, everywhere: the import system is asked before it is imported.

    import minipaged.memory.block_table
        |
        v   ImplFinder, the first on sys.meta_path
    DIR/ch06_block_table.py  is run as the module minipaged.memory.block_table
        |
        v   what the file lacks is as in the exercise that ships: it raises
    NotImplementedError("ch06: BlockTable.slot")

So block tables, caches, engine and tests all meet the learner's class, and isinstance and except work as ever. An empty
file is an exercise that is not begun. Our own file is closed meanwhile: none of it can pass for the learner's.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from minipaged.course.chapters import CHAPTERS, Exercise, all_exercises, repository
from minipaged.course.generate import exercise_text, source_of

UNWRITTEN = re.compile(r"^ch\d\d: ")  # what a stub says


class CannotImport(ImportError):
    """A learner's file cannot be run: "ch06_block_table.py:31: NameError: name 'cdvi' is not defined"."""


def unwritten(path: Path) -> list[str]:
    """What is still to be written: its body is the stub's, or it is not there. All, if the file is no Python."""
    exercise = next((each for each in all_exercises() if each.file == path.name), None)
    asked = _stubs(ast.parse(exercise_text(exercise))) if exercise else []
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return asked
    bound, imported = _bound(tree)
    stubs = _stubs(tree)
    gone = [name for name in asked if _is_public(name) and not {name.rpartition(".")[2], name} & bound]
    gone = [name for name in gone if name.partition(".")[0] not in imported]
    return stubs + [name for name in gone if name not in stubs]


def _stubs(tree: ast.Module) -> list[str]:
    """The functions whose body raises what a stub raises, in their order."""
    stubs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said, kind = node.exc.args[0], node.exc.func
            if isinstance(kind, ast.Name) and kind.id == "NotImplementedError" and isinstance(said, ast.Constant):
                stubs.append((node.lineno, str(said.value)))
    return [said.partition(": ")[2] for _, said in sorted(stubs) if UNWRITTEN.match(said)]


def _bound(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Every name that a file gives to something, and those that it imports."""
    nodes = list(ast.walk(tree))
    bound = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return bound, {alias.asname or alias.name for node in imports for alias in node.names}


def _is_public(name: str) -> bool:
    """A private helper need not be there: a learner's way may do without it."""
    last = name.rpartition(".")[2]
    return not last.startswith("_") or last.endswith("__")


def choose(folder: Path, chapters: Collection[int] | None = None, only: str = "") -> dict[str, Path]:
    """Which of the learner's files stand for which modules while the suites of `chapters` (None: of all) run.

    Of those chapters, every file that is there. Of others, the files with nothing left to write: so chapter 9 can be
    done before chapter 6, and chapter 6 is used once it is done (but for its block table, which cannot fork).
    With `only`, a file or what one defines: that file alone. Raises ValueError for a folder without an exercise.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: `minipaged start {folder}` makes one")
    here = [exercise for exercise in all_exercises() if (folder / exercise.file).is_file()]
    if not here:
        files = ", ".join(exercise.file for exercise in all_exercises()[:3])
        raise ValueError(f"{folder} holds no exercise ({files}, ...): `minipaged start {folder}` puts them there")
    asked = CHAPTERS if chapters is None else chapters
    if only:
        parts = {name: each for each in here if each.chapter in asked for name in (each.file, *parts_of(each))}
        if only not in parts:
            raise ValueError(f"--only {only}: it is none of {', '.join(parts)}")
        return {parts[only].module: folder / parts[only].file}

    def rank(exercise: Exercise) -> tuple[bool, bool, int]:
        written = not unwritten(folder / exercise.file)
        return exercise.chapter in asked and chapters is not None, written, exercise.chapter

    chosen: dict[str, Path] = {}
    for exercise in sorted(here, key=rank):
        finished = not exercise.is_part and not unwritten(folder / exercise.file)
        if exercise.chapter in asked or finished:
            chosen[exercise.module] = folder / exercise.file
    return chosen


def parts_of(exercise: Exercise) -> list[str]:
    """The classes and functions of a file in which something is to be written: each can be checked alone."""
    return list(dict.fromkeys(name.partition(".")[0] for name in _stubs(ast.parse(exercise_text(exercise)))))


def install(modules: Mapping[str, Path], on_load: Callable[[ModuleType], None] | None = None, only: str = "") -> None:
    """From now on each module is run from its path. Raises ValueError if one of them was imported before.

    `on_load` is called with each module that was so loaded (the recorder looks over its shoulder). With `only`, a name
    of a class or function, what else the file defines is ours.
    """
    for name in modules:
        if name in sys.modules:
            raise ValueError(f"{name} is imported already: a learner's file must come before it")
    sys.meta_path.insert(0, ImplFinder(modules, on_load, only))
    if not only:
        _close({source_of(name).resolve(): path.name for name, path in modules.items()})


def _close(files: Mapping[Path, str]) -> None:
    """Nothing opens these files of ours from now on, under whatever name they might be imported."""
    stems = {path.stem for path in files}

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str):
            return
        stem = os.path.basename(arguments[0]).partition(".")[0]  # block_table.py, block_table.cpython-312.pyc
        if stem in stems:
            path = Path(arguments[0]).resolve()
            source = path.with_name(f"{stem}.py") if path.suffix == ".py" else path.parent.parent / f"{stem}.py"
            if source in files:
                raise ImportError(f"{source.name} is what {files[source]} stands for, and cannot be taken instead")

    sys.addaudithook(refuse)


class ImplFinder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: Mapping[str, Path], on_load: Callable[[ModuleType], None] | None, only: str):
        by_file = {exercise.file: exercise for exercise in all_exercises()}
        self.modules = {name: (by_file[path.name], path.resolve()) for name, path in modules.items()}
        self.shipped = {name: exercise_text(exercise) for name, (exercise, _) in self.modules.items()}
        self.on_load = on_load
        self.only = only

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        loader = ImplLoader(fullname, str(self.modules[fullname][1]), self)
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


class ImplLoader(importlib.machinery.SourceFileLoader):
    """Runs the learner's file. What it lacks is not written yet."""

    def __init__(self, fullname: str, file: str, finder: ImplFinder):
        super().__init__(fullname, file)
        self.finder = finder

    def get_code(self, fullname: str) -> Any:
        """Always from the source: no __pycache__ beside a learner's files."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except (CannotImport, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit and pytest.skip too: a file that ends the run is not right
            raise CannotImport(f"{self._place(error)}: {type(error).__name__}: {_words(error)}") from error
        self._lend_stubs(module)
        if self.finder.only in self._definitions():
            self._lend_ours(module)
        if self.finder.on_load is not None:
            self.finder.on_load(module)

    def _place(self, error: BaseException) -> str:
        """The file and the innermost line of it."""
        lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == self.path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        return ":".join([Path(self.path).name, *([str(line)] if line else [])])

    def _definitions(self) -> list[str]:
        """What the exercise defines: functions, classes and constants."""
        names: list[str] = []
        for node in ast.parse(self.finder.shipped[self.name]).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names += [target.id for target in targets if isinstance(target, ast.Name)]
        return names

    def _lend_stubs(self, module: ModuleType) -> None:
        exercise = self.finder.modules[self.name][0]
        file = repository() / "tutorials" / "exercises" / exercise.file
        shipped = _run(f"{self.name}__shipped", self.finder.shipped[self.name], file)
        for name in self._definitions():
            value, theirs = vars(shipped)[name], vars(module).get(name)
            if name not in vars(module):
                setattr(module, name, value)
            elif isinstance(value, type) and isinstance(theirs, type):
                own = [base for base in theirs.__mro__ if base not in value.__mro__]
                for method, like in vars(value).items():
                    what = f"ch{exercise.chapter:02d}: {name}.{method}"
                    missing = not any(method in vars(base) for base in own)
                    if missing and not method.startswith("_") and (callable(like) or isinstance(like, property)):
                        setattr(theirs, method, _stub(what, like))

    def _lend_ours(self, module: ModuleType) -> None:
        """All but the one part that is to be checked."""
        file = source_of(self.name)
        ours = _run(f"{self.name}__ours", file.read_text(encoding="utf-8"), file)
        for name in self._definitions():
            if name != self.finder.only:
                setattr(module, name, vars(ours)[name])
        setattr(ours, self.finder.only, vars(module)[self.finder.only])


def _run(name: str, text: str, file: Path) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(text, str(file), "exec"), vars(module))
    return module


def _words(error: BaseException) -> str:
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _stub(message: str, like: Any) -> Any:
    def missing(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(message)

    return _MissingProperty(message) if isinstance(like, property) else missing


class _MissingProperty:
    """Unlike a property it is hidden by an attribute of the same name, which is as good."""

    def __init__(self, message: str):
        self.message = message

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        raise NotImplementedError(self.message)


def not_written(error: BaseException | None) -> str | None:
    """ "BlockAllocator.allocate", if the error came from a stub, also behind whatever wrapped it; None otherwise."""
    for each in chain(error):
        said = re.search(r"\bch\d\d: ([\w.]+)", str(each))
        if said and (isinstance(each, NotImplementedError) or "NotImplementedError" in str(each)):
            return said[1]
    return None


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and those behind it, each once."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def public_functions(module: ModuleType) -> list[tuple[str, Any]]:
    """The module's own public functions, so that their calls can be noted."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
