"""Chapter 8. The checked interpreter sees what it is there to see: kernels with one fault each, and none."""

import os

import pytest
import torch

os.environ.update({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})  # before triton is imported
pytest.importorskip("triton", reason="the kernels need Triton, which runs on Linux")

import triton
import triton.language as tl

from checked_interpreter import OutsideArguments, checked

pytestmark = [
    pytest.mark.ch08,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the checks are for TRITON_INTERPRET=1"),
]


@triton.jit
def copy_rows(source, target, row_stride, num_rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows first, first + 1, ... of source [num_rows, COLUMNS] into target."""
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (column >= 0)
    values = tl.load(source + row * row_stride + column, mask=inside, other=0.0)
    tl.store(target + row * COLUMNS + column, values, mask=inside)


@triton.jit
def load_one(source, target, index):
    tl.store(target, tl.load(source + index))


@triton.jit
def helper(source, index):
    return tl.load(source + index)


@triton.jit
def load_in_a_helper(source, target, index):
    tl.store(target, helper(source, index))


@triton.jit
def add_one(source, index):
    tl.atomic_add(source + index, 1.0)


def test_bytes_are_counted_by_argument():
    source, target = torch.randn(6, 4), torch.full((6, 4), torch.nan)
    with checked() as memory:
        copy_rows[(2,)](source, target, 4, 6, 0, ROWS=4, COLUMNS=4)
    assert torch.equal(source, target)
    assert memory.loaded == memory.distinct == {"source": 6 * 4 * 4}
    assert memory.stored == {"target": 6 * 4 * 4}
    assert memory.launches == ["copy_rows"]


def test_what_is_loaded_twice_counts_twice_and_is_one_distinct_byte():
    source, target = torch.randn(3), torch.zeros(1)
    with checked() as memory:
        for index in (0, 2, 2):
            load_one[(1,)](source, target, index)
    assert memory.loaded["source"] == 12
    assert memory.distinct["source"] == 8


def test_masked_lanes_may_point_anywhere():
    source = torch.randn(6, 4)
    with checked() as memory:  # the program's 8 rows are 6 rows and 2 that its mask leaves out
        copy_rows[(1,)](source, torch.empty(6, 4), 4, 6, 0, ROWS=8, COLUMNS=4)
    assert memory.loaded["source"] == source.nbytes


@pytest.mark.parametrize(
    ("index", "said"),
    [(3, "element 3 of source, whose elements are 0 to 2"), (-1, "element -1 of source"), (10**9, "element")],
)
@pytest.mark.parametrize("kernel", [load_one, load_in_a_helper], ids=["kernel", "helper"])
def test_a_load_past_either_end_is_refused(kernel, index, said):
    memory = torch.randn(5)  # one element of room on both sides: what lies there is real memory, and not source's
    with checked(), pytest.raises(OutsideArguments) as error:
        kernel[(1,)](memory[1:4], torch.zeros(1), index)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{kernel.fn.__name__}, program (0, 0, 0), loads")


def test_a_store_past_the_end_is_refused_and_stores_nothing():
    target = torch.zeros(7, 4)
    with checked(), pytest.raises(OutsideArguments, match=r"stores element 24 of target"):
        copy_rows[(2,)](torch.ones(8, 4), target[:6], 4, 8, 0, ROWS=4, COLUMNS=4)
    assert not target[4:].any()


def test_a_negative_row_is_refused():
    with checked(), pytest.raises(OutsideArguments, match=r"element -4 of source"):
        copy_rows[(1,)](torch.ones(8, 4), torch.zeros(8, 4), 4, 8, -1, ROWS=4, COLUMNS=4)


def test_a_wrong_stride_leaves_the_view():
    """Columns 0 to 3 of a wider tensor: the right stride is its width. A stride of 4 reads the columns beside them."""
    wide = torch.randn(6, 8)
    with checked() as memory:
        copy_rows[(1,)](wide[:, :4], torch.empty(6, 4), 8, 6, 0, ROWS=8, COLUMNS=4)
    assert memory.loaded["source"] == 6 * 4 * 4
    with checked(), pytest.raises(OutsideArguments, match=r"element 4 of source, which lies in a gap"):
        copy_rows[(1,)](wide[:, :4], torch.empty(6, 4), 4, 6, 0, ROWS=8, COLUMNS=4)


def test_what_is_not_live_is_outside():
    source, live = torch.randn(6, 4), torch.ones(6, 1, dtype=torch.bool)
    live[5] = False
    with checked(live={"source": live}) as memory:
        copy_rows[(1,)](source, torch.empty(6, 4), 4, 5, 0, ROWS=8, COLUMNS=4)
    assert memory.loaded["source"] == 5 * 4 * 4
    with checked(live={"source": live}), pytest.raises(OutsideArguments, match=r"loads source\[5, 0\]"):
        copy_rows[(1,)](source, torch.empty(6, 4), 4, 6, 0, ROWS=8, COLUMNS=4)


def test_a_live_view_is_followed_through_its_strides():
    source = torch.randn(4, 6).T  # [6, 4], columns first
    live = torch.ones(6, 4, dtype=torch.bool)
    live[2, 1] = False
    with checked(live={"source": live}), pytest.raises(OutsideArguments, match=r"loads source\[2, 1\]"):
        load_one[(1,)](source, torch.zeros(1), 1 * 6 + 2)


def test_atomics_are_loads_and_stores():
    source = torch.zeros(3)
    with checked() as memory:
        add_one[(5,)](source, 1)
    assert source.tolist() == [0, 5, 0]
    assert memory.loaded == memory.stored == {"source": 5 * 4}
    with checked(), pytest.raises(OutsideArguments):
        add_one[(1,)](source, 3)


def test_outside_the_with_nothing_is_watched():
    source, target = torch.arange(5.0), torch.zeros(1)
    with checked() as memory:
        load_one[(1,)](source[:3], target, 2)
    load_one[(1,)](source[:3], target, 3)  # the element after the view: in silence, as on a GPU
    assert target.item() == 3.0
    assert memory.loaded["source"] == 4
