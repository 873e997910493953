"""Chapter 10. The serving engine: requests, sampling, the scheduler, and `LLM` on top.

Imported lazily: the scheduler is plain Python, and a program that wants only that does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipaged.engine.beam_scheduler import BeamSearchParams as BeamSearchParams
    from minipaged.engine.llm import LLM as LLM
    from minipaged.engine.sequence import CompletionOutput, RequestOutput, SamplingParams

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"LLM": "llm", "BeamSearchParams": "beam_scheduler"}.get(name, "sequence")
    return getattr(import_module(f"minipaged.engine.{module}"), name)
