"""Chapter 5. What a table for a KV pool costs, by the arithmetic of page tables: entries times bytes of an entry.

    one token of OPT-13B        2 (K and V) * 40 layers * 5,120 wide * 2 bytes     = 800 KiB
    one block of 16 tokens      16 * 800 KiB                                       = 12.5 MiB
    its entry in a block table  one int32                                          = 4 bytes

One level is enough, for three reasons. A sequence has few pages: 2,048 tokens are 128 blocks, where a process has
2^36 pages. It has no holes: positions are filled from 0 on, so no entry is empty that a page directory could leave
out. And a block is big: 12.5 MiB for each entry of 4 bytes, where a page is 4 KiB for 8.
"""

from typing import NamedTuple

from minipaged.cdiv import cdiv

GIB = 1 << 30  # bytes
ENTRY_BYTES = 4  # block_tables are int32


class KVShape(NamedTuple):
    """What of a model decides the size of its KV cache."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int  # tokens
    element_bytes: int = 2  # fp16 or bf16

    @property
    def kv_width(self) -> int:
        """Elements of K (and as many of V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.kv_width * self.element_bytes

    def block_bytes(self, block_size: int) -> int:
        """One block of all layers: what one entry of a block table names."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        return block_size * self.token_bytes


# Zhang et al., "OPT" (arXiv 2205.01068), Table 1: 40 layers, 40 heads of width 128, each with K and V of its own.
OPT_13B = KVShape("OPT-13B", num_layers=40, num_kv_heads=40, head_dim=128, max_model_len=2048)
# "The Llama 3 Herd of Models" (arXiv 2407.21783), Table 3; context: of the release of April 2024.
LLAMA_3_8B = KVShape("Llama-3-8B", num_layers=32, num_kv_heads=8, head_dim=128, max_model_len=8192)

# The PagedAttention paper, Table 1: OPT-13B on one A100 of 40 GB leaves 12 GB for the KV cache, 15.7K slots. With
# GB read as GiB the slots come out right: 12 GiB / 800 KiB = 15,728.
OPT_13B_POOL_BYTES = 12 * GIB
# 90 % of 80 GiB (vLLM's default gpu_memory_utilization), less 8,030,261,248 parameters of 2 bytes.
LLAMA_3_8B_POOL_BYTES = 80 * GIB * 9 // 10 - 2 * 8_030_261_248


class BlockTableCost(NamedTuple):
    """What the block tables of one pool cost."""

    num_blocks: int  # whole blocks of the pool
    block_bytes: int  # of one block, all layers
    seq_bytes: int  # of the table of the longest sequence that the model allows
    all_bytes: int  # of all tables together, when each block of the pool is named by one


def block_table_cost(shape: KVShape, pool_bytes: int, block_size: int = 16) -> BlockTableCost:
    """Entries and bytes of one-level block tables over a pool. Raises ValueError if it holds not even one block."""
    block_bytes = shape.block_bytes(block_size)
    if pool_bytes < block_bytes:
        raise ValueError(f"pool_bytes ({pool_bytes}) is less than one block of {shape.name} ({block_bytes} bytes)")
    num_blocks = pool_bytes // block_bytes
    seq_bytes = cdiv(shape.max_model_len, block_size) * ENTRY_BYTES
    return BlockTableCost(num_blocks, block_bytes, seq_bytes, num_blocks * ENTRY_BYTES)
