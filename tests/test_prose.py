"""What prose names exists: paths, modules and methods of classes, between backticks in pages, notebooks and code.

Prose about other projects names their files. They are known by how they begin; a page of links to them is left out.
"""

import ast
import json
import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [path for folder in ("minipaged", "kernels", "tests", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tools").rglob("*.md")]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
ELSEWHERE = ROOT / "docs" / "wild.md"  # where the ideas stand in other engines
FOREIGN = (
    "vllm/",
    "python/sglang/",
    "src/transformers/",
    "tensorrt_llm/",
    "tests/kernels/",
    "tests/v1/",
    "vidur/",
    "torch/",
)
FOREIGN_NAMES = (
    "memory_pool.py",
    "MHATokenToKVPool",
    "ReqToTokenPool",
    "ScheduleBatch",
    "DynamicLayer",
    "PluginConfig",
)
FOREIGN_NAMES += ("BeamSearchSequence",)
SUFFIXES = r"\.(py|md|ipynb|toml|json|jsonl|txt|js|svg|yml)"


def named(path):
    """The texts between backticks in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return set(re.findall(r"`([^`\n]+)`", text))


@cache
def files():
    outside, found = {".venv", ".git", "site", "build", "node_modules", "__pycache__"}, set()
    for folder, inner, names in os.walk(ROOT):
        inner[:] = set(inner) - outside  # not walked through: an environment has ten times as many files as we have
        found |= {"/" + (Path(folder) / name).relative_to(ROOT).as_posix() for name in names}
    return found


@cache
def members():
    """Class -> every name that stands in its body, those of its bases' bodies too."""
    classes, bases = {}, {}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                inside = list(ast.walk(node))
                names = classes.setdefault(node.name, set())
                names |= {each.name for each in inside if isinstance(each, ast.FunctionDef)}
                names |= {each.attr for each in inside if isinstance(each, ast.Attribute)}
                names |= {each.id for each in inside if isinstance(each, ast.Name)}
                bases.setdefault(node.name, set()).update(base.id for base in node.bases if isinstance(base, ast.Name))
    return {name: found.union(*(classes.get(base, set()) for base in bases[name])) for name, found in classes.items()}


def is_there(text):
    """Whether what `text` names exists, where it is a name of the kinds that are looked at."""
    if text.startswith(FOREIGN) or text.startswith(FOREIGN_NAMES):
        return True
    if re.fullmatch(rf"[\w./-]+{SUFFIXES}", text) and not text.startswith("."):
        return any(file.endswith("/" + text.removeprefix("../").removeprefix("./")) for file in files())
    if re.fullmatch(r"minipaged(\.\w+)+", text):
        parts = text.replace("minipaged.kernels", "kernels").split(".")
        whole, parent = ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])
        if whole.with_suffix(".py").exists() or (whole / "__init__.py").exists():
            return True
        sources = [each for each in (parent.with_suffix(".py"), parent / "__init__.py") if each.exists()]
        return any(re.search(rf"\b{parts[-1]}\b", each.read_text(encoding="utf-8")) for each in sources)
    if (found := re.fullmatch(r"([A-Z]\w+)\.(\w+)(\(.*\))?", text)) and not re.search(SUFFIXES + "$", text):
        return found[2] in members().get(found[1], ())
    return True


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, *CODE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_prose_names_is_there(path):
    if path == ELSEWHERE:
        pytest.skip("it names code of other engines, with links to it")
    missing = sorted(text for text in named(path) if not is_there(text))
    assert not missing, f"{path.relative_to(ROOT)} names what is not there: {missing}"


@pytest.mark.parametrize(
    "text", ["memory/unpaged.py", "minipaged.memory.unpaged", "BlockTable.replace", "Team.start", "tests/test_ch99.py"]
)
def test_what_is_not_there_is_found(text):
    assert not is_there(text)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_page_names_a_line_of_our_code_by_its_number(path):
    assert not [text for text in named(path) if re.search(r"\.py:\d+$", text)]
