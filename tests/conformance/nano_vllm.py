"""nano-vLLM under the kit, without its model and without a GPU.

Written on 28 November 2026 for GeeeekExplorer/nano-vllm at commit bb823b3e06983d71485a8e1f23715ebd87d98ef8 (0.2.0).
NANO_VLLM is the folder of a checkout; numpy, transformers and xxhash are its scheduler's imports.
"""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import kit

if "NANO_VLLM" not in os.environ:
    raise ImportError("NANO_VLLM is not set: it is the folder of a checkout of nano-vLLM")
folder = Path(os.environ["NANO_VLLM"], "nanovllm")
if not (folder / "engine").is_dir():
    raise ImportError(f"NANO_VLLM must be the folder of a checkout of nano-vLLM: {folder / 'engine'} is no folder")
# The package's own __init__ imports flash-attn and Triton, which the scheduler does not need.
sys.modules["nanovllm"] = ModuleType("nanovllm")
sys.modules["nanovllm"].__path__ = [str(folder)]

from nanovllm.engine.block_manager import BlockManager  # noqa: E402
from nanovllm.engine.scheduler import Scheduler  # noqa: E402
from nanovllm.engine.sequence import Sequence  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402

if not hasattr(BlockManager, "hash_blocks"):
    raise ImportError(f"the nano-vLLM in {folder} has no BlockManager.hash_blocks: the adapter is for commit bb823b3")


class NanoVllm(kit.Engine):
    # The engine takes multiples of 256, since its attention kernel does; its scheduler takes any size from 2.
    # With blocks of one token, can_append never asks for one: len(seq) % 1 is never 1.
    block_sizes = (2, 3, 4)
    aborts = aborts_twice = False  # no request can be dropped

    def __init__(self, num_blocks, block_size, budget, max_seqs):
        Sequence.block_size, self.block_size, self.num_blocks = block_size, block_size, num_blocks
        config = SimpleNamespace(
            max_num_seqs=max_seqs,
            max_num_batched_tokens=budget,
            eos=-1,
            kvcache_block_size=block_size,
            num_kvcache_blocks=num_blocks,
        )
        self.scheduler, self.names, self.step = Scheduler(config), {}, None

    def fits(self, prompt_len, max_tokens):
        """Nothing is documented. What exceeds the pool ends the engine on an assertion (its issue 274)."""
        return -(-(prompt_len + max_tokens - 1) // self.block_size) <= self.num_blocks  # the last token is not written

    def add(self, request, prompt, max_tokens):
        seq = Sequence(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        self.names[seq.seq_id] = request
        self.scheduler.add(seq)

    def schedule(self):
        self.step = seqs, _ = self.scheduler.schedule()
        return [], [
            kit.Work(self.names[seq.seq_id], seq.num_cached_tokens, seq.num_scheduled_tokens, list(seq.block_table))
            for seq in seqs
        ]

    def accept(self, next_token):
        seqs, is_prefill = self.step
        due = [seq.num_cached_tokens + seq.num_scheduled_tokens == seq.num_tokens for seq in seqs]
        tokens = [next_token(self.names[seq.seq_id]) if last else 0 for seq, last in zip(seqs, due, strict=True)]
        self.scheduler.postprocess(seqs, tokens, is_prefill)  # the token behind a part of a prompt is thrown away
        return [
            kit.Output(self.names[seq.seq_id], [token], seq.is_finished)
            for seq, token, last in zip(seqs, tokens, due, strict=True)
            if last
        ]

    def free(self):
        return {"device": len(self.scheduler.block_manager.free_block_ids)}

    def tables(self):
        seqs = [*self.scheduler.waiting, *self.scheduler.running]
        held = [seq for seq in seqs if seq.block_table]
        return {self.names[seq.seq_id]: kit.Table(list(seq.block_table), seq.num_cached_tokens) for seq in held}


ADAPTERS = [NanoVllm]

if __name__ == "__main__":
    kit.main(ADAPTERS, scripts=2000)
