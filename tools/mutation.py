"""Mutation: change our own code one operator at a time, and see whether a suite notices (`make mutation`).

The museum's bugs are what people made; these are what a machine makes: `<` for `<=`, `+` for `-`, a branch left out.
cosmic-ray makes them. Each is written into a copy of the repository, and the module's own suite runs there: what
`make test` runs of it first, then, where the mutant survives, its slow tests too, with many more examples. A mutant
that still lives is either equivalent (it changes nothing that can be seen) and named so in equivalent_mutants.py, or a
property is missing. docs/mutation.md keeps the count.

    python tools/mutation.py                                   all of TARGETS: hours
    python tools/mutation.py block_allocator block_table       of these modules alone
    python tools/mutation.py scheduler --sample 60             60 of its mutants, always the same ones
"""

import ast
import difflib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from equivalent_mutants import EQUIVALENT

from minipaged.course.chapters import repository

LEAST_KILLED = 0.95
TIMES_LONGER = 5  # than the suite needs of the processor where nothing is changed: an endless loop counts as killed
WALL_SECONDS = 900  # the same for one that waits; on a busy machine a run may stand still for a while
# Examples of each property and the tests that run them: as in `make test`, then, for what survives, all and thoroughly.
ROUNDS = ((25, "not slow and not oracle"), (400, "not oracle"))
SEED = 9  # of the samples

# Module -> the tests that must notice; a survivor meets them again with more examples.
TARGETS: dict[str, tuple[str, ...]] = {
    "minipaged/memory/block_allocator.py": ("test_ch06_block_table.py",),
    "minipaged/memory/block_table.py": (
        "test_ch06_block_table.py",
        "test_memory_trace.py",
        "test_ch09_sharing.py",
        "test_ch09_swap.py",
    ),
    "minipaged/memory/prefix_cache.py": ("test_ch09_prefix_cache.py", "test_memory_trace.py"),
    "minipaged/memory/swap.py": ("test_ch09_swap.py", "test_memory_trace.py"),
    "minipaged/memory/block_manager.py": ("test_ch09_block_manager.py", "test_ch09_sliding_window.py"),
    "minipaged/memory/reservation.py": ("test_ch04_fragmentation.py",),
    "minipaged/memory/page_table.py": ("test_ch05_page_table.py",),
    "minipaged/memory/address_space.py": ("test_ch05_page_table.py",),
    "minipaged/memory/kv_cache_size.py": ("test_ch05_page_table.py",),
    "minipaged/memory/trace.py": ("test_memory_trace.py",),
    "minipaged/engine/scheduler.py": ("test_ch10_scheduler.py", "test_ch09_sliding_window.py"),
    "minipaged/engine/scheduler_output.py": ("test_ch10_scheduler.py", "test_ch09_sliding_window.py"),
    "minipaged/attention/contiguous.py": ("test_ch07_paged_attention.py", "test_ch03_contiguous_cache.py"),
    "minipaged/attention/gathered.py": ("test_ch07_paged_attention.py", "test_ch03_contiguous_cache.py"),
    "minipaged/attention/online_softmax.py": ("test_ch07_paged_attention.py",),
    "minipaged/attention/checks.py": ("test_ch07_paged_attention.py", "test_ch08_triton_kernels.py"),
    "minipaged/attention/compiled.py": ("test_ch07_paged_attention.py",),
    "minipaged/kvcache/contiguous.py": ("test_ch03_contiguous_cache.py",),
    "minipaged/kvcache/paged.py": (
        "test_ch03_contiguous_cache.py",
        "test_ch07_paged_attention.py",
        "test_ch08_engine.py",
    ),
    "minipaged/kvcache/swap_space.py": ("test_ch09_swap.py",),
    "minipaged/engine/sampling.py": ("test_ch10_sampling.py", "test_ch10_arguments.py"),
    "minipaged/engine/llm_engine.py": ("test_ch10_engine.py", "test_ch10_llm.py", "test_ch10_interrupts.py"),
    "minipaged/model/transformer.py": ("test_ch02_transformer.py",),
    "minipaged/model/tokenizer.py": ("test_ch02_tokenizer.py",),
    "minipaged/model/tokenizer_files.py": ("test_ch02_tokenizer.py", "test_ch02_weights.py"),
    "minipaged/model/families.py": ("test_ch02_weights.py",),
    "minipaged/simulator/cost.py": ("test_ch11_simulator.py",),
    "minipaged/simulator/simulate.py": ("test_ch11_simulator.py",),
}

