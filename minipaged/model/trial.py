"""Chapter 2. Which way to multiply is the fastest on this machine: tried once, and kept beside the model.

    for each way (`linear.ways`), for 1, 8, 32 and 256 rows:   milliseconds, best of a few, the ways in turn
    the fastest:    the smallest geometric mean over the four numbers of rows, where the smallest of these are left to
                    the plain way if that is clearly faster there

A trial takes some tenths of a second. Its figures are kept in MINIPAGED_HOME, a file for each processor, torch, number
of threads and dtype, which a digest names. Where nothing can be kept, or other programs took the processor meanwhile, a
rule decides (`_by_rule`): two starts of one program must choose alike, and add in the same order.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from statistics import geometric_mean

import torch
import torch.nn.functional as F

from minipaged.home import home
from minipaged.model.linear import Packed, Way, pack, product, ways
from minipaged.processor import processor

FORMAT = "minipaged linear 1"  # raise the number when what is measured changes

_ROWS = {1: 6, 8: 4, 32: 2, 256: 1}  # rows -> weights in turn: few rows wait for memory, many for arithmetic
_SHAPE = (3072, 576)  # of the widest layer of SmolLM2-135M: 7 MB in float32, six of which no processor's cache keeps
_REPEATS = 4
_CLEARLY = 0.8
_LEAST_SHARE = 0.8  # of the threads' time that was this process's own: with less, the figures are those of a queue
# A bfloat16 model reads half as much of K and V, which the trial does not see: it may lose as much as this in products.
_BFLOAT16_MAY_TAKE = 1.05

Times = dict[Way, list[float]]  # milliseconds for each entry of _ROWS


def fastest_way(dtype: torch.dtype) -> Way:
    """The fastest way to multiply by weights of this type on a CPU, with as many threads as torch has now."""
    times = trial(dtype, torch.get_num_threads())
    return _best(times)[0] if times else _by_rule(ways(dtype))


def fastest_dtype(device: str = "cpu") -> str:
    """What "auto" stands for: "bfloat16" where it is the faster, or as fast, else "float32"."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device != "cpu":
        return "float32"
    full, half = (trial(dtype, torch.get_num_threads()) for dtype in (torch.float32, torch.bfloat16))
    if full and half:
        is_faster = _best(half)[1] <= _BFLOAT16_MAY_TAKE * _best(full)[1]
    else:
        is_faster = _by_rule(ways(torch.bfloat16)).dtype == torch.bfloat16
    return "bfloat16" if is_faster else "float32"


@lru_cache
def trial(dtype: torch.dtype, threads: int) -> Times | None:
    """What each way takes, as it was kept, or measured now and kept. None where it cannot be, or is worth nothing."""
    name = str(dtype).removeprefix("torch.")
    about = {"format": FORMAT, "processor": processor(), "torch": torch.__version__, "threads": threads, "dtype": name}
    about["rows"] = list(_ROWS)
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    path, possible = home() / f"linear.{name}.{digest}.json", ways(dtype)
    with suppress(OSError, ValueError, KeyError, TypeError):  # no file, or a damaged one
        kept = json.loads(path.read_text())["milliseconds"]
        times = {way: [float(ms) for ms in kept[str(way)]] for way in possible}
        if all(len(own) == len(_ROWS) and all(0 < ms < math.inf for ms in own) for own in times.values()):
            return times
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:  # fails before it is measured
            times, share = measure(dtype, possible)
            if share < _LEAST_SHARE:
                return None
            milliseconds = {str(way): [round(ms, 4) for ms in times[way]] for way in possible}
            written = Path(folder) / path.name
            written.write_text(json.dumps({**about, "milliseconds": milliseconds}, indent=1))
            os.replace(written, path)
    except OSError:
        return None
    return times


@torch.inference_mode()
def measure(dtype: torch.dtype, possible: list[Way]) -> tuple[Times, float]:
    """Milliseconds of one product, for each way and number of rows; and the share of the processor that was ours.

    The ways take turns: what disturbs one disturbs all.
    """
    weights = [torch.randn(_SHAPE).to(dtype) for _ in range(max(_ROWS.values()))]
    packed = {way: [pack(weight, way) or weight for weight in weights] for way in possible}
    inputs = {rows: torch.randn(rows, _SHAPE[1]).to(dtype) for rows in _ROWS}
    times = {way: [math.inf] * len(_ROWS) for way in possible}
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(_REPEATS):
        for i, (rows, count) in enumerate(_ROWS.items()):
            for way in possible:
                start = time.perf_counter()
                for weight in packed[way][:count]:
                    x = inputs[rows]
                    _ = product(x, weight) if isinstance(weight, Packed) else F.linear(x, weight)
                times[way][i] = min(times[way][i], 1e3 * (time.perf_counter() - start) / count)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return times, cpu / (wall * torch.get_num_threads())


def _best(times: Times) -> tuple[Way, float]:
    """The fastest way, with the plain one at few rows where that is clearly faster, and its mean milliseconds."""
    plain = next(iter(times.values()))
    best: list[tuple[float, Way]] = []
    for way, own in times.items():
        packed_from = next((i for i, ms in enumerate(own) if plain[i] > _CLEARLY * ms), len(own))
        combined = plain[:packed_from] + own[packed_from:]
        best.append((geometric_mean(combined), way._replace(plain_rows=[0, *_ROWS][packed_from])))
    mean, way = min(best)
    return way, mean


def _by_rule(possible: list[Way]) -> Way:
    """Without a trial: in the model's own type where that can be packed; on an Intel processor MKL, else oneDNN."""
    own = [way for way in possible[1:] if way.dtype == possible[0].dtype] or possible[1:] or possible
    library = "MKL" if "Intel" in processor() else "oneDNN"
    return next((way for way in own if way.library == library), own[0])
