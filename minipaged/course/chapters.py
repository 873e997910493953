"""The map of the course's exercises: a file is a module of the reference with the chapter's bodies taken out.

    ch06_block_table.py   stands for   minipaged.memory.block_table
                          blank        slot, append_tokens, ...        the learner writes these
                          given        __init__                        stays as it is
                          left out     fork, ...                       of another chapter

So the reference itself, copied under the exercise's name, is a right answer. Chapter 9 comes back to the block table
with a file of its own, in which chapter 6's part is given: no chapter waits for another.
"""

from dataclasses import dataclass
from pathlib import Path

from minipaged.course.course_map import course_map


@dataclass(frozen=True)
class Exercise:
    """One file for the learner. Names are qualified within the module: "causal_mask", "BlockTable.fork"."""

    file: str
    module: str
    minutes: int  # about, for a reader of the chapter
    blank: tuple[str, ...] = ()  # what the learner writes; empty: every public function and method
    given: tuple[str, ...] = ()  # what stays, where `blank` is empty
    left_out: tuple[str, ...] = ()
    note: str = ""  # for the learner, under the list of steps; further lines begin with "# "
    uses: tuple[str, ...] = ()  # classes and functions of other modules that the code is given: see generate.interface

    @property
    def chapter(self) -> int:
        return int(self.file[2:4])

    @property
    def is_part(self) -> bool:
        """Whether something that other chapters use is left out: then it can stand in for its own chapter only."""
        return any(not name.rpartition(".")[2].startswith("_") for name in self.left_out)


@dataclass(frozen=True)
class Chapter:
    number: int
    title: str
    suites: tuple[str, ...]  # files or glob patterns in tests/
    exercises: tuple[Exercise, ...]
    deselect: tuple[str, ...] = ()  # names of tests that are not about the exercise
    examples: int = 50  # of Hypothesis, for each property

    @property
    def properties_file(self) -> str:
        return f"ch{self.number:02d}_properties.py"


_TRANSFORMER = (
    "ModelConfig.kv_bytes_per_token",
    "rotary_table",
    "rotate",
    "Layer.forward",
    "Layer.attention",
    "Layer.mlp",
    "Transformer.forward",
)
_TABLE_OF_CHAPTER_6 = (
    "BlockTable.blocks",
    "BlockTable.slot",
    "BlockTable.blocks_needed",
    "BlockTable.append_tokens",
    "BlockTable.truncate",
    "BlockTable.release",
)
_TABLE_OF_CHAPTER_9 = ("BlockTable.fork", "BlockTable.append_shared", "BlockTable.move")
_SCHEDULER = tuple(
    f"Scheduler.{name}"
    for name in (
        "check", "add", "finish", "reset", "schedule", "update_from_output", "_make_room", "_preempt", "_admit",
        "_enter",
    )
)  # fmt: skip
_SHAPES = (
    "Shapes: docs/design.md, section 3. Sequence s has the rows query_start_loc[s] to query_start_loc[s + 1] - 1 of\n"
    "# query, perhaps none; its last query stands at position seq_lens[s] - 1. What no token owns is never read.\n"
    "# The promised errors: call check_write_kv or check_paged_attention (minipaged/attention/checks.py) first."
)
_LAYERS = (
    "Layer.forward, attention and mlp take and return [num_tokens, hidden_size]; their cos and sin are the rows of\n"
    "# batch.positions, as rotate wants them. attention norms queries and keys where config.qk_norm is set, rotates\n"
    "# them where self.has_rope is, and hands self.sliding_window to the cache."
)
_WINDOW = "A query with a sliding_window of w sees the last w positions, its own included (minipaged/reference.py)."
_BATCH = (
    "A batch (minipaged/model/batch.py): sequence s has the rows query_start_loc[s] to query_start_loc[s + 1] - 1\n"
    "# of query, key and value; its context, these tokens included, has seq_lens[s] tokens; its slab is\n"
    "# block_tables[s, 0]. The scale is head_dim ** -0.5."
)
_SCHEDULING = (
    "A step: schedule(), the copies of blocks and the forward pass, update_from_output(output), one token appended to\n"
    "# the outputs of each sequence in output.sampled, finish(seq) for those that end. num_computed of a scheduled\n"
    "# sequence moves in update_from_output, which calls cache_computed; schedule sets it where a sequence enters\n"
    "# (what is found) or is preempted (0, unless it is swapped). The BlockManager's methods advance the trace by\n"
    "# themselves, and the engine counts its steps: the scheduler records no event.\n"
    "# Delete a private method that your way does not need."
)
_CACHE = (
    "attend: compiled.write_kv, then compiled.paged_attention, on the caches of the layer, with the scale\n"
    "# head_dim ** -0.5. Where the backend is Triton, self._kernels holds the two functions instead; else it is None.\n"
    "# A step is refused before anything is written: call check_write_kv and check_paged_attention of this module,\n"
    "# first and once for all layers of a step (self._checked is the batch that was checked last); then check=False."
)
_EVENTS = (
    "Where self.trace is not None, record each change after it is made, for example\n"
    '#     self.trace.record("allocate", seq=self.seq, logical=2, block=7)\n'
    "# Events here: copy (seq, logical, source, target), allocate (seq, logical, block), share (seq, logical, block)\n"
    "# for each block of a fork or of append_shared, and after the shares of a fork: fork (seq, parent, count)."
)
_CACHED = (
    "A table has allocator, block_size, num_tokens and blocks (a copy). Where self.trace is not None, record\n"
    '# "cache" (block) and "evict" (block) after the change, as in self.trace.record("cache", block=3).'
)
_SWAPPED = (
    "A table has allocator and num_tokens besides what is listed below. Where table.trace is not None, record after\n"
    '# the move, for each block, table.trace.record("swap_out", seq=table.seq, logical=0, block=DEVICE,\n'
    '# host_block=HOST), or "swap_in" with the same fields.'
)
_OF_BLOCK_MANAGERS = ("in_use_exactly", "can_ever_fit", "fork_of_a_slab")  # tests in chapter 3's file

