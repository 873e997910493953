"""Chapter 4. Any buddy allocator that passes is right, and so is any account: no address and no order is pinned here.

The model knows slots only. A buddy system merges what it can, so it can serve a block of 2^k slots exactly when some
2^k slots in a row, the first at a multiple of 2^k, are all free: that is checked by looking at every slot.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from messages import says
from minipaged.memory.reservation import BuddyAllocator, MemoryAccount, OutOfSlots, ReservationPool
from operations import Counted

pytestmark = pytest.mark.ch04

POOL_SIZES = st.integers(1, 24) | st.just(300)  # powers of two, and what lies between them
POLICIES = st.sampled_from(["max", "pow2", "oracle"])


def next_power_of_two(size: int) -> int:
    power = 1
    while power < size:
        power *= 2
    return power


def largest_power_of_two_in(num_slots: int) -> int:
    return next_power_of_two(num_slots + 1) // 2


class Slots:
    """The model: start of each run in use -> slots of its block."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.blocks: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return self.num_slots - sum(self.blocks.values())

    def free_for(self, size: int) -> int:
        """Free slots that lie in an aligned run of free slots, as long as the block that `size` needs."""
        block = next_power_of_two(size)
        used = {slot for start, length in self.blocks.items() for slot in range(start, start + length)}
        starts = range(0, self.num_slots - block + 1, block)
        return sum(block for start in starts if used.isdisjoint(range(start, start + block)))

    def add(self, start: int, size: int) -> None:
        """Enter a run that was handed out, if it may be handed out."""
        block = next_power_of_two(size)
        assert start % block == 0, f"a block of {block} slots starts at slot {start}, which is no multiple of {block}"
        assert start >= 0 and start + block <= self.num_slots, (
            f"slots {start} to {start + block - 1} are not in a pool of {self.num_slots}"
        )
        for other, length in self.blocks.items():
            assert start + block <= other or other + length <= start, (
                f"the block of {block} at slot {start} overlaps the one of {length} at slot {other}: two own one slot"
            )
        self.blocks[start] = block


class BuddiesAgainstSlots(RuleBasedStateMachine):
    """Blocks of a buddy allocator beside a dictionary of who has which slots."""

    blocks = Bundle("blocks")

    @initialize(num_slots=POOL_SIZES)
    def start(self, num_slots):
        self.slots = Slots(num_slots)
        self.allocator = BuddyAllocator(num_slots)

    @rule(target=blocks, size=st.integers(1, 16))
    def allocate(self, size):
        if size > largest_power_of_two_in(self.slots.num_slots):
            with pytest.raises(ValueError):
                self.allocator.allocate(size)
            return multiple()
        served = self.slots.free_for(size) > 0
        try:
            start = self.allocator.allocate(size)
        except OutOfSlots:
            assert not served, (
                f"refused {size} slots although a block of {next_power_of_two(size)} is free: not merged?"
            )
            return multiple()
        assert served, f"served {size} slots, where no block of {next_power_of_two(size)} is free"
        self.slots.add(start, size)
        return start

    @rule(start=consumes(blocks))
    def free(self, start):
        self.allocator.free(start)
        del self.slots.blocks[start]

    @rule(start=st.integers(-1, 25) | st.just(300))
    def free_what_is_no_start_of_a_block(self, start):
        if start not in self.slots.blocks:
            with pytest.raises(ValueError):
                self.allocator.free(start)

    @invariant()
    def free_slots_are_those_that_no_block_has(self):
        assert self.allocator.num_free == self.slots.num_free, "a slot is counted twice, or lost"

    @invariant()
    def what_is_free_is_merged(self):
        size = 1
        while size <= self.slots.num_slots:
            assert self.allocator.num_free_for(size) == self.slots.free_for(size), (
                f"free slots in blocks of {size} or more: two free buddies were not merged, or two strangers were"
            )
            size *= 2


TestBuddyAllocator = BuddiesAgainstSlots.TestCase


