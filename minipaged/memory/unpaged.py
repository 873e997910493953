"""Chapter 3. Two memories without pages, with the verbs of the block manager: slabs, and none at all.

A contiguous cache is a paged one with a single block a sequence, as large as the longest sequence may be (a *slab*). A
request then holds one block from its first token on, however few it writes. That is all there is between the two, and
the whole of the memory that paging saves.

    slabs    "A" -> [ A A A . . . . . . . . . ]     "B" -> [ B B B B B B . . . . . . ]
    blocks   "A" -> [ A A A . ]                     "B" -> [ B B B B ] [ B B . . ]
"""

from collections.abc import Iterable, Mapping, Sequence

from minipaged.memory.block_manager import BlockManager, Copies


class SlabManager(BlockManager):
    """One contiguous slab a sequence: `block_size` tokens, as many as the longest may have. A slab has one owner."""

    shares_blocks = False

    def fits(self, prompt_len: int, num_tokens: int, num_seqs: int = 1) -> bool:
        return num_tokens <= self.block_size  # a slab has no second one to go on in


class NoMemory:
    """The memory of a server that keeps no K and V: always room, never a block. Every step computes everything."""

    keeps_tokens = False
    shares_blocks = True  # nothing is shared as well as anything
    finds_prefixes = False
    block_size = 0
    num_slots = 0
    num_free = 0
    num_slots_reserved = 0
    num_tokens = 0

    def fits(self, prompt_len: int, num_tokens: int, num_seqs: int = 1) -> bool:
        return True

    def blocks(self, seq_id: str) -> list[int]:
        return []

    def length(self, seq_id: str) -> int:
        return 0

    def find(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        return []

    def blocks_to_begin(self, found: Sequence[int], lengths: Sequence[int], prompt_len: int) -> int:
        return 0

    def begin(self, seq_id: str, found: Sequence[int], length: int) -> None:
        pass

    def insert(self, seq_id: str, tokens: Sequence[int], salt: str | None = None) -> None:
        pass

    def blocks_to_grow(self, lengths: Mapping[str, int]) -> int:
        return 0

    def grow(self, lengths: Mapping[str, int]) -> Copies:
        return []

    def fork(self, parent: str, child: str) -> None:
        pass

    def free(self, seq_id: str) -> None:
        pass

    def recover(self) -> None:
        pass

    def can_swap_out(self, seq_ids: Iterable[str]) -> bool:
        return False

    def swap_out(self, seq_ids: Iterable[str]) -> Copies:
        return []

    def blocks_to_swap_in(self, lengths: Mapping[str, int]) -> int:
        return 0

    def swap_in(self, seq_ids: Iterable[str]) -> Copies:
        return []