CHAPTERS = {
    chapter.number: chapter
    for chapter in (
        Chapter(
            1,
            "masked attention",
            ("test_ch01_masked_attention.py",),
            (Exercise("ch01_masked_attention.py", "minipaged.reference", 45),),
        ),
        Chapter(
            2,
            "the transformer",
            ("test_ch02_transformer.py",),
            (
                Exercise(
                    "ch02_transformer.py",
                    "minipaged.model.transformer",
                    60,
                    blank=_TRANSFORMER,
                    note=_LAYERS,
                    uses=("minipaged.model.batch.ForwardBatch", "minipaged.model.batch.KVCache"),
                ),
            ),
            examples=25,
        ),
        Chapter(
            3,
            "the contiguous cache",
            ("test_ch03_contiguous_cache.py",),
            (
                Exercise("ch03_causal_attention.py", "minipaged.attention.contiguous", 30, note=_WINDOW),
                Exercise(
                    "ch03_contiguous_cache.py",
                    "minipaged.kvcache.contiguous",
                    30,
                    blank=("ContiguousCache.__init__", "ContiguousCache.attend"),
                    note=_BATCH,
                    uses=("minipaged.model.batch.ForwardBatch", "minipaged.attention.contiguous.causal_attention"),
                ),
            ),
            deselect=("paged]", "copies_are_made", *_OF_BLOCK_MANAGERS, "translates_every_position"),
            examples=25,
        ),
        Chapter(
            4,
            "fragmentation",
            ("test_ch04_fragmentation.py",),
            (
                Exercise(
                    "ch04_fragmentation.py",
                    "minipaged.memory.reservation",
                    60,
                    given=("_Request", "ReservationPool.__init__", "ReservationPool.num_free"),
                ),
            ),
        ),
        Chapter(
            5,
            "page tables",
            ("test_ch05_page_table.py",),
            (
                Exercise(
                    "ch05_page_table.py",
                    "minipaged.memory.page_table",
                    60,
                    given=(
                        "PageFault",
                        "AddressLayout.__post_init__",
                        "AddressLayout._check_count",
                        "MultiLevelPageTable.__init__",
                        "MultiLevelPageTable.check_unmapped",
                        "FlatPageTable.__init__",
                    ),
                ),
                Exercise(
                    "ch05_address_space.py",
                    "minipaged.memory.address_space",
                    30,
                    given=("PhysicalMemory.__init__", "Process.__init__"),
                    uses=(
                        "minipaged.memory.page_table.MultiLevelPageTable: map, unmap, frame, translate, check_unmapped",
                    ),
                ),
            ),
        ),
        Chapter(
            6,
            "the block allocator and the block table",
            ("test_ch06_block_table.py",),
            (
                Exercise("ch06_block_allocator.py", "minipaged.memory.block_allocator", 20),
                Exercise(
                    "ch06_block_table.py",
                    "minipaged.memory.block_table",
                    40,
                    blank=_TABLE_OF_CHAPTER_6,
                    left_out=(*_TABLE_OF_CHAPTER_9, "BlockTable._name", "BlockTable._must_copy"),
                    note=(
                        "Nothing is shared before chapter 9, so nothing is copied yet: append_tokens returns [].\n"
                        "# Events need not be recorded here: `minipaged check` watches the calls by itself."
                    ),
                    uses=("minipaged.memory.block_allocator.BlockAllocator",),
                ),
            ),
        ),
        Chapter(
            7,
            "paged attention",
            ("test_ch07_paged_attention.py", "test_ch03_contiguous_cache.py"),
            (
                Exercise(
                    "ch07_paged_attention.py",
                    "minipaged.attention.gathered",
                    40,
                    note=_SHAPES,
                    uses=(
                        "minipaged.attention.contiguous.causal_attention",
                        "minipaged.attention.contiguous.first_seen",
                    ),
                ),
                Exercise(
                    "ch07_online_softmax.py",
                    "minipaged.attention.online_softmax",
                    40,
                    note=_SHAPES,
                    uses=("minipaged.attention.contiguous.visible", "minipaged.attention.contiguous.first_seen"),
                ),
                Exercise(
                    "ch07_paged_cache.py",
                    "minipaged.kvcache.paged",
                    15,
                    blank=("PagedCache.attend", "PagedCache.copy_blocks"),
                    note=_CACHE,
                    uses=(
                        "minipaged.model.batch.ForwardBatch",
                        "minipaged.attention.compiled.write_kv",
                        "minipaged.attention.compiled.paged_attention",
                    ),
                ),
            ),
            deselect=(
                "recompute",
                "contiguous]",
                *_OF_BLOCK_MANAGERS,
                "translates_every_position",
                "plain_python",
                "forked",
                "two_threads",
                "a_team_computes",
                "one_process_compiled",
                "widened",  # of the compiled loop alone
            ),
            examples=25,
        ),
        Chapter(
            8,
            "the Triton kernels",
            ("test_ch08_triton_kernels.py",),
            (
                Exercise("ch08_kv_write.py", "minipaged.kernels.kv_write", 20, blank=("write_kv_kernel",)),
                Exercise("ch08_block_copy.py", "minipaged.kernels.block_copy", 15, blank=("copy_blocks_kernel",)),
                Exercise(
                    "ch08_online_softmax.py",
                    "minipaged.kernels.online_softmax",
                    60,
                    blank=("start_softmax", "finish_softmax", "attend_context"),
                ),
                Exercise(
                    "ch08_paged_decode.py",
                    "minipaged.kernels.paged_decode",
                    75,
                    blank=("choose_num_splits", "paged_decode_kernel", "merge_splits_kernel"),
                ),
            ),
            deselect=("without_triton", "head_sizes", "other_layouts", "cannot_do", "refused_by_name"),
            examples=24,  # of which the suite's costly properties take a quarter
        ),
        Chapter(
            9,
            "sharing",
            (
                "test_ch09_sharing.py",
                "test_ch09_prefix_cache.py",
                "test_ch09_swap.py",
                "test_ch09_block_manager.py",
            ),
            (
                Exercise(
                    "ch09_sharing.py",
                    "minipaged.memory.block_table",
                    45,
                    blank=("BlockTable.blocks_needed", "BlockTable.append_tokens", *_TABLE_OF_CHAPTER_9),
                    left_out=("BlockTable._name", "BlockTable._must_copy"),
                    note=_EVENTS,
                    uses=("minipaged.memory.block_allocator.BlockAllocator",),
                ),
                Exercise(
                    "ch09_prefix_cache.py",
                    "minipaged.memory.prefix_cache",
                    60,
                    blank=(
                        "block_keys",
                        "PrefixCache.num_free",
                        "PrefixCache.num_evictable",
                        "PrefixCache.is_evictable",
                        "PrefixCache.match",
                        "PrefixCache.cache_blocks",
                        "PrefixCache.allocate",
                        "PrefixCache.share",
                        "PrefixCache.free",
                    ),
                    note=_CACHED,
                    uses=("minipaged.memory.block_allocator.BlockAllocator",),
                ),
                Exercise(
                    "ch09_swap.py",
                    "minipaged.memory.swap",
                    30,
                    given=("Swap.__init__",),
                    note=_SWAPPED,
                    uses=(
                        "minipaged.memory.block_table.BlockTable: blocks, move",
                        "minipaged.memory.block_allocator.BlockAllocator: num_free, allocate, share",
                    ),
                ),
            ),
        ),
        Chapter(
            10,
            "the scheduler",
            ("test_ch10_scheduler.py",),
            (
                Exercise(
                    "ch10_scheduler.py",
                    "minipaged.engine.scheduler",
                    60,
                    blank=_SCHEDULER,
                    note=_SCHEDULING,
                    uses=(
                        "minipaged.memory.block_manager.BlockManager: num_slots, blocks_for, can_ever_fit, "
                        "get_computed_blocks, prefix_of, block_keys, fork, allocate_slots, free, is_swapped, swap_out, "
                        "swap_in, reset",
                        "minipaged.engine.sequence.Sequence: request_id, index, prompt_token_ids, params, cache_salt, "
                        "outputs, num_computed, seq_id, num_uncomputed_tokens, tokens",
                        "minipaged.engine.scheduler_output.SchedulerOutput",
                        "minipaged.engine.scheduler_output.cache_computed",
                    ),
                ),
            ),
            examples=40,
        ),
        Chapter(
            13,
            "more than one device",
            ("test_ch13_shares.py",),
            (
                Exercise(
                    "ch13_shares.py",
                    "minipaged.distributed.shares",
                    40,
                    blank=("parts", "shares", "local_config", "weight_bytes", "step_traffic"),
                    left_out=("_heads",),
                ),
                Exercise(
                    "ch13_layers.py",
                    "minipaged.distributed.layers",
                    40,
                    blank=(
                        "RowParallelLinear.forward",
                        "VocabParallelEmbedding.forward",
                        "VocabParallelHead.forward",
                        "parallelise",
                    ),
                    note=(
                        "`parts` of ch13_shares.py comes first. In this suite ranks are threads: all_reduce adds up\n"
                        "# in place and returns the sum, gather returns all tensors on rank 0, and [] elsewhere."
                    ),
                    uses=("minipaged.distributed.group.Group: all_reduce, gather",),
                ),
            ),
            deselect=("the_one_that_did_so_by_itself", "leaves_others_waiting"),
            examples=25,
        ),
    )
}


def chapter(number: int) -> Chapter:
    """Raises ValueError for a chapter without an exercise."""
    if number not in CHAPTERS:
        course = course_map()
        if number not in course:
            raise ValueError(f"there is no chapter {number}: there are chapters 1 to {len(course)}")
        raise ValueError(f"chapter {number} has no exercise. It has a command instead: {course[number].command}")
    return CHAPTERS[number]


def all_exercises() -> list[Exercise]:
    return [exercise for chapter in CHAPTERS.values() for exercise in chapter.exercises]


def repository() -> Path:
    """The folder with tests/ and tutorials/. An installed wheel brings neither: raises ValueError that says so."""
    here = Path(__file__).resolve().parents[2]
    for folder in (here, Path.cwd(), *Path.cwd().parents):
        if (folder / "tests" / "test_ch06_block_table.py").is_file() and (folder / "minipaged").is_dir():
            return folder
    raise ValueError(
        "the suites (tests/) are not here. They come with the repository and not with the installed package: "
        "clone minipaged, and run this in the clone"
    )
