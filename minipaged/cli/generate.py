"""`minipaged generate` and `minipaged chat`: the engine on the command line."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from minipaged.engine.llm import LLM
    from minipaged.engine.sequence import RequestOutput, StreamOutput


def _cache(name: str) -> str:
    from minipaged.engine.cache_config import check_cache

    check_cache(name)  # before a model is loaded, or fetched
    return name


ModelOption = Annotated[str, typer.Option(help="smollm2-135m, tiny, a GGUF file, or a folder with safetensors")]
BlockSizeOption = Annotated[int, typer.Option(help="tokens in a block of the paged cache")]
BackendOption = Annotated[
    Literal["auto", "torch", "triton"],
    typer.Option(help="of the paged cache; Triton on a CPU is interpreted, and slow"),
]
NumBlocksOption = Annotated[int | None, typer.Option(help="blocks in the pool (default: at most 1 GiB of them)")]
MaxModelLenOption = Annotated[int | None, typer.Option(help="longest request, in tokens (default: the model's)")]
PreemptionOption = Annotated[
    Literal["recompute", "swap"], typer.Option(help="what the latest sequence does when blocks run out")
]
RanksOption = Annotated[
    int | None, typer.Option(help="processes to divide the model's heads over (default: as many as torchrun started)")
]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, float64, or auto: the faster of the first two")
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied")]
TopPOption = Annotated[float, typer.Option(help="draw from the likeliest tokens that make up this probability")]
SeedOption = Annotated[int | None, typer.Option(help="draw the same text again")]


def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads it from standard input")],
    model: ModelOption = "smollm2-135m",
    cache: Annotated[str, typer.Option(metavar="[contiguous|paged]", callback=_cache, help="where K and V live")] = (
        "paged"
    ),
    chat: Annotated[bool, typer.Option("--chat", help="ask it as a question, in the model's own chat format")] = False,
    max_tokens: Annotated[int, typer.Option(help="new tokens at most")] = 128,
    n: Annotated[int, typer.Option("--n", help="samples; they share the prompt's blocks")] = 1,
    beams: Annotated[
        int | None, typer.Option(help="search for the likeliest texts with this many beams; draws nothing")
    ] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: Annotated[int, typer.Option(help="draw from this many likeliest tokens; -1 for all")] = -1,
    min_p: Annotated[float, typer.Option(help="draw from tokens at least this times as likely as the likeliest")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1, tokens seen before become less likely")] = 1.0,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given more than once")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="with --json: log-probabilities of each token and of as many likeliest ones")
    ] = None,
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_model_len: MaxModelLenOption = None,
    preemption: PreemptionOption = "recompute",
    backend: BackendOption = "auto",
    dtype: DtypeOption = "float32",
    tensor_parallel_size: RanksOption = None,
    trace: Annotated[Path | None, typer.Option(help="write who held which block to this file: see minipaged trace")] = (
        None
    ),
    metrics: Annotated[bool, typer.Option("--metrics", help="print what the engine did, to standard error")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end, not the text")] = False,
) -> None:
    """Continue a text, token by token; with --n or --beams, in several ways.

    Example: minipaged generate "The moon is" --max-tokens 40
    """
    from minipaged import LLM, BeamSearchParams, SamplingParams
    from minipaged.engine.prompt import Prompt

    if beams is not None and (n > 1 or temperature > 0):
        raise ValueError("--beams searches for the likeliest texts: it goes with neither --n nor --temperature")
    if beams is not None and (stop or logprobs is not None or repetition_penalty != 1.0):
        raise ValueError("--beams goes with none of --stop, --logprobs and --repetition-penalty")
    params = SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        stop=stop,
        seed=seed,
        logprobs=logprobs,
    )
    search = None if beams is None else BeamSearchParams(beams, max_tokens=max_tokens)
    if trace is not None and not trace.parent.is_dir():
        raise ValueError(f"--trace: there is no folder {trace.parent}")
    llm = LLM(
        model,
        cache=cache,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        preemption=preemption,
        backend=backend,
        dtype=dtype,
        trace=trace is not None,
        tensor_parallel_size=_ranks() if tensor_parallel_size is None else tensor_parallel_size,
    )
    # Of the processes that torchrun started, rank 0 alone comes as far as this: it reads and writes.
    text = _standard_input() if prompt == "-" else prompt
    asked: Prompt = llm.tokenizer.chat_prompt([{"role": "user", "content": text}]) if chat else text
    try:
        if as_json or n > 1 or search:
            output = llm.beam_search(asked, search)[0] if search else llm.generate(asked, params)[0]
            if as_json:
                print(json.dumps(_fields(output, model, cache), ensure_ascii=False))
            else:
                _print_all(output, None if chat else text)
            failed = any(answer.finish_reason == "error" for answer in output.outputs)
        else:
            tokens = llm.stream(asked, params)  # refuses a wrong prompt here, before anything is printed
            if not chat:
                print(text, end="", flush=True)
            failed = _print_pieces(tokens)
            print()
    finally:  # and not by the engine: where the disk is full, the answer has been printed
        if trace is not None and llm.trace is not None and llm.trace.events:
            llm.trace.save(trace)
    if metrics:
        _print_metrics(llm)
    llm.close()
    if failed:
        print("error: the request failed; --json says why", file=sys.stderr)
        raise typer.Exit(1)


def chat(
    model: ModelOption = "smollm2-135m",
    system: Annotated[str | None, typer.Option(help="what the model is told before the conversation")] = None,
    max_tokens: Annotated[int, typer.Option(help="new tokens at most in an answer")] = 256,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.9,
    seed: SeedOption = None,
    num_blocks: NumBlocksOption = None,
    dtype: DtypeOption = "float32",
    metrics: Annotated[bool, typer.Option("--metrics", help="after each answer, what the prefix cache saved")] = False,
) -> None:
    """Talk with the model. Each turn finds the blocks of all turns before it. Ctrl-C stops an answer, Ctrl-D ends.

    Example: minipaged chat --system "You answer briefly." --metrics
    """
    from minipaged import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    llm = LLM(model, num_blocks=num_blocks, dtype=dtype)
    messages = [] if system is None else [{"role": "system", "content": system}]
    llm.tokenizer.apply_chat_template([*messages, {"role": "user", "content": ""}])  # refuses a model with no format
    while (question := _question()) is not None:
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        before, pieces, failed = llm.metrics(), list[str](), False
        try:
            tokens = llm.stream(llm.tokenizer.chat_prompt(messages), params)
        except ValueError as error:  # the conversation has become too long: the last turn is taken back
            messages.pop()
            print(f"error: {error}", file=sys.stderr)
            continue
        try:
            failed = _print_pieces(tokens, pieces)
        except KeyboardInterrupt:
            tokens.close()  # type: ignore[attr-defined]
        print("\n" if sys.stdin.isatty() else "")
        if failed:
            print("error: the answer failed here", file=sys.stderr)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        if metrics:
            now = llm.metrics()
            found = now.prefix_tokens_found - before.prefix_tokens_found
            asked = now.prefix_tokens_looked_up - before.prefix_tokens_looked_up
            print(f"[{found} of {asked} tokens were in the prefix cache]", file=sys.stderr)


def _ranks() -> int:
    """As many processes as torchrun started."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _question() -> str | None:
    """The next line, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no text in {sys.stdin.encoding}: {error}") from error


def _print_pieces(tokens: Iterator["StreamOutput"], pieces: list[str] | None = None) -> bool:
    """Print each piece of text when it is there, and append it to `pieces`. Returns whether the request failed."""
    failed = False
    for new in tokens:
        if pieces is not None:
            pieces.append(new.text)
        print(new.text, end="", flush=True)
        failed = new.finish_reason == "error"
    return failed


def _print_all(output: "RequestOutput", prompt: str | None) -> None:
    if prompt is not None:
        print(prompt)
    for answer in output.outputs:
        score = "" if answer.score is None else f" score {answer.score:.4f}"
        print(f"[{answer.index}{score}] {answer.text}")


def _print_metrics(llm: "LLM") -> None:
    from minipaged.viz.metrics_table import metrics_table

    table = Table(show_header=False, box=None)
    for what, how_much in metrics_table(llm.metrics()):
        table.add_row(what, how_much)
    Console(stderr=True).print(table)


def _fields(output: "RequestOutput", model: str, cache: str) -> dict[str, Any]:
    """One answer as one flat object; several as a list beside the prompt."""
    names = ("text", "token_ids", "finish_reason", "logprobs", "score", "error")
    found = [[(name, getattr(answer, name)) for name in names] for answer in output.outputs]
    answers = [{name: value for name, value in fields if value is not None} for fields in found]
    prompt = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids}
    said = answers[0] if len(answers) == 1 else {"outputs": answers}
    return {**prompt, **said, "model": model, "cache": cache}


def _standard_input() -> str:
    """All of it, but for the newline that `echo` puts at its end."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no text in {sys.stdin.encoding}: {error}") from error
