"""One right answer to the exercise of the same name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_model import Engine


@given(data=st.data())
def test_an_aborted_request_leaves_nothing_behind(data):
    engine = Engine(16, 2, max_model_len=16)
    requests = [engine.add([0] * data.draw(st.integers(1, 5)), 4) for _ in range(data.draw(st.integers(1, 3)))]
    for _ in range(data.draw(st.integers(0, 2))):
        engine.step()
    for request_id in requests:
        engine.scheduler.abort(request_id)
    assert engine.memory.num_slots_reserved == 0
    assert not engine.scheduler.has_unfinished()


@given(data=st.data())
def test_what_can_never_run_is_refused(data):
    num_blocks = data.draw(st.integers(1, 6))
    engine = Engine(num_blocks, 2, max_model_len=16)
    prompt, max_tokens = [0] * data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    if len(prompt) + max_tokens - 1 <= 2 * num_blocks:
        engine.add(prompt, max_tokens)
    else:
        with pytest.raises(ValueError):
            engine.add(prompt, max_tokens)