# In their suites compiled loops run as plain Python. In those of the engine a step of the model would take seconds.
PLAIN_LOOPS = "minipaged/attention/"
COMPILERS = {"compiled", "inlined", "exactly"}  # decorators that do nothing there

# Which counterexample kills a mutant is of no interest, so none is made smaller.
PLUGIN = """
from hypothesis import HealthCheck, Phase, settings


def pytest_configure(config):
    phases, quiet = [Phase.explicit, Phase.generate], list(HealthCheck)
    settings.register_profile(
        "mutation", settings.default, database=None, phases=phases, suppress_health_check=quiet
    )
    settings.load_profile("mutation")
"""


@dataclass(frozen=True)
class Mutant:
    """A module's text with one change, and that change: the lines taken out and put in."""

    source: str
    line: int
    removed: str
    added: str

    def __str__(self) -> str:
        return f"line {self.line}:\n    - {self.removed}\n    + {self.added}"


class _Behaviour(ast.NodeTransformer):
    """Takes out what no property pins: docstrings, annotations, the words of an error, decorators of classes and those
    that compile, and whether an argument goes by its place or its name."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        given = node.args
        for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if arg is not None:
                arg.annotation = None
        given.args = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        given.defaults = [*given.defaults, *(default for default in given.kw_defaults if default)]
        given.posonlyargs, given.kwonlyargs, given.kw_defaults = [], [], []
        node.returns = None
        node.decorator_list = [by for by in node.decorator_list if getattr(by, "id", None) not in COMPILERS]
        return _without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list = []
        return _without_docstring(node)

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self.generic_visit(node)
        return _without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return node


def _without_docstring(node: ast.FunctionDef | ast.ClassDef | ast.Module) -> ast.AST:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        node.body = node.body[1:] or [ast.Pass()]
    return node


def behaviour(source: str) -> str:
    """Equal for two texts that differ only in what no property pins. Raises SyntaxError."""
    return ast.dump(_Behaviour().visit(ast.parse(source)))


def mutants(source: str) -> Iterator[Mutant]:
    """All that cosmic-ray makes of one module, each once, without those that no property could tell from it."""
    plugins, trees, mutating = (import_module(f"cosmic_ray.{name}") for name in ("plugins", "ast", "mutating"))
    nodes = list(trees.ast_nodes(trees.get_ast(source)))
    seen = {behaviour(source)}
    for name in sorted(plugins.operator_names()):
        if plugins.get_operator(name).arguments():
            continue  # it wants to be told which names to change
        operator = plugins.get_operator(name)()
        for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes)):
            changed = mutating.mutate_code(source, operator, occurrence)
            try:
                key = behaviour(changed)
            except SyntaxError:
                continue
            if key not in seen:
                seen.add(key)
                yield _mutant(source, changed)


def _mutant(source: str, changed: str) -> Mutant:
    before, after = source.splitlines(), changed.splitlines()
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    _, start, end, new_start, new_end = next(step for step in steps if step[0] != "equal")
    removed, added = ("\n".join(lines).strip() for lines in (before[start:end], after[new_start:new_end]))
    return Mutant(changed, start + 1, removed, added)


def copy_of(root: Path, target: Path) -> None:
    """What the tests need of the working tree: the mutants are written into this copy."""
    for name in ("minipaged", "kernels", "tests", "tutorials"):
        ignored = shutil.ignore_patterns("__pycache__", "*.ipynb")
        shutil.copytree(root / name, target / name, ignore=ignored)
    shutil.copy(root / "pyproject.toml", target)
    (target / "without_shrinking.py").write_text(PLUGIN)


def passes(suites: tuple[str, ...], folder: Path, examples: int, marks: str, plain: bool, limit: int) -> bool:
    """Whether the suites are content with the copy as it is. One that does not end is not.

    plain: compiled loops run as plain Python, where an index that went wrong is an error and not a crash. limit:
    seconds of the processor."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_PROFILE": "course",
        "MINIPAGED_EXAMPLES": str(examples),
        "NUMBA_DISABLE_JIT": str(int(plain)),
    }
    options = ["-x", "-q", "-m", marks, "-p", "no:cacheprovider", "-p", "without_shrinking"]
    rounds = examples // ROUNDS[0][0]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(f"tests/{suite}" for suite in suites)],
            cwd=folder,
            env=environment,
            capture_output=True,
            check=False,
            timeout=WALL_SECONDS * rounds,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),  # in the child alone
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survivors(module: str, chosen: list[Mutant], folder: Path) -> list[list[Mutant]]:
    """Those that each of ROUNDS leaves alive, with a line for every one of them as soon as it is known. Raises
    RuntimeError where the module's suites fail with nothing changed."""
    suites, file = TARGETS[module], folder / module
    source, left, plain = file.read_text(), [], module.startswith(PLAIN_LOOPS)
    file.write_text("raise RuntimeError")
    if passes(suites, folder, *ROUNDS[0], plain, resource.RLIM_INFINITY):
        raise RuntimeError(f"{' and '.join(suites)} pass without {module}: they import another copy than {folder}")
    file.write_text(source)
    for examples, marks in ROUNDS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        if chosen and not passes(suites, folder, examples, marks, plain, resource.RLIM_INFINITY):
            raise RuntimeError(f"{' and '.join(suites)} must pass where nothing is changed, and do not")
        limit = 10 + TIMES_LONGER * int(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        alive = []
        for number, mutant in enumerate(chosen, 1):
            file.write_text(mutant.source)
            if passes(suites, folder, examples, marks, plain, limit):
                alive.append(mutant)
                print(f"  {number} of {len(chosen)} survives {examples} examples, {mutant}", flush=True)
        file.write_text(source)
        chosen = alive
        left.append(alive)
    return left


def main(arguments: list[str]) -> int:
    """Returns 0 where enough are killed, 1 where not, 2 where it cannot be run."""
    names, sample = arguments, None
    if "--sample" in arguments:
        at = arguments.index("--sample")
        names, number = [*arguments[:at], *arguments[at + 2 :]], arguments[at + 1 : at + 2]
        if not number or not number[0].isdecimal() or not int(number[0]):
            print("error: --sample needs a number of mutants, at least 1", file=sys.stderr)
            return 2
        sample = int(number[0])
    known = [Path(module).stem for module in TARGETS]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: {unknown[0]} is none of {', '.join(known)}", file=sys.stderr)
        return 2
    if find_spec("cosmic_ray") is None:
        print("error: cosmic-ray is not installed: pip install -e '.[mutation]'", file=sys.stderr)
        return 2
    failed = False
    for module in TARGETS:
        if names and Path(module).stem not in names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            copy_of(repository(), Path(scratch))
            chosen = list(mutants((Path(scratch) / module).read_text()))
            made = len(chosen)
            random.Random(SEED).shuffle(chosen)
            chosen = chosen[:sample]
            quick, left = survivors(module, chosen, Path(scratch))
        unexplained = [mutant for mutant in left if (module, mutant.added) not in EQUIVALENT]
        equivalent = len(left) - len(unexplained)
        share = 1.0 - len(unexplained) / max(1, len(chosen) - equivalent)
        counts = f"{len(chosen)} of {made} mutants, {len(chosen) - len(quick)} killed by the quick suite, "
        counts += f"{len(quick) - len(left)} by the thorough one alone, {equivalent} equivalent"
        print(f"{module}: {counts}, {len(unexplained)} not noticed: {share:.1%} killed", flush=True)
        for mutant in unexplained:
            print(f"  {mutant}")
        failed |= share < LEAST_KILLED
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