@given(num_slots=POOL_SIZES, data=st.data())
def test_after_all_is_freed_the_whole_pool_is_one_again(num_slots, data):
    allocator = BuddyAllocator(num_slots)
    starts = []
    for size in data.draw(st.lists(st.integers(1, largest_power_of_two_in(num_slots)), max_size=12), label="sizes"):
        if allocator.num_free_for(size):
            starts.append(allocator.allocate(size))
    for start in data.draw(st.permutations(starts), label="order of freeing"):
        allocator.free(start)
    rest = num_slots
    while rest:  # the pool's arenas, largest first, can all be had at once
        arena = largest_power_of_two_in(rest)
        assert allocator.num_free_for(arena) > 0, f"all is free, and {arena} slots in a row cannot be had"
        allocator.allocate(arena)
        rest -= arena
    assert allocator.num_free == 0


def test_two_runs_of_the_same_script_lay_out_the_pool_alike():
    def layout():
        allocator = BuddyAllocator(100)
        starts = [allocator.allocate(size) for size in (3, 8, 1, 20, 2, 5)]
        for start in (starts[3], starts[0], starts[2]):
            allocator.free(start)
        return starts + [allocator.allocate(size) for size in (1, 1, 4, 9, 2)]

    assert layout() == layout(), "the simulator could not be run again"


def test_a_call_looks_at_a_few_entries_for_each_order_and_not_at_the_pool():
    """O(log num_slots): entries of lists and dictionaries that a call looks at, where 512 pieces of a slot are free."""
    allocator = BuddyAllocator(1_024)
    starts = sorted(allocator.allocate(1) for _ in range(1_024))
    for start in starts[::2]:
        allocator.free(start)
    counted = Counted(allocator)
    for name, call in {
        "num_free": lambda: allocator.num_free,
        "num_free_for(1)": lambda: allocator.num_free_for(1),
        "num_free_for(2)": lambda: allocator.num_free_for(2),
        "free": lambda: allocator.free(starts[1]),
        "allocate(2)": lambda: allocator.allocate(2),
        "allocate(1)": lambda: allocator.allocate(1),
    }.items():
        entries = counted.of(call)
        assert entries < 150, f"{name} looks at {entries} entries for 1024 slots, and is to be O(log num_slots)"


def test_half_of_the_pool_is_free_and_half_of_the_pool_cannot_be_had():
    """The textbook's external fragmentation, in eight slots: free and used by turns."""
    allocator = BuddyAllocator(8)
    starts = sorted(allocator.allocate(1) for _ in range(8))
    for start in starts[::2]:
        allocator.free(start)
    assert allocator.num_free == 4
    with pytest.raises(OutOfSlots):
        allocator.allocate(2)


def test_neighbours_that_are_no_buddies_do_not_merge():
    """Slots 2 to 5 are free and in a row, and a block of 4 cannot start at slot 2."""
    allocator = BuddyAllocator(8)
    starts = sorted(allocator.allocate(2) for _ in range(4))
    allocator.free(starts[1])
    allocator.free(starts[2])
    assert allocator.num_free == 4
    assert allocator.num_free_for(4) == 0


@pytest.mark.parametrize("num_slots", [0, -8])
def test_a_pool_needs_a_slot(num_slots):
    with pytest.raises(ValueError) as error:
        BuddyAllocator(num_slots)
    assert says(error.value, num_slots), f"the message does not name {num_slots}: {error.value}"


def seen(allocator):
    return allocator.num_free, [allocator.num_free_for(2**k) for k in range(4)]


@pytest.mark.parametrize("size", [0, -1, 9, 12])
def test_a_size_that_can_never_be_served_is_refused_and_nothing_changes(size):
    """12 slots are an arena of 8 and one of 4: a block of 16 there is none, so 9 slots in a row can never be had."""
    allocator = BuddyAllocator(12)
    start = allocator.allocate(3)
    before = seen(allocator)
    for refuses in (allocator.allocate, allocator.num_free_for):
        with pytest.raises(ValueError) as error:
            refuses(size)
        assert says(error.value, size), f"the message does not name {size}: {error.value}"
    assert seen(allocator) == before
    allocator.free(start)
    assert allocator.num_free == 12


def test_out_of_slots_changes_nothing():
    allocator = BuddyAllocator(12)
    allocator.allocate(5)
    before = seen(allocator)
    with pytest.raises(OutOfSlots):
        allocator.allocate(5)
    assert seen(allocator) == before
    allocator.allocate(4)  # what was free before is served after


