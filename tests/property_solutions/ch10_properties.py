"""One right answer to the exercise of the same name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_model import Engine


@given(data=st.data())
def test_an_aborted_request_leaves_nothing_behind(data):
    engine = Engine(4, 2, num_host_blocks=4, max_model_len=16)
    requests = [engine.add([0] * data.draw(st.integers(1, 4)), 5) for _ in range(data.draw(st.integers(1, 3)))]
    for _ in range(data.draw(st.integers(0, 4))):
        engine.step()
    for seqs in requests:
        engine.abort(seqs[0].request_id)
    blocks = engine.scheduler.blocks
    assert (blocks.device.num_free, blocks.host.num_free) == (4, 4)
    assert not engine.scheduler.waiting and not engine.scheduler.running


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
