"""A learner's own property is too strict where it refuses what is right, also what is right in another order."""

import pytest

from minipaged.course.chapters import chapter
from minipaged.course.grade import WRONG
from minipaged.course.properties import PROPERTIES, grade_properties

FIRST, *_ = PROPERTIES[6]
PINS = {
    "a block": "    assert BlockAllocator(4).allocate() == 0\n",
    "an order": """    pool = BlockAllocator(3)
    first, second = pool.allocate(), pool.allocate()
    assert second > first
""",
    "what is freed comes last": """    pool = BlockAllocator(3)
    first = pool.allocate()
    pool.free(first)
    assert pool.allocate() != first
    pool.allocate()
    assert pool.allocate() == first
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("pin", PINS.values(), ids=PINS.keys())
def test_a_property_that_pins_a_block_or_an_order_is_too_strict(pin, tmp_path):
    (tmp_path / "ch06_properties.py").write_text(
        f"from minipaged.memory.block_allocator import BlockAllocator\n\n\ndef {FIRST}():\n{pin}"
    )
    verdict = grade_properties(chapter(6), tmp_path)[0]
    assert verdict.code == WRONG and "another order" in verdict.problem, verdict
