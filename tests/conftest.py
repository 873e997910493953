"""What all tests share: how hard Hypothesis tries, and the real model where it has been fetched."""

import os
import re
import sys
from functools import partial
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

# Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before triton is first imported.
if not glob("/dev/nvidia[0-9]*") and not glob("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests often run beside something else. Threads that wait in a loop then take the processor from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The processes of pytest-xdist share the cores; each, and what it starts, takes its part of them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _part = max(1, _cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_part))

# quick: every run. long: `make test-machines`. thorough: before a release, and once for each figure in a note.
# One counterexample, as small as can be, and at once: explaining it line by line would take longer than finding it.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "report_multiple_bugs": False,
    "phases": [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    # too_slow looks at a clock: on a busy machine it fails a test that is right. What a fixture holds (a folder, a
    # tokenizer) is the same for all examples of a test, and each example makes it as it wants it.
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("quick", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=1_000, **_COMMON)
settings.register_profile("thorough", max_examples=10_000, **_COMMON)
# course: `minipaged check`. The same file gives the same counterexample; a chapter says how many examples it takes.
settings.register_profile(
    "course", max_examples=int(os.environ.get("MINIPAGED_EXAMPLES", "50")), derandomize=True, **_COMMON
)
# Loops as plain Python, a thousand times as slow: a few examples pass through every line.
settings.register_profile("numba_as_python", max_examples=5, derandomize=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


pytest_plugins = ["by_chapter"]


def pytest_addoption(parser):
    parser.addoption(
        "--impl",
        metavar="DIR",
        help="a learner's exercises (minipaged start DIR) stand for our modules; "
        "with -m ch06 those of chapter 6, and of other chapters those that are finished",
    )
    parser.addoption(
        "--only", metavar="NAME", default="", help="of --impl: one file, class or function; the rest is ours"
    )


def pytest_configure(config):
    """Before any test is imported, and with it any module of ours."""
    folder = config.getoption("--impl")
    if folder is None:
        return
    from minipaged.course import impl, recorder

    chapters = {int(number) for number in re.findall(r"\bch(\d\d)\b", config.option.markexpr or "")} or None
    try:
        only = config.getoption("--only")
        modules = impl.choose(Path(folder), chapters, only)
        impl.install(modules, partial(recorder.watch, chapters=chapters) if recorder.is_on() else None, only)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32, loaded once."""
    from minipaged.model import fetch
    from minipaged.model.load import load_model

    if not fetch.is_fetched():
        pytest.skip("SmolLM2 is not here: run `minipaged fetch`")
    return load_model("smollm2-135m")


@pytest.fixture(autouse=True)
def one_thread_for_tiny_tensors(request):
    """Threads that wait for one another cost more than a tiny model computes, above all beside other processes.

    Tests of chapters that are plain Python need no torch, and do not wait for its import.
    """
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("smollm2") or request.node.get_closest_marker("oracle"):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    """triton 3.6's interpreter does not work with NumPy 2.4 or newer (triton issue 9171): skip what would need it."""
    if not os.environ.get("TRITON_INTERPRET"):
        return
    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return
    if triton < (3, 7) and numpy >= (2, 4):
        skip = pytest.mark.skip(reason="triton 3.6's interpreter needs NumPy below 2.4 (triton issue 9171)")
        for item in items:
            if item.get_closest_marker("ch08"):
                item.add_marker(skip)
