"""Chapter 10. The serving engine: requests, sampling, the scheduler, and `LLM` on top.

Imported lazily: the scheduler is plain Python, and a program that wants only that does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipaged.engine.beam_scheduler import BeamSearchParams
    from minipaged.engine.llm import LLM
    from minipaged.engine.sequence import CompletionOutput, RequestOutput, SamplingParams

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from minipaged.engine.llm import LLM

        return LLM
    if name == "BeamSearchParams":
        from minipaged.engine.beam_scheduler import BeamSearchParams

        return BeamSearchParams
    if name in __all__:
        from minipaged.engine import sequence

        return getattr(sequence, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
