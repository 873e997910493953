"""Which processor this is, and which wide instructions it has: a figure of one processor is not another's."""

import platform
from functools import lru_cache
from pathlib import Path

WIDE = ("amx", "avx2", "avx512", "avx_vnni", "f16c", "fma", "asimd", "sve")  # beginnings of flags that change figures


@lru_cache
def processor() -> str:
    """The processor's name, family, model and stepping as the system gives them, and its wide instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    wide = " ".join(flag for flag in flags if flag.startswith(WIDE)) or "flags unknown"
    parts = [fields.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
    return " ".join([*filter(None, parts), platform.machine(), f"({wide})"])
