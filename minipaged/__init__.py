"""minipaged: PagedAttention from scratch, a course and a reference implementation.

from minipaged import LLM, SamplingParams

llm = LLM(model="smollm2-135m", cache="paged")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs[0].text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipaged.engine import LLM, BeamSearchParams, CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: `import minipaged` itself costs milliseconds, and no torch."""
    if name in __all__:
        from minipaged import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
