"""One system under test, in a process of its own: it loads a model, then runs a workload whenever it is told to.

    python worker.py SYSTEM MODEL DTYPE          one JSON line in (a workload), one JSON line out (seconds, tokens)

A peer may live in another interpreter, which has no minipaged: so this file imports each system only when it is asked
for, and nothing of ours at its top. All systems run greedily, with the threads that OMP_NUM_THREADS gives them.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[dict[str, Any]], dict[str, Any]]

# Python puts this file's folder first, and transformers asks whether there is a module `kernels`: it would find ours.
if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]


def ours(cache: str, model: str, dtype: str, caching: bool = False, static: bool = False) -> Run:
    """The engine with one of its caches, kept from one run of a workload to the next as a server's is.

    caching: it is made again for every run, from one copy of the weights: what the last one found is not there.
    static: requests enter when all others have left, as in servers before iteration-level scheduling.
    """
    from minipaged import LLM, SamplingParams
    from minipaged.cdiv import cdiv
    from minipaged.model.load import load_model

    loaded = load_model(model, dtype)
    kept: dict[str, LLM] = {}

    def engine(work: dict[str, Any], context: int) -> LLM:
        if caching or work["name"] not in kept:
            kept.clear()
            kept[work["name"]] = LLM(
                loaded,
                cache=cache,
                max_model_len=context,
                num_blocks=len(work["prompts"]) * cdiv(context, 16),
                max_num_seqs=work["places"],
                enable_prefix_caching=caching,
            )
        return kept[work["name"]]

    def run(work: dict[str, Any]) -> dict[str, Any]:
        prompts, new, arrivals = work["prompts"], work["new_tokens"], work["arrivals"]
        llm = engine(work, max(len(p) + n for p, n in zip(prompts, new, strict=True)))
        before = llm.metrics()
        start = time.perf_counter()
        first: dict[str, float] = {}
        held: list[float] = []
        requests: list[Any] = []
        step = 0
        while len(requests) < len(prompts) or not all(request.finished for request in requests):
            enters = 0 if static and llm.has_unfinished() else work["places"] if static else len(prompts)
            while enters and len(requests) < len(prompts) and (not arrivals or arrivals[len(requests)] <= step):
                enters -= 1
                params = SamplingParams(max_tokens=new[len(requests)], ignore_eos=True)
                prompt: Any = {"prompt_token_ids": prompts[len(requests)]}
                requests.append(llm.add_request(prompt, params))
            for seq in llm.step():
                first.setdefault(seq.request_id, time.perf_counter() - start)
            if len(llm.scheduler.running) == len(prompts):
                held.append(llm.blocks.num_stored_tokens / (llm.blocks.num_used * llm.blocks.block_size))
            step += 1
        seconds = time.perf_counter() - start
        after = llm.metrics()
        return {
            "seconds": seconds,
            "tokens": [request.output().outputs[0].token_ids for request in requests],
            "first_token_seconds": sum(first.values()) / len(first),
            "scheduler_share": (after.scheduler_seconds - before.scheduler_seconds)
            / (after.step_seconds - before.step_seconds),
            "slots_with_tokens": sum(held) / len(held) if held else None,  # while all requests run
            "prefix_tokens_found": after.prefix_tokens_found - before.prefix_tokens_found,
        }

    return run


def recompute(model: str, dtype: str) -> Run:
    """Chapter 2's loop, which keeps nothing: every step computes the whole of every text."""
    from minipaged.model.load import load_model
    from minipaged.model.recompute import generate

    transformer = load_model(model, dtype).transformer

    def run(work: dict[str, Any]) -> dict[str, Any]:
        steps, times = [], []
        start = time.perf_counter()
        for tokens in generate(transformer, work["prompts"], max(work["new_tokens"])):
            steps.append(tokens)
            times.append(time.perf_counter() - start)
        texts = zip(*steps, strict=True)
        return {
            "seconds": times[-1],
            "tokens": [list(text[:new]) for text, new in zip(texts, work["new_tokens"], strict=True)],
            "first_token_seconds": times[0],
        }

    return run


def transformers(model: str, dtype: str) -> Run:
    """`generate` over a batch that is padded on the left to its longest prompt."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.pad_token_id = 0

    def run(work: dict[str, Any]) -> dict[str, Any]:
        prompts = work["prompts"]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            out = loaded.generate(ids, attention_mask=mask, max_new_tokens=max(work["new_tokens"]), do_sample=False)
        return {"seconds": time.perf_counter() - start, "tokens": out[:, longest:].tolist()}

    return run


def vllm(model: str, dtype: str) -> Run:
    """vLLM's own `LLM`, eager, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM, SamplingParams

    loaded = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=2048, enable_prefix_caching=False, seed=0)

    def run(work: dict[str, Any]) -> dict[str, Any]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in work["new_tokens"]]
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        start = time.perf_counter()
        out = loaded.generate(prompts, params, use_tqdm=False)
        return {"seconds": time.perf_counter() - start, "tokens": [list(o.outputs[0].token_ids) for o in out]}

    return run


def main() -> None:
    system, model, dtype = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    makers: dict[str, Callable[[], Run]] = {
        "paged": lambda: ours("paged", model, dtype),
        "paged, prefix cache": lambda: ours("paged", model, dtype, caching=True),
        "paged, static batches": lambda: ours("paged", model, dtype, static=True),
        "contiguous": lambda: ours("contiguous", model, dtype),
        "recompute": lambda: recompute(model, dtype),
        "transformers": lambda: transformers(model, dtype),
        "vllm": lambda: vllm(model, dtype),
    }
    run = makers[system]()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        result = run(json.loads(line))
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
