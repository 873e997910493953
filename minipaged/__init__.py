"""minipaged: PagedAttention from scratch, a course and a reference implementation.

from minipaged import LLM, SamplingParams

llm = LLM(model="smollm2-135m", cache="paged")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# After each product, the threads of torch's OpenMP wait for the next one in a loop, by default for milliseconds. In
# a model of many layers that is too long: on a machine that does other things too they take the cores from each other
# (a step of 32 sequences on two busy cores took 1.0 s, and 0.2 s when they sleep soon). It is read once, when torch is
# imported. Where the environment says something about it already, that stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # some tenths of a millisecond

if TYPE_CHECKING:
    from minipaged.engine.beam_scheduler import BeamSearchParams
    from minipaged.engine.llm import LLM
    from minipaged.engine.sequence import CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: `import minipaged` itself costs milliseconds, and no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"LLM": "llm", "BeamSearchParams": "beam_scheduler"}.get(name, "sequence")
    return getattr(import_module(f"minipaged.engine.{module}"), name)
