"""Chapter 4. Where does the memory go? Reserve one contiguous run of slots a request, and count what is never used.

Before paging, a serving system chose the length of a request's run when the request arrived, before the first token
was generated. A policy said how long, and an allocator said where. A slot holds K and V of one token. One request of
4 prompt tokens and 5 output tokens, after its second one, policy pow2, pool of 24 slots:

    slots     0 1 2 3 4 5 6 7 8 9 . . . . . .   . . . . . . . .
              H H H H H H r r r o o o - - - -   f f f f f f f f       H held   r reserved   o over-reserved
              asked: 4 + 8 = 12                                       - rounding: a buddy block of 16 for 12
              buddy block: 16                   free: a block of 8

A next request that needs a block of 16 finds 8 free slots: too few. If a second such block of 8 were free, the request
would still be refused, and those 16 slots would be external fragmentation.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv
2309.06180): section 3.1 names the wastes, Figure 2 measures them, section 6.1 defines the policies of its baseline,
Orca (Oracle, Pow2, Max), over a buddy allocator. The buddy system itself: Knuth, TAOCP volume 1, section 2.5.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

POLICIES = ("max", "pow2", "oracle")


class OutOfSlots(RuntimeError):
    """No free block is large enough. Nothing was changed: the caller may free slots or wait, and retry."""


class BuddyAllocator:
    """A pool of `num_slots` slots, handed out in blocks of a power of two. Every method is O(log num_slots).

    The buddy of a block is the other half of the block that both were split from: start XOR size.
    Invariant: a block of size 2^k starts at a multiple of 2^k, and no two free blocks are buddies (they are merged).

    A pool whose size is no power of two is cut into arenas, largest first: 24 slots are an arena of 16 and one of 8.
    An arena has no buddy, so blocks of two arenas never merge. Raises ValueError for a pool of less than one slot.
    """

    num_free: int  # slots, wherever they lie
    largest_block: int  # slots of the largest arena: a longer request can never be served

    def __init__(self, num_slots: int):
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self.num_slots = self.num_free = num_slots
        self.largest_block = 1 << (num_slots.bit_length() - 1)
        self._order: dict[int, int] = {}  # start of a block in use -> k, its size being 2^k
        # Order k -> starts of the free blocks of size 2^k. The dicts are sets that keep the order of insertion: the
        # block freed last is taken first, in every run alike.
        self._free: list[dict[int, None]] = [{} for _ in range(num_slots.bit_length())]
        start = 0
        for order in reversed(range(num_slots.bit_length())):
            if num_slots >> order & 1:
                self._free[order][start] = None
                start += 1 << order

    def num_free_for(self, size: int) -> int:
        """Free slots that lie in a free block large enough for `size` slots: 0 means that allocate(size) is refused.
        Raises ValueError as allocate does."""
        order = self._order_for(size)
        return sum(len(self._free[k]) << k for k in range(order, len(self._free)))

    def allocate(self, size: int) -> int:
        """Take a block of at least `size` slots, the next power of two, and return its first slot.

        The smallest free block that suffices is halved until it fits; the upper halves stay free.
        Raises OutOfSlots, changing nothing; raises ValueError for a size that the empty pool could not serve either.
        """
        order = self._order_for(size)
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                break
        else:
            raise OutOfSlots(f"no free block of {1 << order} slots for {size}: {self.num_free} slots are free in all")
        start, _ = self._free[larger].popitem()
        while larger > order:
            larger -= 1
            self._free[larger][start + (1 << larger)] = None
        self._order[start] = order
        self.num_free -= 1 << order
        return start

    def free(self, start: int) -> None:
        """Free the block that starts at `start`, and merge it with its buddy as long as that one is free too.
        Raises ValueError where no block in use starts there."""
        if start not in self._order:
            raise ValueError(f"no block in use starts at slot {start}: freed twice, or the middle of a block?")
        order = self._order.pop(start)
        self.num_free += 1 << order
        while (buddy := start ^ (1 << order)) in self._free[order]:
            del self._free[order][buddy]
            start = min(start, buddy)
            order += 1
        self._free[order][start] = None

    def _order_for(self, size: int) -> int:
        if not 1 <= size <= self.largest_block:
            pool = f"a pool of {self.num_slots} slots serves 1 to {self.largest_block} at once"
            raise ValueError(f"cannot allocate {size} slots: {pool}")
        return (size - 1).bit_length()  # the least k with 2^k >= size


class MemoryAccount(NamedTuple):
    """Where every slot of the pool is, at one moment. Invariant: sum(account) is the number of slots of the pool."""

    held: int  # K and V of a token are stored here
    reserved: int  # empty now; its request will fill it before it ends
    over_reserved: int  # internal fragmentation: asked for by the policy, and never to be filled
    rounding: int  # internal fragmentation: added by the allocator to reach a power of two, and never to be filled
    external: int  # free, in pieces too small for the next request, although all free slots together would suffice
    free: int  # the other free slots

    @property
    def external_and_others(self) -> int:
        """The fourth bar of the paper's Figure 2, "External frag. & Others": what no request asked for. (Rounding is in
        it, since the figure shows no internal fragmentation for Orca (Oracle), whose blocks are rounded up too.)"""
        return self.rounding + self.external + self.free


@dataclass(slots=True)
class _Request:
    start: int  # first slot of its run
    num_tokens: int  # stored now
    final_len: int  # stored when it ends
    asked: int  # slots the policy asked for


class ReservationPool:
    """Requests in one pool, each in one contiguous run of slots that is reserved from its arrival until it is freed.

    `policy` is "max", "pow2" or "oracle": see `reservation`. `output_len` is the real one, known from the workload:
    pow2, oracle and the account need the future.
    Invariant, for each request: tokens stored <= final length <= slots asked for <= slots of its block.
    Raises ValueError for an unknown policy or request, and where a length or number of tokens is out of its range.
    """

    def __init__(self, num_slots: int, policy: str, max_model_len: int):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: it is one of {', '.join(POLICIES)}")
        if max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {max_model_len}")
        self.num_slots, self.policy, self.max_model_len = num_slots, policy, max_model_len
        self._allocator = BuddyAllocator(num_slots)
        self._requests: dict[Hashable, _Request] = {}

    @property
    def num_free(self) -> int:
        """Free slots, wherever they lie."""
        return self._allocator.num_free

    def num_tokens(self, seq: Hashable) -> int:
        """Tokens of the request that are stored now."""
        return self._known(seq).num_tokens

    def reservation(self, prompt_len: int, output_len: int) -> int:
        """Slots that the policy asks for, before the allocator rounds. Raises ValueError for what can never run.

        max       as long as the model allows: the one policy that needs no future, and so the real one
        pow2      a good guess: the prompt exactly, the output rounded up to a power of two (25 -> 32), at most max
        oracle    exactly the final length, which no system knows: no contiguous system can do better
        """
        if prompt_len < 1 or output_len < 1:
            raise ValueError(f"prompt_len and output_len must be at least 1, got {prompt_len} and {output_len}")
        if prompt_len + output_len > self.max_model_len:
            lengths = f"{prompt_len} prompt and {output_len} output tokens"
            raise ValueError(f"{lengths} exceed max_model_len ({self.max_model_len})")
        asked = prompt_len + output_len
        if self.policy == "pow2":
            asked = prompt_len + (1 << (output_len - 1).bit_length())
        if self.policy == "max" or asked > self.max_model_len:
            asked = self.max_model_len
        if asked > self._allocator.largest_block:
            pool = f"the pool of {self.num_slots} has no block over {self._allocator.largest_block}"
            raise ValueError(f"policy {self.policy!r} asks for {asked} slots, {pool}")
        return asked

    def can_allocate(self, prompt_len: int, output_len: int) -> bool:
        """Whether allocate() would succeed now. Raises ValueError for what can never run."""
        return self._allocator.num_free_for(self.reservation(prompt_len, output_len)) > 0

    def allocate(self, seq: Hashable, prompt_len: int, output_len: int) -> int:
        """Reserve the run of a request, store its prompt in it, and return its first slot.

        Raises OutOfSlots (wait) or ValueError (never, or `seq` is in the pool already), changing nothing.
        """
        if seq in self._requests:
            raise ValueError(f"request {seq!r} is in the pool already")
        asked = self.reservation(prompt_len, output_len)
        start = self._allocator.allocate(asked)
        self._requests[seq] = _Request(start, prompt_len, prompt_len + output_len, asked)
        return start

    def append(self, seq: Hashable, n: int = 1) -> None:
        """Store n more tokens of a request in its run. Raises ValueError past its final length."""
        request = self._known(seq)
        if not 0 <= n <= request.final_len - request.num_tokens:
            length = f"{request.num_tokens} of its {request.final_len} tokens are stored"
            raise ValueError(f"cannot append {n} tokens to request {seq!r}: {length}")
        request.num_tokens += n

    def free(self, seq: Hashable) -> None:
        """Free the whole run of a request, finished or not."""
        self._allocator.free(self._known(seq).start)
        del self._requests[seq]

    def account(self, next_request: tuple[int, int] | None = None) -> MemoryAccount:
        """Split the pool into its parts, as seen by a next request (prompt_len, output_len). None: nothing is external.

        A free slot is external fragmentation if its free block is smaller than the block that the next request needs,
        while all free slots together are no fewer than it asks for. Else it is free: a pool without enough free slots
        is full, not fragmented.
        """
        external = 0
        if next_request is not None and (needed := self.reservation(*next_request)) <= self.num_free:
            external = self.num_free - self._allocator.num_free_for(needed)
        held = sum(request.num_tokens for request in self._requests.values())
        final = sum(request.final_len for request in self._requests.values())
        asked = sum(request.asked for request in self._requests.values())
        rounding = self.num_slots - self.num_free - asked
        return MemoryAccount(held, final - held, asked - final, rounding, external, self.num_free - external)

    def _known(self, seq: Hashable) -> _Request:
        if seq not in self._requests:
            raise ValueError(f"request {seq!r} is not in the pool: never allocated, or freed already?")
        return self._requests[seq]