def test_a_wrong_free_changes_nothing():
    allocator = BuddyAllocator(8)
    start = allocator.allocate(4)
    before = seen(allocator)
    for wrong in (start + 1, start ^ 4, -1, 8):
        with pytest.raises(ValueError):
            allocator.free(wrong)
    assert seen(allocator) == before
    allocator.free(start)
    with pytest.raises(ValueError):
        allocator.free(start)
    assert allocator.num_free_for(8) == 8, "a double free broke the pool"


# --- the policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "slots"),
    [("max", 2048), ("pow2", 100 + 32), ("oracle", 100 + 25)],
)
def test_the_papers_example_an_output_of_25(policy, slots):
    """Section 6.1: "if the true output length is 25, it reserves 32 positions for outputs"."""
    assert ReservationPool(4096, policy, max_model_len=2048).reservation(100, 25) == slots


@given(prompt_len=st.integers(1, 1500), output_len=st.integers(1, 548))
def test_the_policies_ask_for_enough_and_for_no_more_than_they_say(prompt_len, output_len):
    asked = {
        policy: ReservationPool(2048, policy, max_model_len=2048).reservation(prompt_len, output_len)
        for policy in ("max", "pow2", "oracle")
    }
    assert asked["oracle"] == prompt_len + output_len
    assert asked["oracle"] <= asked["pow2"] <= asked["max"] == 2048
    for_output = asked["pow2"] - prompt_len
    assert for_output < 2 * output_len, "pow2 over-reserves the output by less than a factor of two"
    assert for_output == next_power_of_two(for_output) or asked["pow2"] == 2048


def test_no_policy_reserves_more_than_the_model_can_use():
    """A prompt of 1,500 and an output of 513: rounded up, 1,500 + 1,024 would pass the model's 2,048."""
    assert ReservationPool(4096, "pow2", max_model_len=2048).reservation(1500, 513) == 2048


@pytest.mark.parametrize("lengths", [(3, 3), (5, 1), (1, 5), (2, 4)])
def test_prompt_and_output_together_fit_the_context(lengths):
    pool = ReservationPool(8, "oracle", max_model_len=5)
    with pytest.raises(ValueError) as error:
        pool.reservation(*lengths)
    assert says(error.value, 5, {*lengths, sum(lengths)}), f"the message does not name {lengths} and 5: {error.value}"


# --- the account ------------------------------------------------------------------------------------------------------


