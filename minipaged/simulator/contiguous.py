"""Chapter 11. The memory of a server before paging, behind the verbs that the scheduler speaks to.

    the scheduler asks          blocks_to_begin ... begin ... grow ... free         (memory/block_manager.py)
    a reservation answers       can_allocate    allocate  append  free              (memory/reservation.py)

So the very scheduler of chapter 10 serves a pool of contiguous runs, and memory is all that differs. A request holds
its whole run from its first step to its last. Growing costs nothing, so nobody ever gives way to anybody.

How long the answer will be is told by `expect`, before the request is queued: the policies other than max, and the
account of what is wasted, know the future. No real server does.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from minipaged.memory.block_manager import Copies
from minipaged.memory.reservation import MemoryAccount, ReservationPool


class ReservedMemory:
    """Invariant: a sequence that runs has a run of its own, and `expected` are those that have none, in their order."""

    keeps_tokens = True
    shares_blocks = False  # a run has one owner: samples of one prompt are requests of their own
    finds_prefixes = False
    block_size = 0  # there are no blocks, so no watermark of them either
    num_free = 0  # blocks: `blocks_to_begin` alone says whether a run is free, and none is ever needed to grow

    def __init__(self, num_slots: int, policy: str, max_model_len: int):
        self.pool = ReservationPool(num_slots, policy, max_model_len)
        self.expected: deque[tuple[str, int, int]] = deque()  # (sequence, prompt_len, output_len)

    def expect(self, seq_id: str, prompt_len: int, output_len: int) -> None:
        """This sequence is queued next. Raises ValueError, changing nothing, for one that could never run."""
        self.pool.reservation(prompt_len, output_len)
        self.expected.append((seq_id, prompt_len, output_len))

    def account(self) -> MemoryAccount:
        """Where every slot is, as the next request in the queue sees it."""
        return self.pool.account(self.expected[0][1:] if self.expected else None)

    @property
    def num_slots(self) -> int:
        return self.pool.num_slots

    def fits(self, prompt_len: int, num_tokens: int, num_seqs: int = 1) -> bool:
        """Whether the empty pool could hold it. The token that is chosen last is never stored, but its slot is."""
        try:
            self.pool.reservation(prompt_len, num_tokens + 1 - prompt_len)
        except ValueError:
            return False
        return True

    def find(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        return []

    def blocks_to_begin(self, found: Sequence[int], lengths: Sequence[int], prompt_len: int) -> int:
        """0 if the request that is first in the queue can have its run now, or else more than `num_free`."""
        _, prompt_len, output_len = self.expected[0]  # it alone is ever asked about: first come first served
        return 0 if self.pool.can_allocate(prompt_len, output_len) else 1

    def begin(self, seq_id: str, found: Sequence[int], length: int) -> None:
        expected, prompt_len, output_len = self.expected.popleft()
        assert seq_id == expected, f"{seq_id} enters, and {expected} is the first in the queue"
        self.pool.allocate(seq_id, prompt_len, output_len)

    def insert(self, seq_id: str, tokens: Sequence[int], salt: str | None = None) -> None:
        pass

    def blocks_to_grow(self, lengths: Mapping[str, int]) -> int:
        return 0

    def grow(self, lengths: Mapping[str, int]) -> Copies:
        for seq_id, length in lengths.items():
            self.pool.append(seq_id, length - self.pool.num_tokens(seq_id))
        return []

    def fork(self, parent: str, child: str) -> None:
        raise ValueError(f"{child} cannot share the run of {parent}: a run has one owner")

    def free(self, seq_id: str) -> None:
        self.pool.free(seq_id)

    def recover(self) -> None:
        pass

    def can_swap_out(self, seq_ids: Iterable[str]) -> bool:
        return False

    def swap_out(self, seq_ids: Iterable[str]) -> Copies:
        raise ValueError("a run stays where it is")

    def blocks_to_swap_in(self, lengths: Mapping[str, int]) -> int:
        return 0

    def swap_in(self, seq_ids: Iterable[str]) -> Copies:
        raise ValueError("nothing was swapped out")
