"""Chapter 11. What is asked: requests with an arrival, a prompt and an answer of known length.

A request is what a trace of a server would hold. Its text does not matter, its lengths do. Arrivals are a Poisson
process, as in the paper (section 6.1): the gaps between them are exponential, with mean 1 / rate.

Every stream is drawn from a seed, and lazily: 10^5 requests need no list of 10^5 prompts.
"""

import csv
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minipaged.simulator.lengths import ALPACA, MAX_MODEL_LEN, MAX_PROMPT_LEN, SHAREGPT, Lengths

STREAMS = {"sharegpt": SHAREGPT, "alpaca": ALPACA}


@dataclass(frozen=True, slots=True)
class Request:
    """arrival: seconds. prefix_len: how many first tokens of the prompt are the same in all requests of the stream.

    n: samples of the prompt, each of output_len tokens. beam_width: above 0, a beam search instead.
    """

    arrival: float
    prompt_len: int
    output_len: int
    prefix_len: int = 0
    n: int = 1
    beam_width: int = 0


def arrivals(rate: float, rng: random.Random) -> Iterator[float]:
    """Seconds at which requests come, `rate` a second on average, for ever."""
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be above 0 requests a second, and finite, got {rate}")
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def stream(
    lengths: Lengths | str,
    rate: float,
    num_requests: int,
    seed: int,
    *,
    prefix_len: int = 0,
    n: int = 1,
    beam_width: int = 0,
) -> Iterator[Request]:
    """`num_requests` requests; `lengths` may be "sharegpt" or "alpaca". A shared prefix comes before the prompt.

    A request that would pass the model's context with its prefix is drawn again.
    """
    if isinstance(lengths, str):
        if lengths not in STREAMS:
            raise ValueError(f"unknown stream {lengths!r}: it is one of {', '.join(STREAMS)}")
        lengths = STREAMS[lengths]
    if num_requests < 0 or prefix_len < 0 or n < 1 or beam_width < 0 or (n > 1 and beam_width):
        raise ValueError(
            "num_requests, prefix_len and beam_width must be 0 or more, n at least 1, and not both n and beam_width: "
            f"got {num_requests}, {prefix_len}, {beam_width} and {n}"
        )
    if prefix_len > MAX_PROMPT_LEN:
        raise ValueError(f"prefix_len must be at most {MAX_PROMPT_LEN}, so that a request fits after it: {prefix_len}")
    # Two streams of random numbers, so that the same requests come at another rate.
    times, sizes = random.Random(f"arrivals {seed}"), random.Random(f"lengths {seed}")
    for arrival in islice(arrivals(rate, times), num_requests):
        prompt_len, output_len = lengths.draw(sizes)
        while prefix_len + prompt_len + output_len > MAX_MODEL_LEN:
            prompt_len, output_len = lengths.draw(sizes)
        yield Request(arrival, prefix_len + prompt_len, output_len, prefix_len, n, beam_width)


def from_file(path: Path, rate: float, seed: int) -> list[Request]:
    """Lengths from a CSV file with the columns prompt_len and output_len, or a JSON list of objects with these keys.

    An `arrival` column (seconds, rising) is used where there is one; otherwise arrivals are drawn at `rate`.
    Raises ValueError naming the first row that is wrong.
    """
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no requests: a list of objects, or a CSV file with a header, is expected")
    drawn = arrivals(rate, random.Random(f"arrivals {seed}"))
    requests: list[Request] = []
    for number, row in enumerate(rows):
        try:
            prompt_len, output_len = int(row["prompt_len"]), int(row["output_len"])
            arrival = float(row["arrival"]) if "arrival" in row else next(drawn)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"row {number} of {path}: prompt_len and output_len are expected, got {row}") from error
        if prompt_len < 1 or output_len < 1 or prompt_len + output_len > MAX_MODEL_LEN:
            raise ValueError(
                f"row {number} of {path}: {prompt_len} + {output_len} tokens; both must be at least 1, "
                f"and the sum at most {MAX_MODEL_LEN}"
            )
        if not math.isfinite(arrival) or (requests and arrival < requests[-1].arrival):
            raise ValueError(f"row {number} of {path}: arrival {arrival} comes before the one of the row above")
        requests.append(Request(arrival, prompt_len, output_len))
    return requests
