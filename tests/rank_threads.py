"""Ranks that are threads of one process: enough to watch the algebra, and a breakpoint stops one of them."""

import threading
from contextlib import contextmanager

from torch.distributed import HashStore

from minipaged.distributed.group import CollectiveError, Group
from minipaged.distributed.launch import Ranks
from minipaged.distributed.worker import serve


def on_threads(size, work, timeout=60.0):
    """work(group) on every rank at once. Returns what each returned, by rank.

    Raises what the first rank raised that failed by itself; CollectiveError where ranks did not call the same.
    """
    store, found, errors, connected = HashStore(), {}, [], threading.Barrier(size)

    def run(rank):
        group = None
        try:
            group = Group(store, rank, size, timeout)
            connected.wait()  # a rank that has nothing to exchange would hang up while others still connect to it
            found[rank] = work(group)
        except BaseException as error:
            errors.append(error)
        finally:
            if group:
                group.close()  # a rank that still waits for this one is told
            else:
                connected.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, CollectiveError | threading.BrokenBarrierError)):
        raise error
    return [found[rank] for rank in range(size)]


class Turns:
    """What ranks do one after the other, rank 0 first: so it is written down in the same order each time."""

    def __init__(self):
        self.num_done, self.changed = 0, threading.Condition()

    @contextmanager
    def of(self, rank):
        with self.changed:
            self.changed.wait_for(lambda: self.num_done == rank)
            try:
                yield
            finally:
                self.num_done += 1
                self.changed.notify_all()


def spawn(size):
    """In the place of `launch.spawn`."""
    store = HashStore()
    for rank in range(1, size):
        threading.Thread(target=serve, args=(store, rank, size), daemon=True).start()
    return Ranks(store, size)
