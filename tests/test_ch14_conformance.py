"""Chapter 14. The kit: it holds for a right engine, finds each planted fault, and claims no more than it tried."""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import chapter10
import kit
import ours
import pytest
import run
import toy
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

import serving_model
from test_ch10_scheduler import ServingMachine

pytestmark = pytest.mark.ch14

FOLDER = Path(kit.__file__).parent
SCRIPTS = 2 * settings.default.max_examples


@pytest.mark.parametrize("adapter", [toy.Toy, *ours.ADAPTERS], ids=lambda adapter: adapter.__name__)
def test_a_right_engine_holds(adapter):
    found = kit.run(adapter, SCRIPTS, number=0)
    assert found.machine is None, found.verdict
    assert found.verdict.startswith(f"held over {found.counts['scripts']:,} scripts with ")
    seen = {"prefix hits"} | ({"preemptions", "aborts"} if issubclass(adapter, kit.Engine) else {"refused"})
    seen |= {"forks", "copies on write", "blocks swapped to the host"} if adapter.swaps else set()
    assert all(found.counts[what] for what in seen), found.counts


@pytest.mark.parametrize("fault", toy.FAULTS)
def test_each_planted_fault_is_found_and_its_script_is_a_program(fault):
    """A failing script, run as the Python that it is printed as, leads the engine to the same end."""
    adapter = getattr(toy, fault)
    found = kit.run(adapter, number=1, shrink=False)
    assert found.machine and found.verdict.startswith(f"fails, first in script {found.first:,}: ")
    scope = {adapter.__name__: adapter}
    try:
        exec("\n".join(found.machine.calls), scope)
    except Exception as error:
        assert f"{type(error).__name__}: {error}" in found.verdict
    assert scope["engine"].tables() == found.machine.engine.tables()
    assert scope["engine"].free() == found.machine.engine.free()


def test_a_run_without_a_preemption_says_that_it_proves_little():
    class Roomy(toy.Toy):
        num_blocks = (500, 500)

    found = kit.run(Roomy, 10, number=0)
    assert found.machine is None and "0 preemptions" in found.verdict and found.verdict.endswith("proves little")


def test_a_wrong_adapter_fails_as_such():
    """An exception of the adapter's own is told like one of the engine's; a class that is none is an error."""

    class Wrong(toy.Toy):
        def tables(self):
            return {name: (table.blocks, table.computed + 1) for name, table in super().tables().items()}

    assert "AssertionError" in kit.run(Wrong, 200, number=0).verdict
    with pytest.raises(AttributeError):
        kit.run(object, 5)


def test_the_kit_can_be_copied():
    source = (FOLDER / "kit.py").read_text(encoding="utf-8")
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"hypothesis"}
    assert len(source.splitlines()) <= 400


# ---- the exercise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BlockManager", "Scheduler"])
def test_the_faults_of_the_exercise_are_seen_by_the_kit_and_not_by_chapter_10(name, monkeypatch):
    faulty = {"BlockManager": chapter10.BlockManager1, "Scheduler": chapter10.Scheduler2}[name]
    monkeypatch.setattr(serving_model, name, faulty)
    run_state_machine_as_test(ServingMachine)
    monkeypatch.setattr(ours, name, faulty)
    assert kit.run(ours.Minipaged, number=0, shrink=False).machine, "the kit does not see it"


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the program in this process: exit code, and all that it said."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run.main()
        return ended.value.code, capsys.readouterr().out

    return call


def test_the_command_says_what_it_tried_and_fails_where_the_engine_does(command, monkeypatch):
    """Without the shrinking, which takes seconds: a wrong adapter above is shrunk."""
    monkeypatch.setattr(kit, "run", partial(kit.run, shrink=False))
    code, said = command("toy", "--scripts", "20", "--seed", "0")
    assert code == 0 and "Toy held over " in said, said
    code, said = command("toy:pages_as_tokens", "--seed", "1")
    assert code == 1 and "pages_as_tokens fails, first in script " in said, said
    assert "engine = pages_as_tokens(" in said and "LOGICAL" in said and "PHYSICAL" in said
    assert "error: unknown is no adapter" in command("unknown")[0]


def test_an_engine_in_another_version_is_skipped_with_the_reason(tmp_path):
    """In a process of its own, as `make conformance` starts it."""
    adapter = tmp_path / "adapter.py"
    adapter.write_text('raise ImportError("written for engine 1.0, and 2.0 is installed")')
    skipped = subprocess.run([sys.executable, str(FOLDER / "run.py"), adapter], capture_output=True, text=True)
    assert skipped.returncode == 0, skipped.stderr
    assert skipped.stdout == "skipped, and nothing was tried: written for engine 1.0, and 2.0 is installed\n"


# ---- transformers ------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers_cb():
    try:
        import transformers_cb
    except ImportError as reason:
        pytest.skip(str(reason))
    return transformers_cb


@pytest.mark.oracle
def test_transformers_hangs_after_a_cancellation_and_holds_with_the_repair(transformers_cb):
    assert "wait" in kit.run(transformers_cb.Transformers, number=0, shrink=False).verdict
    found = kit.run(transformers_cb.Repaired, 300, number=0)
    assert found.machine is None and found.counts["preemptions"] and found.counts["prefix hits"], found.verdict


@pytest.mark.oracle
@pytest.mark.parametrize("repaired", [False, True])
def test_the_hang_is_seen_through_the_public_manager(transformers_cb, repaired):
    """Without the kit: the script that the page gives to transformers' developers."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "transformers_hang.py"), *["--repaired"] * repaired],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ("ended within" in done.stdout) and ("B, C" in done.stdout.splitlines()[-1]) == repaired, done.stdout
