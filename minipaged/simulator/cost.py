"""Chapter 11. How long a step takes: bytes over bandwidth, and operations over speed.

    a pass      max(weights / HBM, 2 * parameters * tokens / FLOP/s) + bytes of K and V read / HBM
    a step      one pass for the decodes, one for the prompts, and what was copied or swapped before them

Decoding reads all weights to make one token a sequence, so a batch of 30 takes hardly longer than a batch of 1: that is
why room for a larger batch is throughput. Prompts go in a pass of their own, as in the paper's system: vLLM ran either
prompts or decodes in a step, by default, until its version 1 (2025). The engine of chapter 10 mixes them into one
pass.

Nothing here is fitted: each constant has a source. The largest doubt is `utilisation`, which others measured with
another model and another engine. It stretches all seconds alike, so ratios between servers hardly depend on it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from minipaged.memory.kv_cache_size import OPT_13B, KVShape


@dataclass(frozen=True)
class Device:
    """Peaks of the data sheet, and how much of them a serving engine reaches.

    bandwidth: bytes/s of the device's memory. flops: of dense fp16 matrices, a second. link: bytes/s to the host, one
    way. utilisation: the share of bandwidth and flops that is reached from step to step, the host's pauses included.
    """

    name: str
    bandwidth: float
    flops: float
    link: float
    utilisation: float = 1.0

    def __post_init__(self) -> None:
        for field in ("bandwidth", "flops", "link"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} of device {self.name!r} must be above 0, got {getattr(self, field)}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation of device {self.name!r} must be in (0, 1], got {self.utilisation}")


# Peaks of the A100: NVIDIA A100 data sheet: 40 GB of HBM2 at 1,555 GB/s, 312 TFLOP/s in fp16 without sparsity, PCIe 4.0
# x16, 64 GB/s both ways together. Peaks of the H100: its data sheet (SXM): 3.35 TB/s, 989 TFLOP/s, PCIe 5.0 x16.
# Utilisation: Databricks, "LLM Inference Performance Engineering: Best Practices" (2023): of the peak bandwidth, 55 %
# were reached on A100s of 40 GB and 60 % on H100s, at batch 1, as (bytes of weights and cache) / seconds a token.
# We take the same share for operations; prompts are short enough that their pass reads weights for most of its time.
A100_40GB = Device("A100 40GB", bandwidth=1555e9, flops=312e12, link=32e9, utilisation=0.55)
H100 = Device("H100", bandwidth=3350e9, flops=989e12, link=64e9, utilisation=0.60)

# The PagedAttention paper, Table 1: 26 GB of parameters in fp16.
OPT_13B_PARAMETERS = 13e9
# The paper, section 7.1: attention through a block table is 20 to 26 % slower than FasterTransformer's. The middle.
PAGED_ATTENTION = 1.23
# One cudaMemcpyAsync: 2.3 us on an H20 (FlexKV, pull request 193), 3.5 us on an H100 (torchcomms, pull request 2195).
# The middle.
COPY_CALL = 2.9e-6  # seconds


class StepCost(NamedTuple):
    """What a step computes and moves. Contexts are tokens of K and V that are read."""

    decodes: int = 0  # sequences that compute one token
    decode_context: int = 0
    prompt_tokens: int = 0
    prompt_context: int = 0  # of each chunk, all tokens up to its end
    prompt_pairs: float = 0.0  # (query, key) pairs of the chunks
    swapped: int = 0  # blocks, out and in
    copied: int = 0  # blocks, within the device


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step. Every one of its terms grows with what is computed or moved, and none shrinks."""

    device: Device = A100_40GB
    shape: KVShape = OPT_13B
    parameters: float = OPT_13B_PARAMETERS
    block_size: int = 16
    attention: float = PAGED_ATTENTION  # 1.0: contiguous memory

    def step(self, work: StepCost) -> float:
        seconds = self.swap(work.swapped) + 2 * work.copied * self._block_bytes / self._bandwidth
        if work.decodes:
            seconds += self.one_pass(work.decodes, work.decode_context, work.decode_context)
        if work.prompt_tokens:
            seconds += self.one_pass(work.prompt_tokens, work.prompt_context, work.prompt_pairs)
        return seconds

    def one_pass(self, tokens: int, context: float, pairs: float) -> float:
        """Tokens through all layers; `context` tokens of K and V are read, `pairs` of query and key are multiplied."""
        flops = self.device.flops * self.device.utilisation
        weights = self.parameters * self.shape.element_bytes / self._bandwidth
        # A pair costs a product with K and one with V, of 2 operations an element. (With grouped queries it is more,
        # and still nothing beside the reading.)
        products = 4 * self.shape.kv_width * self.shape.num_layers * pairs / flops
        reading = context * self.shape.token_bytes / self._bandwidth
        return max(weights, 2 * self.parameters * tokens / flops) + self.attention * max(reading, products)

    def swap(self, blocks: int) -> float:
        """Blocks over the link, one way. K and V of each layer are a transfer of their own, as in vLLM's swap_blocks.

        Calls are issued one by one while the transfers run, so a block costs the longer of the two.
        """
        transfers = 2 * self.shape.num_layers
        return blocks * max(transfers * COPY_CALL, self._block_bytes / self.device.link)

    def recompute(self, tokens: int) -> float:
        """K and V of a whole sequence anew, in one pass and nothing beside it."""
        return self.one_pass(tokens, tokens, tokens * (tokens + 1) / 2)

    @property
    def _bandwidth(self) -> float:
        return self.device.bandwidth * self.device.utilisation

    @property
    def _block_bytes(self) -> int:
        return self.shape.block_bytes(self.block_size)
