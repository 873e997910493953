"""From a trace back to the state: events go into an empty pool one by one, and after each there is a Snapshot.

    allocate A 0 -> 5    allocate A 1 -> 1    share B 0 -> 5      the events, as minipaged/memory/trace.py has them
    A [5]                A [5, 1]             A [5, 1]  B [5]     the tables after each

The words of the tokens are kept per *block*, as K and V are, and read back through the tables. So a picture shows what
a sequence would read, and a block table that points to a wrong block shows wrong words.

An event that contradicts the state (a block handed out twice, a free of what is not owned, a write into a shared
block) raises ValueError with its number. The snapshots before it have been yielded by then, and show how it came.
"""

from collections.abc import Iterator

from minipaged.memory.trace import Trace
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.state import State


def replay(trace: Trace) -> Iterator[Snapshot]:
    """The state after each event, from an empty pool. Raises ValueError at an event that contradicts the state."""
    state = State(trace)
    for number in range(len(trace.events)):
        state.apply(number)
        yield state.snapshot(number, number + 1)


def steps(trace: Trace) -> Iterator[Snapshot]:
    """The state after each step; `events` and `copies` of a snapshot are those of its whole step. Raises as replay."""
    state, start = State(trace), 0
    for number, event in enumerate(trace.events):
        state.apply(number)
        following = trace.events[number + 1] if number + 1 < len(trace.events) else None
        if following is None or following["step"] != event["step"]:
            yield state.snapshot(start, number + 1)
            start = number + 1


def at_step(trace: Trace, step: int) -> Snapshot:
    """The state after a step, with all its events. Raises ValueError where there is no such step, and as replay."""
    for snapshot in steps(trace):
        if snapshot.step == step:
            return snapshot
    known = sorted({event["step"] for event in trace.events})
    has = f"steps {known[0]} to {known[-1]}" if known else "no event at all"
    raise ValueError(f"the trace has no event of step {step}: it has {has}")


def at(trace: Trace, index: int) -> Snapshot:
    """The state after event `index`, counted from 0, or from the end if negative. Raises IndexError, and as replay."""
    number = range(len(trace.events))[index]
    state = State(trace)
    for earlier in range(number + 1):
        state.apply(earlier)
    return state.snapshot(number, number + 1)
