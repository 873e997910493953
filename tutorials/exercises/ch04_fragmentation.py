"""Chapter 4. Where does the memory go? Reserve one contiguous run of slots a request, and count what is never used.

Before paging, a serving system had to choose the length of a request's run when the request arrived, before the
first token was made. It chose a policy (how long), and an allocator laid the runs out (where). A slot holds K and V
of one token. One request of 4 prompt tokens and 5 output tokens, after its second one, policy pow2, pool of 24 slots:

    slots     0 1 2 3 4 5 6 7 8 9 . . . . . .   . . . . . . . .
              H H H H H H r r r o o o - - - -   f f f f f f f f       H held   r reserved   o over-reserved
              asked: 4 + 8 = 12                                       - rounding: a buddy block of 16 for 12
              buddy block: 16                   free: a block of 8

A next request that needs a block of 16 finds 8 slots free: too few. Had the pool two such blocks of 8 free, apart, it
would find 16 and still be refused: those 16 are external fragmentation.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv
2309.06180): section 3.1 names the wastes, Figure 2 measures them, section 6.1 defines the policies of its baseline,
Orca (Oracle, Pow2, Max), over a buddy allocator. The buddy system itself: Knuth, TAOCP volume 1, section 2.5.
"""

# Exercise ch04_fragmentation, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 4` after each step:
#
#   1. BuddyAllocator.__init__
#   2. BuddyAllocator.num_free
#   3. BuddyAllocator.largest_block
#   4. BuddyAllocator.num_free_for
#   5. BuddyAllocator.allocate
#   6. BuddyAllocator.free
#   7. reserve_max
#   8. reserve_pow2
#   9. reserve_oracle
#   10. MemoryAccount.internal
#   11. MemoryAccount.external_and_others
#   12. ReservationPool.num_tokens
#   13. ReservationPool.reservation
#   14. ReservationPool.can_allocate
#   15. ReservationPool.allocate
#   16. ReservationPool.append
#   17. ReservationPool.free
#   18. ReservationPool.account
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# Made from minipaged/memory/reservation.py by minipaged/course/generate.py.

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple


class OutOfSlots(RuntimeError):
    """No free block is large enough. Nothing was changed: the caller may free or wait, and ask again."""


class BuddyAllocator:
    """A pool of `num_slots` slots, handed out in blocks of a power of two. Every method is O(log num_slots).

    Invariant: a block of size 2^k starts at a multiple of 2^k, and no two free blocks are buddies (they are merged).
    The buddy of a block is the other half of the block that both were split from: start XOR size.

    A pool whose size is no power of two is cut into arenas, largest first: 24 slots are an arena of 16 and one of 8.
    An arena is a block that has no buddy: the place where its buddy would be reaches past the pool, or into smaller
    arenas. So blocks of two arenas never merge, and the largest request is the largest power of two in num_slots.
    """

    def __init__(self, num_slots: int):
        raise NotImplementedError("ch04: BuddyAllocator.__init__")

    @property
    def num_free(self) -> int:
        """Free slots, wherever they lie. O(1)."""
        raise NotImplementedError("ch04: BuddyAllocator.num_free")

    @property
    def largest_block(self) -> int:
        """Slots in the largest block that the empty pool has: a longer request can never be served. O(1)."""
        raise NotImplementedError("ch04: BuddyAllocator.largest_block")

    def num_free_for(self, size: int) -> int:
        """Free slots that lie in a free block large enough for `size` slots: 0 means that allocate(size) is refused."""
        raise NotImplementedError("ch04: BuddyAllocator.num_free_for")

    def allocate(self, size: int) -> int:
        """Take a block of at least `size` slots, and return its first slot. The block is the next power of two.

        The smallest free block that suffices is halved until it fits; the upper halves stay free.
        Raises OutOfSlots, changing nothing; raises ValueError for a size that the empty pool could not serve either.
        """
        raise NotImplementedError("ch04: BuddyAllocator.allocate")

    def free(self, start: int) -> None:
        """Give back the block that starts at `start`, and merge it with its buddy as long as that one is free too."""
        raise NotImplementedError("ch04: BuddyAllocator.free")


Policy = Callable[[int, int, int], int]  # (prompt_len, output_len, max_model_len) -> slots to ask for


def reserve_max(prompt_len: int, output_len: int, max_model_len: int) -> int:
    """Orca (Max): as long as the model allows. The one policy that need not know the future, and so the real one."""
    raise NotImplementedError("ch04: reserve_max")


def reserve_pow2(prompt_len: int, output_len: int, max_model_len: int) -> int:
    """Orca (Pow2): the output rounded up to a power of two (25 -> 32), so less than twice too long; the prompt exactly.

    The paper's stand-in for a good guess of the output's length. No run is longer than the model allows.
    """
    raise NotImplementedError("ch04: reserve_pow2")


