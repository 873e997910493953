"""The way from `LLM.generate` to the attention of a step is short enough to be read in one evening."""

import sys
from pathlib import Path

import pytest

import minipaged
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
