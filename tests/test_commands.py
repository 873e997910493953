"""Every command has help with an example, and every command of README and the pages is one that there is.

Those of README are run, block by block: with SmolLM2, so this takes minutes. What would take an hour is made smaller.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from minipaged.cli import app
from minipaged.model import fetch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
HANG = 1800  # seconds, at least ten times what a busy machine needs


def parse(words):
    """Read a command's arguments as the program does, and run nothing."""
    assert words and words[0] in COMMANDS, f"there is no command {' '.join(words[:1])!r}"
    COMMANDS[words[0]].make_context(words[0], list(words[1:]))


def lines_of(path):
    """The lines of a page's code blocks, by block, without their comments."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [[line.split("  #")[0].strip() for line in block.splitlines() if line.strip()] for block in blocks]


def test_there_are_commands():
    assert {"demo", "generate", "check", "bench", "serve"} <= {*COMMANDS}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_every_command_has_an_example_that_is_right(name):
    [example] = re.findall(r"^\s*Example: minipaged (.*)$", COMMANDS[name].help, re.MULTILINE)
    assert example.split()[0] == name
    parse(shlex.split(example))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_commands_of_a_page_are_there(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in (line for block in lines_of(path) for line in block):
        for part in line.split(" && "):
            words = shlex.split(part) if re.match(r"\S*(minipaged|torchrun|make) ", part) else [""]
            if words[0].endswith("minipaged"):
                parse(words[1 : words.index("|") if "|" in words else None])
            elif "minipaged" in words:  # torchrun ... -m minipaged generate ...
                parse(words[words.index("minipaged") + 1 :])
            elif words[0] == "make":
                assert words[1] in targets, f"{path.name}: make {words[1]}"


README = [block for block in lines_of(ROOT / "README.md") if any(line.startswith(".venv/bin/") for line in block)]
SMALLER = {  # what is put behind a command that takes an hour, or minutes
    ".venv/bin/minipaged bench": " A --rounds 1 --scale 0.05 --system paged",
    ".venv/bin/minipaged bench attention": " --rounds 1",
    ".venv/bin/minipaged bench engine": " --rounds 1",
    ".venv/bin/minipaged demo --backend triton": " --max-tokens 1",
}


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(not fetch.is_fetched(), reason="SmolLM2 is not on this machine")
@pytest.mark.parametrize("block", README, ids=lambda block: block[0].rpartition("/")[2])
def test_the_commands_of_readme_run(block, tmp_path):
    """In a folder where README's paths lead somewhere. An exercise that is not written is no mistake (exit code 3)."""
    (tmp_path / "tutorials").symlink_to(ROOT / "tutorials")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for line in block:
        if not line.startswith(".venv/bin/"):
            continue  # make: its targets are jobs of their own
        process = subprocess.Popen(
            ["bash", "-c", line + SMALLER.get(line, "")],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if " serve " in line:
            assert b"/v1" in process.stdout.readline()
            os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(b"Hello\n", timeout=HANG)
        assert process.returncode in (0, 3), f"{line}\n{out.decode()}\n{err.decode()}"
        assert out or " serve " in line, line
        assert b"Traceback" not in err, err.decode()
