"""Chapter 13. Many replicas of one model: which one should answer a request?

    python -m minipaged.simulator.replicas

A replica is a whole engine with a pool of its own, so its prefix cache knows only what it has answered itself. Three
ways to choose:

    round_robin     the next one                    even, and blind
    least_loaded    the one with the least to do    even, and blind
    prefix_aware    the one that holds most of the prompt's blocks, unless that one is too busy

The router keeps one table: the key of a prompt's first blocks (chapter 9's hash chain) -> replicas that answered such
a prompt. It is a guess about the replicas' caches, and a wrong guess costs a recomputation and no wrong token. Here a
prompt is a conversation's or a product's shared prefix, counted in blocks, and a text of its own. A replica keeps the
prefixes that it used last, as many blocks as its pool spares for them.
"""

import random
from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush

POLICIES = ("round_robin", "least_loaded", "prefix_aware")
BLOCK_SIZE = 16  # tokens


@dataclass(frozen=True)
class Workload:
    """What is asked. Times in seconds, lengths in tokens. All of it is assumed, none of it measured."""

    num_requests: int = 200_000
    rate: float = 4_000.0  # requests a second, over all replicas
    num_prefixes: int = 20_000
    prefix_len: int = 1_024
    own_len: int = 128
    skew: float = 0.9  # prefix number i is asked for in proportion to 1 / (i + 1) ** skew
    seconds_per_token: float = 0.25e-3  # of prompt that is computed
    cached_tokens: int = 32_768  # of prefixes that a replica keeps
    max_wait: float = 0.5  # seconds behind the least loaded at which a holder of the prefix is too busy


@dataclass(frozen=True)
class Outcome:
    found: float  # share of prompt tokens that were in the chosen replica's cache
    mean_wait: float  # seconds until the prompt is computed, queueing included
    p99_wait: float
    imbalance: float  # busiest replica's seconds of work over the mean's


def simulate_replicas(policy: str, num_replicas: int, workload: Workload, seed: int) -> Outcome:
    """Route every request. Raises ValueError for an unknown policy, or no replica.

    Invariant: each replica works on one prompt at a time, in the order in which they come.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if num_replicas < 1:
        raise ValueError(f"num_replicas must be at least 1, got {num_replicas}")
    rng = random.Random(seed)
    weights = [1 / (i + 1) ** workload.skew for i in range(workload.num_prefixes)]
    asked = rng.choices(range(workload.num_prefixes), weights, k=workload.num_requests)
    kept_blocks = workload.prefix_len // BLOCK_SIZE
    most = workload.cached_tokens // (kept_blocks * BLOCK_SIZE) if kept_blocks else 0
    free_at, work = [0.0] * num_replicas, [0.0] * num_replicas
    caches = [OrderedDict[int, None]() for _ in range(num_replicas)]
    holders: dict[int, list[int]] = {}  # the router's table
    by_load = [(0.0, replica) for replica in range(num_replicas)]  # a heap; entries that are out of date are skipped
    now, found, waits = 0.0, 0, []
    for number, prefix in enumerate(asked):
        now += rng.expovariate(workload.rate)
        while by_load[0][0] != free_at[by_load[0][1]]:
            heappop(by_load)
        chosen = number % num_replicas if policy == "round_robin" else by_load[0][1]
        if policy == "prefix_aware" and (known := holders.get(prefix)):
            holder = min(known, key=free_at.__getitem__)
            if max(free_at[holder], now) - max(free_at[chosen], now) <= workload.max_wait:
                chosen = holder
        cache, missing = caches[chosen], workload.prefix_len + workload.own_len
        if prefix in cache:
            found += kept_blocks * BLOCK_SIZE
            missing -= kept_blocks * BLOCK_SIZE
            cache.move_to_end(prefix)
        elif most:
            cache[prefix] = None
            holders.setdefault(prefix, []).append(chosen)
            if len(cache) > most:
                holders[cache.popitem(last=False)[0]].remove(chosen)
        seconds = missing * workload.seconds_per_token
        free_at[chosen] = max(free_at[chosen], now) + seconds
        work[chosen] += seconds
        waits.append(free_at[chosen] - now)
        heappush(by_load, (free_at[chosen], chosen))
    waits.sort()
    return Outcome(
        found / (workload.num_requests * (workload.prefix_len + workload.own_len)),
        sum(waits) / len(waits),
        waits[int(0.99 * (len(waits) - 1))],
        max(work) * num_replicas / sum(work),
    )


def main() -> None:
    print("| policy | tokens found | mean wait, s | 99th percentile, s | busiest / mean |")
    print("| --- | --- | --- | --- | --- |")
    for policy in POLICIES:
        got = simulate_replicas(policy, 1_000, Workload(), seed=0)
        print(f"| {policy} | {got.found:.1%} | {got.mean_wait:.3f} | {got.p99_wait:.3f} | {got.imbalance:.2f} |")


if __name__ == "__main__":
    main()
