"""The way from `LLM.generate` to the attention of a step is short enough to be read in one evening."""

import sys
from pathlib import Path

import pytest

import minipaged
import minipaged.kernels
from minipaged import LLM, SamplingParams
from minipaged.attention import compiled
from minipaged.model.transformer import Transformer

pytestmark = pytest.mark.ch10

PACKAGE = Path(minipaged.__file__).parent


@pytest.mark.parametrize(("by_the_formulas", "most"), [(True, 8), (False, 6)])
def test_eight_frames_from_generate_to_attention(by_the_formulas, most):
    """`generate` and the attention function among them; the frames of torch and of Python's library do not count. The
    compiled operations stand in one function, and save two."""
    ways = set()

    def call(frame, event, argument):
        if event == "call" and frame.f_code is compiled.paged_attention.__code__:
            way = []
            while frame is not None and (not way or way[-1] != "generate"):
                if frame.f_code.co_filename.startswith(str(PACKAGE)):
                    way.append(frame.f_code.co_name)
                frame = frame.f_back
            ways.add(tuple(way[::-1]))

    llm = LLM("tiny", max_model_len=32)
    if by_the_formulas:
        llm.runner.transformer.__class__ = Transformer
    sys.setprofile(call)
    try:
        llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=3), progress=False)
    finally:
        sys.setprofile(None)
    assert ways and all(way[0] == "generate" and len(way) <= most for way in ways), ways


def test_the_scheduler_fits_in_two_hundred_lines():
    assert len((PACKAGE / "engine" / "scheduler.py").read_text().splitlines()) <= 200


# The reader's set: all that a reader of the course reads, without benches and without what reads files. Its first aim
# was 5,100 lines, and 2,700 for the way of `generate`; later work may add 300 and 150. It added what users bring
# (arguments, prompts: 90 lines), what models differ in (windows, biases, norms, frequencies: 250), and a table of each
# GPU for the kernels (120).
FOLDERS = ("memory", "attention", "kvcache", "model", "engine", "kernels")
FILES = {"weights", "gguf_file", "load", "tokenizer", "tokenizer_files", "families", "fetch", "weight_cache"}
FILES |= {"folder", "rope_scaling"}  # which were parts of weights and families
FILES |= {"trial"}  # a benchmark of the ways to multiply, which keeps its figures in a file
WAY = {
    "engine": "__init__ arguments prompt sequence scheduler scheduler_output sampling runner llm_engine llm "
    "detokenizer cache_config metrics",
    "memory": "block_manager block_table block_allocator prefix_cache trace",
    "attention": "compiled checks",
    "kvcache": "paged swap_space",
    "model": "transformer batch",
}


def folder(name):
    return Path(minipaged.kernels.__file__).parent if name == "kernels" else PACKAGE / name


def num_lines(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def read_by_all():
    modules = [path for name in FOLDERS for path in folder(name).glob("*.py") if path.stem not in FILES]
    return [PACKAGE / "reference.py", *modules]


def test_the_readers_set_does_not_grow():
    assert num_lines(read_by_all()) <= 5_400


def test_the_way_of_generate_does_not_grow():
    assert num_lines(folder(name) / f"{stem}.py" for name, stems in WAY.items() for stem in stems.split()) <= 2_820


def test_attention_does_not_grow():
    assert num_lines((PACKAGE / "attention").glob("*.py")) <= 450


def test_a_module_has_at_most_250_lines():
    """Those that read files too."""
    files = [path for path in (PACKAGE / "model").glob("*.py") if path.stem in FILES]
    longer = {path.name: num_lines([path]) for path in read_by_all() + files if num_lines([path]) > 250}
    assert not longer
