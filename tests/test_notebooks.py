"""The notebooks as files: stripped, complete, and nothing imported before it was built. `make notebooks` runs them.

Plain JSON is enough to look at them, so these tests need no Jupyter. What the notebooks stand on
(minipaged/viz/notebook.py) is tested below, where its libraries are installed.
"""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minipaged.viz.notebook import breaks, holds, player_html

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
EVERY = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Chapter -> what its reader builds: not to be imported before the heading "Now read".
FINISHED = {
    1: ["minipaged.reference"],
    2: ["minipaged.model", "minipaged.engine", "minipaged.kvcache"],
    3: ["minipaged.kvcache.contiguous", "ContiguousCache", "minipaged.engine"],
    4: ["minipaged.memory.reservation"],
    5: ["minipaged.memory.page_table", "minipaged.memory.address_space", "minipaged.memory.kv_cache_size"],
    6: ["minipaged.memory.block"],
    7: ["minipaged.attention", "minipaged.kvcache", "minipaged.engine"],
    8: ["minipaged.kernels", "minipaged.attention"],
    9: ["minipaged.memory.prefix_cache", "minipaged.memory.block", "minipaged.memory.swap", "minipaged.engine", "LLM"],
    10: ["minipaged.engine", "LLM"],
    11: ["minipaged.simulator"],
    12: ["minipaged.simulator", "minipaged.memory.kv_cache_size"],
    13: ["minipaged.distributed", "minipaged.engine", "LLM"],
    14: ["kit", "toy", "ours"],
}

# Where a chapter's exercise is no file to fill in: the command that shows the answer.
COMMANDS = {11: "minipaged reproduce ", 12: "minipaged reproduce f", 14: "make conformance "}

# A part -> what a markdown cell of it says.
PARTS = {
    "the question": r"\*\*The question\.\*\*",
    "what the reader will be able to do": r"\*\*After this chapter you can\*\*",
    "the minutes": r"\*\*Minutes\.\*\* About \d+ ",
    "predict first": r"\*\*Predict first\.\*\*",
    "a property": r"^## \d+\. .*[Pp]ropert",
    "a planted bug": r"^(## \d+\. .*\bbug\b|\*\*The bug, planted\.\*\*)",
    "now read": r"^## \d+\. Now read `",
    "the exercise": r"^## \d+\. Exercise",
    "three questions": r"^## \d+\. Three questions",
    "in the wild": r"^## \d+\. In the wild",
    "sources": r"^## Sources",
}


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02d}" for number in range(1, 15)]


@EVERY
def test_it_is_kept_without_outputs_counts_or_ids(path, tmp_path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "run: make notebooks-strip"
        assert "id" not in cell, "run: make notebooks-strip"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4), "4.5 has ids, which change"
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    runner().stripped(copy)
    assert copy.read_bytes() == path.read_bytes(), "run: make notebooks-strip"


@EVERY
def test_its_first_cell_of_code_installs_what_is_missing(path):
    first = cells(path, "code")[0]
    address = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert first == runner().SETUP.format(repository=address), "run: make notebooks-strip"


@EVERY
def test_it_has_all_its_parts_in_order(path):
    text = "\n".join(cells(path, "markdown"))
    places = []
    for part, pattern in PARTS.items():
        found = re.search(pattern, text, re.MULTILINE)
        assert found, f"{path.name} lacks {part}"
        places.append(found.start())
    assert places == sorted(places), dict(zip(PARTS, places, strict=True))
    chapter = int(path.name[:2])
    assert text.startswith(f"# Chapter {chapter}. ")
    assert COMMANDS.get(chapter, f"minipaged check {chapter} ") in text
    wild = text[text.index(" In the wild") : text.index("## Sources")]
    assert re.search(r"commit [0-9a-f]{7}", wild), "what is said of another project names the commit that was read"


@EVERY
def test_answers_are_folded(path):
    for text in cells(path, "markdown"):
        opened = text.count("<details><summary>Answer</summary>\n\n")
        assert opened == text.count("<details>") == text.count("</details>") == text.count("<summary>")
        if text.startswith("**Predict first.**") or "\n**Predict first.**" in text:
            assert opened == 1, text
    text = "\n".join(cells(path, "markdown"))
    questions = text[text.index(" Three questions") : text.index(" In the wild")]
    assert questions.count("<details>") == 3
    assert [n for n in "1234" if f"\n**{n}.** " in questions] == ["1", "2", "3"]


@EVERY
def test_its_cells_are_few_and_small(path):
    code = cells(path, "code")
    assert 10 <= len(code) - 1 <= 25  # without the one that installs
    for source in code:
        ast.parse(source)  # plain Python: no magic of one front end
        assert max(map(len, source.splitlines())) <= 98, "a longer line does not fit the page"
        assert len(source.splitlines()) <= 45, source


