"""Chapter 10. Write the property yourself: `minipaged check 10 --properties`. (How it is graded: ch06_properties.py.)

tests/serving_model.py has an engine without tensors:

    engine = Engine(num_blocks, block_size, num_host_blocks=0, max_model_len=16)
    seqs = engine.add(prompt, max_tokens)  # the samples of the request: one, where nothing else is said
    engine.step()  # while anything is unfinished
    engine.abort(seqs[0].request_id)

It checks nothing that you do not ask of it: `engine.scheduler` is the real one, and so is its block manager,
`engine.scheduler.blocks`, with a pool for the device and, where there are host blocks, one for the host.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_model import Engine


@given(data=st.data())
def test_an_aborted_request_leaves_nothing_behind(data):
    """Add requests, step a few times, abort all: both pools are free again, and no sequence waits or runs.

    Refuses: a leak on abort. With a pool too small for all and a host pool, some run, some wait, some are swapped out.
    """
    raise NotImplementedError("ch10: test_an_aborted_request_leaves_nothing_behind")


@given(data=st.data())
def test_what_can_never_run_is_refused(data):
    """A request whose tokens outgrow the whole pool is refused by `add` with a ValueError; one that fits is not.

    Refuses: a request that is let in because its prompt fits.
    """
    raise NotImplementedError("ch10: test_what_can_never_run_is_refused")
