"""Chapter 11. The memory of a server before paging: a block manager that gives each sequence one contiguous run.

    the scheduler asks          allocate_slots                 free          (memory/block_manager.py)
    a reservation answers       can_allocate, allocate, append free          (memory/reservation.py)

So the very scheduler of chapter 10 serves a pool of contiguous runs, and memory is all that differs. A sequence holds
its whole run from its first step to its last. Growing costs nothing, so nothing is ever preempted.

`expect` says how long the answer will be, before the sequence is queued: the policies other than max, and the account
of what is wasted, know the future. No real server does.
"""

from collections.abc import Sequence

from minipaged.memory.block_manager import BlockManager, Copies
from minipaged.memory.reservation import MemoryAccount, ReservationPool


class ReservedMemory(BlockManager):
    """A block manager without prefix cache and host. Its blocks are runs of several lengths, one for each sequence:
    `block_size` is the longest, and the policy chooses each.

    Invariant: each sequence of `running` has a run; those of `expected` have none, and enter in this order.
    """

    def __init__(self, num_slots: int, policy: str, max_model_len: int):
        super().__init__(max(1, num_slots // max_model_len), max_model_len)
        self.pool = ReservationPool(num_slots, policy, max_model_len)
        self.expected: dict[str, tuple[int, int]] = {}  # seq_id -> (prompt_len, output_len)
        self.running: dict[str, tuple[int, int]] = {}

    def expect(self, seq_id: str, prompt_len: int, output_len: int) -> None:
        """This sequence is queued next. Raises ValueError, changing nothing, for one that could never run."""
        self.pool.reservation(prompt_len, output_len)
        self.expected[seq_id] = prompt_len, output_len

    def account(self) -> MemoryAccount:
        """Where every slot is, as the next sequence in the queue sees it."""
        return self.pool.account(next(iter(self.expected.values()), None))

    def reset(self) -> None:
        """An empty pool: all sequences wait again."""
        for seq_id in self.running:
            self.pool.free(seq_id)
        self.expected, self.running = self.running | self.expected, {}

    @property
    def num_slots(self) -> int:
        return self.pool.num_slots

    @property
    def num_free(self) -> int:
        """Runs of the longest sequence that the free slots would make, wherever they lie."""
        return self.pool.num_free // self.block_size

    def num_tokens(self, seq_id: str) -> int:
        return self.pool.num_tokens(seq_id) if seq_id in self.running else 0

    def can_ever_fit(self, num_tokens: int) -> bool:
        """Whether the empty pool could hold it. The token that is chosen last is never stored, but its slot is."""
        try:
            self.pool.reservation(num_tokens, 1)
        except ValueError:
            return False
        return True

    def allocate_slots(
        self, seq_id: str, num_tokens: int, prefix: Sequence[int] = (), reserve: int = 0
    ) -> Copies | None:
        """A run for the sequence that is first in the queue, or None if none is free; then slots inside it, at no cost.
        `reserve` has no meaning here: what runs has its slots."""
        if seq_id not in self.running:
            first = next(iter(self.expected))
            assert seq_id == first, f"{seq_id} enters, and {first} is the first in the queue"
            if not self.pool.can_allocate(*self.expected[seq_id]):
                return None
            self.pool.allocate(seq_id, *self.expected[seq_id])
            self.running[seq_id] = self.expected.pop(seq_id)
        self.pool.append(seq_id, num_tokens - self.pool.num_tokens(seq_id))
        return []

    def fork(self, parent: str, child: str) -> None:
        raise ValueError(f"{child} cannot share the run of {parent}: a run has one owner")

    def free(self, seq_id: str) -> None:
        if self.running.pop(seq_id, None):
            self.pool.free(seq_id)
        self.expected.pop(seq_id, None)
