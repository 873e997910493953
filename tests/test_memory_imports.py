"""minipaged/memory/ is plain Python: it is read in an evening, and runs in a browser and in the simulator.

Outside of the folder it imports the one line of minipaged/cdiv.py, which imports nothing.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minipaged.memory

MODULES = sorted(Path(minipaged.memory.__file__).parent.glob("*.py"))
CDIV = Path(minipaged.__file__).with_name("cdiv.py")


def imported(tree):
    """Every module that an import statement names, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_nothing_is_imported_but_the_standard_library_and_memory(path):
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        ours = name in ("minipaged.memory", "minipaged.cdiv") or name.startswith("minipaged.memory.")
        assert ours or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_rounding_up_imports_nothing():
    assert not [*imported(ast.parse(CDIV.read_text(encoding="utf-8")))]


def test_nothing_heavy_comes_along():
    """Whatever minipaged/__init__.py does: who imports the memory gets no tensor library."""
    names = [f"minipaged.memory.{path.stem}" for path in MODULES if path.stem != "__init__"]
    code = f"import sys, {', '.join(names)}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "numba", "triton", "hypothesis"} & set(loaded)


def test_the_package_and_the_scheduler_bring_no_compiler_and_no_tensor_library():
    code = "import sys, minipaged, minipaged.engine, minipaged.engine.scheduler; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "numba", "triton"} & set(loaded)