class PoolAgainstAccounts(RuleBasedStateMachine):
    """Requests in one pool. The model: seq -> [prompt, output, tokens stored, slots asked for, first slot]."""

    MAX_MODEL_LEN = 6
    LENGTHS = st.sampled_from([(prompt, output) for prompt in range(1, 6) for output in range(1, 7 - prompt)])
    seqs = Bundle("seqs")

    @initialize(num_slots=st.integers(8, 24), policy=POLICIES)
    def start(self, num_slots, policy):
        self.slots = Slots(num_slots)
        self.policy = policy
        self.pool = ReservationPool(num_slots, policy, self.MAX_MODEL_LEN)
        self.requests = {}
        self.names = 0

    def asks_for(self, prompt_len, output_len):
        if self.policy == "max":
            return self.MAX_MODEL_LEN
        if self.policy == "pow2":
            return min(prompt_len + next_power_of_two(output_len), self.MAX_MODEL_LEN)
        return prompt_len + output_len

    @rule(target=seqs, lengths=LENGTHS)
    def allocate(self, lengths):
        prompt_len, output_len = lengths
        asked = self.asks_for(prompt_len, output_len)
        served = self.slots.free_for(asked) > 0
        assert self.pool.can_allocate(prompt_len, output_len) == served, f"a block for {asked} slots is free: {served}"
        self.names += 1
        try:
            start = self.pool.allocate(self.names, prompt_len, output_len)
        except OutOfSlots:
            assert not served, "refused although can_allocate() said yes"
            return multiple()
        assert served, "can_allocate() said no"
        self.slots.add(start, asked)
        self.requests[self.names] = [prompt_len, output_len, prompt_len, asked, start]
        return self.names

    @rule(seq=seqs, n=st.integers(0, 5))
    def append(self, seq, n):
        prompt_len, output_len, stored, _, _ = self.requests[seq]
        if stored + n > prompt_len + output_len:
            with pytest.raises(ValueError):
                self.pool.append(seq, n)
        else:
            self.pool.append(seq, n)
            self.requests[seq][2] += n

    @rule(seq=consumes(seqs))
    def free(self, seq):
        self.pool.free(seq)
        del self.slots.blocks[self.requests.pop(seq)[4]]

    @rule(next_request=LENGTHS)
    def fragmentation_is_seen_by_the_next_request(self, next_request):
        asked = self.asks_for(*next_request)
        account = self.pool.account(next_request)
        too_small = self.slots.num_free - self.slots.free_for(asked)
        enough_together = self.slots.num_free >= asked
        assert account.external == (too_small if enough_together else 0)
        assert account.free == self.slots.num_free - account.external
        assert sum(account) == self.slots.num_slots, (
            f"{account} does not sum to the pool's {self.slots.num_slots} slots"
        )
        self.check_what_the_requests_have(account)

    @invariant()
    def the_parts_sum_to_the_pool(self):
        account = self.pool.account()
        assert sum(account) == self.slots.num_slots, (
            f"{account} does not sum to the pool's {self.slots.num_slots} slots"
        )
        assert min(account) >= 0, f"a part of {account} is negative: some slot is counted twice"
        assert (account.external, account.free) == (0, self.slots.num_free), "no request waits, so nothing is too small"
        self.check_what_the_requests_have(account)

    @invariant()
    def the_requests_are_those_of_the_model(self):
        for seq, (_, _, stored, _, _) in self.requests.items():
            assert self.pool.num_tokens(seq) == stored

    def check_what_the_requests_have(self, account):
        held = sum(stored for _, _, stored, _, _ in self.requests.values())
        to_come = sum(prompt + output - stored for prompt, output, stored, _, _ in self.requests.values())
        never = sum(asked - prompt - output for prompt, output, _, asked, _ in self.requests.values())
        rounded = sum(next_power_of_two(asked) - asked for _, _, _, asked, _ in self.requests.values())
        assert account.held == held, "held: tokens that are stored"
        assert account.reserved == to_come, "reserved: tokens that the requests will still store"
        assert account.over_reserved == never, "over-reserved: asked for by the policy, never to be used"
        assert account.rounding == rounded, "rounding: up to the next power of two"
        assert account.external_and_others == rounded + account.external + account.free


TestReservationPool = PoolAgainstAccounts.TestCase


@pytest.mark.parametrize(
    ("prompt_len", "output_len", "max_model_len", "reserved", "never_used"),
    [(7, 3, 2048, 2, 2038), (3, 2, 512, 1, 507)],
    ids=["request A", "request B"],
)
def test_the_papers_figure_3(prompt_len, output_len, max_model_len, reserved, never_used):
    """Requests A and B, one output token made: 2 and 1 slots are used in the future, 2,038 and 507 are never."""
    pool = ReservationPool(max_model_len, "max", max_model_len)
    pool.allocate("seq", prompt_len, output_len)
    pool.append("seq")
    assert pool.account() == MemoryAccount(
        held=prompt_len + 1, reserved=reserved, over_reserved=never_used, rounding=0, external=0, free=0
    )


def test_the_papers_seven_requests_of_orca_max():
    """OPT-13B on an A100 of 40 GB has 15,728 slots (12 GiB of 800 KiB). Figure 13 counts 7.00 requests for Orca (Max),
    and Figure 2 gives 8.9 % for "External frag. & Others"."""
    pool = ReservationPool(15_728, "max", max_model_len=2048)
    num_requests = 0
    while pool.can_allocate(161, 338):
        pool.allocate(num_requests, 161, 338)
        num_requests += 1
    assert num_requests == 7
    assert pool.account((161, 338)).external_and_others == 15_728 - 7 * 2048 == 1392
    assert round(100 * 1392 / 15_728, 1) == 8.9


def test_the_header_of_the_chapter():
    pool = ReservationPool(24, "pow2", max_model_len=16)
    pool.allocate("seq", 4, 5)
    pool.append("seq", 2)
    assert pool.account() == MemoryAccount(held=6, reserved=3, over_reserved=3, rounding=4, external=0, free=8)
    assert pool.account((4, 5)).external == 0, "8 slots are fewer than the 12 asked for: full, not fragmented"


