"""A learner's file stands for a module of ours, everywhere: the import system is asked before it is imported.

    import minipaged.memory.block_table
        |
        v   ImplFinder, the first on sys.meta_path
    DIR/ch06_block_table.py  is run as the module minipaged.memory.block_table
        |
        v   what the file lacks
    a name of the module      is taken from ours
    a method of a class       raises NotImplementedError("not in ch06_block_table.py: BlockTable.fork")

So block tables, caches, engine and tests all meet the learner's class, and isinstance and except work as ever.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from minipaged.course.chapters import CHAPTERS, Exercise, all_exercises

UNWRITTEN = re.compile(r"^ch\d\d: |^not in \w+\.py: ")  # what a stub says


def unwritten(path: Path) -> list[str]:
    """The functions of a file whose body still is a stub. A file that is no Python has none: importing it says more."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    stubs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            said = node.exc.args[0]
            if (
                isinstance(node.exc.func, ast.Name)
                and node.exc.func.id == "NotImplementedError"
                and isinstance(said, ast.Constant)
                and UNWRITTEN.match(str(said.value))
            ):
                stubs.append((node.lineno, str(said.value).partition(": ")[2]))
    return [name for _, name in sorted(stubs)]


def choose(folder: Path, chapters: Collection[int] | None = None) -> dict[str, Path]:
    """Which of the learner's files stand for which modules while the suites of `chapters` (None: of all) run.

    Of those chapters, every file that is there. Of others, the files with nothing left to write: so chapter 9 can be
    done before chapter 6, and chapter 6 is used once it is done (but for its block table, which cannot fork).
    Raises ValueError for a folder without an exercise.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: `minipaged start {folder}` makes one")
    here = [exercise for exercise in all_exercises() if (folder / exercise.file).is_file()]
    if not here:
        files = ", ".join(exercise.file for exercise in all_exercises()[:3])
        raise ValueError(f"{folder} holds no exercise ({files}, ...): `minipaged start {folder}` puts them there")
    asked = CHAPTERS if chapters is None else chapters

    def rank(exercise: Exercise) -> tuple[bool, bool, int]:
        written = not unwritten(folder / exercise.file)
        return exercise.chapter in asked and chapters is not None, written, exercise.chapter

    chosen: dict[str, Path] = {}
    for exercise in sorted(here, key=rank):
        finished = not exercise.is_part and not unwritten(folder / exercise.file)
        if exercise.chapter in asked or finished:
            chosen[exercise.module] = folder / exercise.file
    return chosen


def install(modules: Mapping[str, Path], on_load: Callable[[ModuleType], None] | None = None) -> None:
    """From now on each module is run from its path. Raises ValueError if one of them was imported before.

    `on_load` is called with each module that was so loaded (the recorder looks over its shoulder).
    """
    for name in modules:
        if name in sys.modules:
            raise ValueError(f"{name} is imported already: a learner's file must come before it")
    sys.meta_path.insert(0, ImplFinder(modules, on_load))


class ImplFinder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: Mapping[str, Path], on_load: Callable[[ModuleType], None] | None = None):
        self.modules = dict(modules)
        self.on_load = on_load

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.modules:
            return None
        file = str(self.modules[fullname].resolve())
        loader = ImplLoader(fullname, file, self, path)
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


class ImplLoader(importlib.machinery.SourceFileLoader):
    """Runs the learner's file, and fills what it lacks."""

    def __init__(self, fullname: str, file: str, finder: ImplFinder, search: Sequence[str] | None):
        super().__init__(fullname, file)
        self.finder = finder
        self.search = search

    def get_code(self, fullname: str) -> Any:
        """Always from the source: no __pycache__ beside a learner's files."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        theirs = set(vars(module))
        ours = self._reference()
        for name, value in vars(ours).items():
            if name not in theirs and not name.startswith("__"):
                setattr(module, name, value)
            elif isinstance(value, type) and value.__module__ == ours.__name__:
                self._fill_class(getattr(module, name), value)
        if self.finder.on_load is not None:
            self.finder.on_load(module)

    def _fill_class(self, theirs: Any, ours: type) -> None:
        if not isinstance(theirs, type):
            return
        for name, value in vars(ours).items():
            public = not name.startswith("_")
            if public and not hasattr(theirs, name) and (callable(value) or isinstance(value, property)):
                setattr(theirs, name, _stub(f"not in {Path(self.path).name}: {ours.__name__}.{name}", value))

    def _reference(self) -> ModuleType:
        """Our own module, under a name of its own; what it imports in its turn may be the learner's."""
        name = f"{self.name}__reference"
        package = self.name.rpartition(".")[0]
        search = self.search if self.search is not None else sys.modules[package].__path__
        spec = importlib.machinery.PathFinder.find_spec(self.name, search)
        if spec is None or spec.origin is None:
            raise ImportError(f"our own {self.name} is not to be found in {list(search)}")
        renamed = importlib.util.spec_from_file_location(name, spec.origin)
        assert renamed is not None and renamed.loader is not None
        module = importlib.util.module_from_spec(renamed)
        sys.modules[name] = module  # dataclasses look their module up
        renamed.loader.exec_module(module)
        return module


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
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        said = re.search(r"(?:ch\d\d|not in \w+\.py): ([\w.]+)", str(error))
        if said and (isinstance(error, NotImplementedError) or "NotImplementedError" in str(error)):
            return said[1]
        error = error.__cause__ or error.__context__
    return None


def public_functions(module: ModuleType) -> list[tuple[str, Any]]:
    """The module's own public functions, so that their calls can be noted."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