@EVERY
def test_a_property_holds_and_a_planted_bug_breaks_it(path):
    code = "\n".join(cells(path, "code"))
    assert "holds(" in code and "breaks(" in code and "@given(" in code


@EVERY
def test_nothing_is_imported_before_it_was_built(path):
    chapter, built = int(path.name[:2]), False
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            built = built or bool(re.search(PARTS["now read"], source, re.MULTILINE))
            continue
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                names += [alias.name for alias in node.names]  # a class may come from where it is re-exported
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                early = [finished for finished in FINISHED.get(chapter, []) if name.startswith(finished)]
                assert built or not early, f"{name} is imported too early"


@EVERY
def test_the_prose_keeps_to_the_style(path):
    for text in cells(path, "markdown"):
        assert not re.search(r"\b(simply|obviously|just|of course|trivial\w*)\b", text, re.IGNORECASE), text


# ---- what the notebooks stand on -------------------------------------------------------------------------------------


def test_the_smallest_counterexample_comes_back(capsys):
    @given(n=st.integers(0, 100), other=st.integers(0, 9))
    def small_enough(n, other):
        assert n < 17, f"{n} is too large"

    assert breaks(small_enough) == {"n": 17, "other": 0}
    said = capsys.readouterr().out
    assert "n = 17" in said and "AssertionError: 17 is too large" in said and "Traceback" not in said
    with pytest.raises(AssertionError, match="too large"):
        holds(small_enough)


def test_a_bug_that_is_not_caught_is_said(capsys):
    @given(n=st.integers(0, 100))
    def fine(n):
        pass

    holds(fine, examples=30)
    assert capsys.readouterr().out == "fine: holds for 30 examples\n"
    with pytest.raises(AssertionError, match="not caught"):
        breaks(fine)


def test_a_failure_is_not_explained_line_by_line():
    """Hypothesis traces every line for that, which takes an interpreted kernel minutes, and nothing of it is shown."""

    @given(n=st.integers(0, 100))
    def small_enough(n):
        assert n < 17

    profile = settings.get_current_profile_name()
    settings.load_profile("default")  # as in a notebook: that of the tests does not explain either
    try:
        breaks(small_enough)
    finally:
        settings.load_profile(profile)
    assert Phase.explain not in small_enough._hypothesis_internal_use_settings.phases


def test_a_slider_shows_one_picture_also_without_its_script():
    html = player_html(["<svg>a</svg>", "<svg>b</svg>", "<svg>c</svg>"], ["first"], start=1)
    shown = re.findall(r'visibility:(\w+)"><svg>(\w)', html)
    assert shown == [("hidden", "a"), ("visible", "b"), ("hidden", "c")]
    assert 'max="2" value="1"' in html and "3 of 3" in html
    with pytest.raises(ValueError, match="pictures"):
        player_html([], [])


def test_a_chart_takes_the_colours_of_its_page():
    pytest.importorskip("matplotlib", reason="charts need matplotlib: pip install 'minipaged[tutorials]'")
    from minipaged.viz.notebook import chart, chart_svg

    figure, axes = chart("context [tokens]", "time [ms]")
    axes.plot([1, 2], [3, 4])
    svg = chart_svg(figure, "two points & a line")
    assert svg.startswith("<svg ") and 'aria-label="two points &amp; a line"' in svg
    assert "var(--mp-ink)" in svg and "stroke: var(--mp-c0)" in svg
    assert "#010203" not in svg and "<metadata>" not in svg


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("1 + 1", None),
        ("raise ValueError('no such block')", "no such block"),
        ("import warnings; warnings.warn('old name')", "wrote to stderr"),
        ("import sys; print('minipaged: compiling loops for this processor', file=sys.stderr)", None),
        ("import time; time.sleep(3)", "took|timed out"),
    ],
)
def test_the_runner_says_what_is_wrong_with_a_notebook(code, problem, tmp_path):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"running notebooks needs {package}: pip install 'minipaged[tutorials]'")
    path = tmp_path / "01_example.ipynb"
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": code}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
    _, seconds, said = runner().run(path, 2.0 if "sleep" in code else 600.0, tmp_path / "ran")
    if problem is None:
        assert said is None and seconds > 0
    else:
        assert said is not None and re.search(problem, said)
    assert (tmp_path / "ran" / path.name).is_file()


def test_without_the_model_the_notebooks_go_on_with_tiny(monkeypatch, tmp_path, capsys):
    from minipaged.viz.notebook import model_or_tiny

    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path))
    name, model = model_or_tiny()
    assert name == "tiny" and model.transformer.config.hidden_size == 32
    assert "SmolLM2 is not on this machine" in capsys.readouterr().out