def test_free_slots_that_suffice_only_together_are_external_fragmentation():
    """28 slots are arenas of 16, 8 and 4. With the first in use 12 slots are free, a request asks for 12, and waits."""
    pool = ReservationPool(28, "oracle", max_model_len=16)
    pool.allocate("first", 8, 8)
    assert not pool.can_allocate(8, 4)
    account = pool.account((8, 4))
    assert (account.external, account.free) == (12, 0)
    account = pool.account((4, 3))  # a block of 8 serves this one; the 4 beside it do not
    assert (account.external, account.free) == (4, 8)


def test_reserved_is_what_no_oracle_can_save():
    """An oracle leaves no slot unused in the end; but until the end, other requests wait for the ones to come."""
    pool = ReservationPool(64, "oracle", max_model_len=64)
    pool.allocate("seq", 1, 63)
    assert pool.account() == MemoryAccount(held=1, reserved=63, over_reserved=0, rounding=0, external=0, free=0)
    pool.append("seq", 63)
    assert pool.account() == MemoryAccount(held=64, reserved=0, over_reserved=0, rounding=0, external=0, free=0)


@pytest.mark.parametrize(
    ("num_slots", "policy", "max_model_len", "got"), [(0, "max", 8, 0), (8, "best", 8, "best"), (8, "max", 0, 0)]
)
def test_a_pool_that_makes_no_sense_is_refused(num_slots, policy, max_model_len, got):
    with pytest.raises(ValueError) as error:
        ReservationPool(num_slots, policy, max_model_len)
    assert says(error.value, got), f"the message does not name {got}: {error.value}"


def pool_with_two_requests():
    pool = ReservationPool(30, "oracle", max_model_len=20)
    pool.allocate("a", 3, 4)
    pool.allocate("b", 2, 3)
    pool.append("a", 1)
    return pool


def seen_in(pool):
    return pool.account(), pool.account((1, 3)), pool.num_tokens("a"), pool.num_tokens("b")


@pytest.mark.parametrize(
    ("error", "call"),
    [
        pytest.param(ValueError, lambda pool: pool.allocate("c", 0, 1), id="no prompt"),
        pytest.param(ValueError, lambda pool: pool.allocate("c", 1, 0), id="no output"),
        pytest.param(ValueError, lambda pool: pool.allocate("c", 18, 3), id="longer than the model allows"),
        pytest.param(ValueError, lambda pool: pool.can_allocate(18, 3), id="could it? never"),
        pytest.param(ValueError, lambda pool: pool.allocate("c", 15, 2), id="longer than the largest block"),
        pytest.param(ValueError, lambda pool: pool.can_allocate(15, 2), id="could it be? never"),
        pytest.param(ValueError, lambda pool: pool.account((15, 2)), id="an account for what can never run"),
        pytest.param(OutOfSlots, lambda pool: pool.allocate("c", 8, 8), id="not now"),
        pytest.param(ValueError, lambda pool: pool.allocate("a", 1, 1), id="the same name twice"),
        pytest.param(ValueError, lambda pool: pool.append("a", 4), id="past its final length"),
        pytest.param(ValueError, lambda pool: pool.append("a", -1), id="fewer than none"),
        pytest.param(ValueError, lambda pool: pool.append("c"), id="append to a stranger"),
        pytest.param(ValueError, lambda pool: pool.free("c"), id="free a stranger"),
        pytest.param(ValueError, lambda pool: pool.num_tokens("c"), id="ask for a stranger"),
    ],
)
def test_what_is_refused_changes_nothing(error, call):
    pool = pool_with_two_requests()
    before = seen_in(pool)
    with pytest.raises(error):
        call(pool)
    assert seen_in(pool) == before
    pool.append("a", 3)  # and the pool still works: up to the final length, then back to one piece
    pool.free("a")
    pool.free("b")
    pool.allocate("a", 8, 8)


def test_a_request_may_end_early_and_its_name_be_used_again():
    pool = pool_with_two_requests()
    pool.free("a")
    with pytest.raises(ValueError):
        pool.free("a")
    pool.free("b")
    nothing = MemoryAccount(held=0, reserved=0, over_reserved=0, rounding=0, external=0, free=30)
    assert pool.account() == nothing, "a request that is gone still has slots"
    pool.allocate("a", 2, 2)
    assert pool.num_tokens("a") == 2