def reserve_oracle(prompt_len: int, output_len: int, max_model_len: int) -> int:
    """Orca (Oracle): exactly the final length. No system can know it; no contiguous system can do better."""
    raise NotImplementedError("ch04: reserve_oracle")


POLICIES: dict[str, Policy] = {"max": reserve_max, "pow2": reserve_pow2, "oracle": reserve_oracle}


class MemoryAccount(NamedTuple):
    """Where every slot of the pool is, at one moment. Invariant: sum(account) is the number of slots of the pool."""

    held: int  # K and V of a token are stored here
    reserved: int  # empty now; the request that owns it will fill it before it ends
    over_reserved: int  # asked for by the policy, and never to be filled: known when the request ends
    rounding: int  # added by the allocator to reach a power of two, and never to be filled: known at once
    external: int  # free, in pieces too small for the next request, although all free slots together would suffice
    free: int  # the other free slots

    @property
    def internal(self) -> int:
        """Internal fragmentation: inside some request's block, and never to be filled."""
        raise NotImplementedError("ch04: MemoryAccount.internal")

    @property
    def external_and_others(self) -> int:
        """The fourth bar of the paper's Figure 2, "External frag. & Others": what no request asked for.

        The figure shows no internal fragmentation for Orca (Oracle), whose blocks a buddy allocator rounds up all the
        same. So its bar of internal fragmentation is `over_reserved`, and the rounding must be counted in this one.
        """
        raise NotImplementedError("ch04: MemoryAccount.external_and_others")


@dataclass(slots=True)
class _Request:
    start: int  # first slot of its run
    num_tokens: int  # stored now
    final_len: int  # stored when it ends
    asked: int  # slots the policy asked for


class ReservationPool:
    """Requests in one pool, each in one contiguous run of slots that is reserved when it arrives, until it is freed.

    `policy` is "max", "pow2" or "oracle". `output_len` is the real one, told by the workload: the policies other than
    max, and the account, know the future. Every method is O(log num_slots), whatever the number of requests.

    Invariant, for each request: tokens stored <= final length <= slots asked for <= slots of its block.
    """

    def __init__(self, num_slots: int, policy: str, max_model_len: int):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: it is one of {', '.join(POLICIES)}")
        if max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {max_model_len}")
        self.policy = policy
        self.max_model_len = max_model_len
        self._allocator = BuddyAllocator(num_slots)
        self._requests: dict[Hashable, _Request] = {}
        self._num_tokens = self._final_len = self._asked = 0  # sums over the requests

    @property
    def num_slots(self) -> int:
        return self._allocator.num_slots

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def num_tokens(self, seq: Hashable) -> int:
        """Tokens of the request that are stored now. Raises ValueError for a request that is not in the pool."""
        raise NotImplementedError("ch04: ReservationPool.num_tokens")

    def reservation(self, prompt_len: int, output_len: int) -> int:
        """Slots that the policy asks for, before the allocator rounds. Raises ValueError for what can never run."""
        raise NotImplementedError("ch04: ReservationPool.reservation")

    def can_allocate(self, prompt_len: int, output_len: int) -> bool:
        """Whether allocate() would succeed now. False means wait; what can never run raises ValueError."""
        raise NotImplementedError("ch04: ReservationPool.can_allocate")

    def allocate(self, seq: Hashable, prompt_len: int, output_len: int) -> int:
        """Reserve the run of a request, store its prompt in it, and return its first slot.

        Raises OutOfSlots (wait) or ValueError (never, or `seq` is in the pool already), changing nothing.
        """
        raise NotImplementedError("ch04: ReservationPool.allocate")

    def append(self, seq: Hashable, n: int = 1) -> None:
        """Store n more tokens of a request, where they were reserved. Past its final length it raises ValueError."""
        raise NotImplementedError("ch04: ReservationPool.append")

    def free(self, seq: Hashable) -> None:
        """Give the whole run back, finished or not. Raises ValueError for a request that is not in the pool."""
        raise NotImplementedError("ch04: ReservationPool.free")

    def account(self, next_request: tuple[int, int] | None = None) -> MemoryAccount:
        """Split the pool into its parts, as seen by a next request (prompt_len, output_len).

        External fragmentation exists only in the eyes of a request. A free slot counts as such if its free block is
        smaller than the block the next request needs, and if all free slots together are no fewer than the request
        asks for. Where even all of them are too few, the pool is full, not fragmented: they count as free. Two free
        neighbours that are no buddies are two pieces. With no next request, every free slot counts as free.
        """
        raise NotImplementedError("ch04: ReservationPool.account")
