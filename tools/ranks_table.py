"""Chapter 13. What ranks hold and exchange, counted in a running engine beside the formulas of `shares`.

    python tools/ranks_table.py smollm2-135m 1 2 3        the table of docs/tensor_parallel.md

Each number of ranks is started, and writes a few tokens. Bytes of weights and of K/V are those of the tensors of each
rank, and collectives are those that its group counted. Where one differs from its formula, that is all that is said.
"""

import sys
from collections.abc import Iterator

from minipaged.distributed.shares import local_config, shares, step_traffic, weight_bytes
from minipaged.engine.llm import LLM
from minipaged.engine.sequence import SamplingParams

NUM_NEW = 8  # tokens for each prompt
PROMPTS = ("The capital of France is", "The capital of Italy is", "Once upon a time")


def count(model: str, size: int, dtype: str = "float32") -> Iterator[tuple[str, ...]]:
    """Rows of the table of one number of ranks. Raises ValueError where a count is not what its formula says."""
    llm = LLM(model, tensor_parallel_size=size, dtype=dtype, num_blocks=16, max_model_len=64)
    llm.generate(list(PROMPTS), SamplingParams(max_tokens=NUM_NEW, ignore_eos=True), progress=False)
    config, metrics = llm.config, llm.metrics()
    tokens, ends = metrics.num_tokens_computed, metrics.num_tokens_generated
    if size == 1:
        held = sum(parameter.nbytes for parameter in llm.runner.transformer.parameters())
        reports = [{"weight_bytes": held, "kv_bytes_per_token": llm.runner.bytes_per_token, "calls": {}, "bytes": {}}]
    else:
        reports = llm.runner.reports()  # type: ignore[attr-defined]
    llm.close()
    traffic = step_traffic(config, size, tokens, ends, llm.runner.dtype)
    calls = {"all_reduce": metrics.num_steps * traffic.all_reduces, "gather": metrics.num_steps * traffic.gathers}
    brought = {"all_reduce": traffic.all_reduce_bytes, "gather": traffic.gather_bytes}
    for rank, (share, report) in enumerate(zip(shares(config, size), reports, strict=True)):
        local = local_config(config, share)
        expected = {
            "weight_bytes": weight_bytes(local, llm.runner.dtype),
            "kv_bytes_per_token": local.kv_bytes_per_token(llm.runner.dtype),
            "calls": calls if size > 1 else {},
            "bytes": brought if size > 1 else {},
        }
        for name, value in expected.items():
            if report[name] != value:
                raise ValueError(f"rank {rank} of {size}: {name} is {report[name]}, and the formula says {value}")
        yield (
            f"{size}", f"{rank}", _run(share.heads), _run(share.kv_heads),
            f"{report['weight_bytes']:,}", f"{report['kv_bytes_per_token']:,}",
            f"{calls['all_reduce']:,}", f"{brought['all_reduce']:,}", f"{calls['gather']:,}", f"{brought['gather']:,}",
        )  # fmt: skip


def _run(numbers: range) -> str:
    """range(0, 6) -> 0 to 5."""
    return f"{numbers.start}" if len(numbers) == 1 else f"{numbers.start} to {numbers.stop - 1}"


COLUMNS = (
    "ranks", "rank", "query heads", "KV heads", "weights, bytes", "K and V of a token, bytes", "all-reduces",
    "their bytes", "gathers", "their bytes",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """arguments: a model's name, file or folder, and numbers of ranks. Prints one table, as Markdown."""
    model, sizes = (arguments or ["smollm2-135m"])[0], [int(size) for size in arguments[1:]] or [1, 2, 3]
    rows = [row for size in sizes for row in count(model, size)]
    print("\n".join("| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
