"""Chapter 2. The trial of the ways to multiply: measured once, kept, read again, and never believed blindly."""

import json

import pytest
import torch

from minipaged.model import load, trial
from minipaged.model.linear import Way, pack_linears, ways
from minipaged.processor import processor

pytestmark = pytest.mark.ch02

PLAIN, MKL, ONEDNN = (Way(library, torch.float32) for library in ("plain", "MKL", "oneDNN"))
HALF = Way("plain", torch.bfloat16)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A trial in a folder of its own whose figures are given, not measured. Says how often it was asked for some."""
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trial, "ways", lambda dtype: list(figures[dtype]))
    figures = {
        torch.float32: {PLAIN: [4.0, 4.0, 4.0, 4.0], MKL: [2.0, 2.0, 2.0, 5.0], ONEDNN: [2.0, 2.0, 2.0, 3.0]},
        torch.bfloat16: {HALF: [1.0, 9.0, 9.0, 9.0], ONEDNN: [2.0, 2.0, 2.0, 3.0]},
    }
    asked = []
    monkeypatch.setattr(trial, "measure", lambda dtype, possible: asked.append(dtype) or (figures[dtype], share[0]))
    share = [1.0]
    trial.trial.cache_clear()
    yield figures, asked, share, tmp_path / "home"
    trial.trial.cache_clear()


def tried_again(dtype=torch.float32):
    trial.trial.cache_clear()  # as another process would begin
    return trial.fastest_way(dtype)


def test_the_fastest_is_taken_and_measured_once(measured):
    _, asked, _, home = measured
    assert tried_again() == tried_again() == ONEDNN
    assert asked == [torch.float32]
    assert [path.name.split(".")[:2] for path in home.iterdir()] == [["linear", "float32"]]


def test_few_rows_stay_plain_where_that_is_clearly_faster(measured):
    figures, *_ = measured
    assert tried_again(torch.bfloat16) == ONEDNN._replace(plain_rows=1)
    figures[torch.float32] = {PLAIN: [1.9, 2.0, 2.0, 9.0], ONEDNN: [2.0, 2.0, 2.0, 3.0]}
    assert tried_again() == ONEDNN, "not so clearly"


def test_auto_is_bfloat16_where_its_products_are_as_fast(measured):
    figures, *_ = measured
    assert trial.fastest_dtype() == "bfloat16"
    figures[torch.bfloat16] = {HALF: [2.0, 9.0, 9.0, 9.0], ONEDNN: [2.2, 2.2, 2.2, 3.3]}
    for path in measured[3].glob("linear.bfloat16*"):
        path.unlink()
    trial.trial.cache_clear()
    assert trial.fastest_dtype() == "float32"
    assert load.named_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("change", ["format", "processor", "torch", "threads", "dtype"])
def test_figures_of_another_machine_are_not_taken(measured, change, monkeypatch):
    """Another version of this file, another processor, torch, number of threads or dtype."""
    _, asked, _, _ = measured
    tried_again()
    trial.trial.cache_clear()
    monkeypatch.setattr(trial, "FORMAT", "another" if change == "format" else trial.FORMAT)
    monkeypatch.setattr(trial, "processor", lambda: "another" if change == "processor" else processor())
    monkeypatch.setattr(torch, "__version__", "another" if change == "torch" else torch.__version__)
    trial.trial(torch.bfloat16 if change == "dtype" else torch.float32, torch.get_num_threads() + (change == "threads"))
    assert len(asked) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', "MISSING", "SHORT", "NAN", "NEGATIVE", "WORDS"],
)
def test_a_damaged_file_is_measured_anew(measured, text):
    _, asked, _, home = measured
    tried_again()
    (path,) = home.iterdir()
    kept = json.loads(path.read_text())
    figures = kept["milliseconds"]
    if text == "MISSING":
        del figures["MKL float32"]
    for name, damage in {"SHORT": [1.0], "NAN": [float("nan")] * 4, "NEGATIVE": [-1.0] * 4, "WORDS": ["a"] * 4}.items():
        if text == name:
            figures["MKL float32"] = damage
    path.write_text(json.dumps(kept) if text.isupper() else text)
    assert tried_again() == ONEDNN
    assert len(asked) == 2
    assert tried_again() == ONEDNN
    assert len(asked) == 2, "the good figures did not take the place of the bad ones"


@pytest.mark.parametrize("vendor, expected", [("GenuineIntel", MKL), ("AuthenticAMD", ONEDNN)])
def test_a_rule_decides_where_nothing_can_be_kept_or_others_had_the_processor(measured, monkeypatch, vendor, expected):
    figures, asked, share, home = measured
    figures[torch.float32][PLAIN] = [0.1] * 4  # what was measured says otherwise
    monkeypatch.setattr(trial, "processor", lambda: vendor)
    share[0] = 0.5
    assert tried_again() == expected
    assert not list(home.iterdir()), "figures of a queue were kept"
    home.rmdir()
    home.write_text("a file in the place of the folder")
    asked.clear()
    assert tried_again() == expected
    assert not asked, "measured in vain"


def test_the_rule_takes_the_own_type_where_it_can_be_packed(monkeypatch):
    monkeypatch.setattr(trial, "processor", lambda: "AuthenticAMD")
    own = Way("oneDNN", torch.bfloat16)
    assert trial._by_rule([HALF, own, MKL, ONEDNN]) == own
    assert trial._by_rule([HALF, MKL, ONEDNN, PLAIN]) == ONEDNN
    assert trial._by_rule([PLAIN]) == PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_trial_gives_a_way_that_can_be_used(dtype, monkeypatch):
    monkeypatch.setattr(trial, "_SHAPE", (300, 300))
    times, share = trial.measure(dtype, ways(dtype))
    assert list(times) == ways(dtype)
    assert all(0 < ms < 1e5 for row in times.values() for ms in row)
    assert 0 < share < 1.2
    way, mean = trial._best(times)
    assert mean <= max(map(max, times.values()))
    model = torch.nn.Sequential(torch.nn.Linear(300, 300, dtype=dtype))
    pack_linears(model, way)
    assert model(torch.ones(2, 300, dtype=dtype)).dtype == dtype


def test_the_processor_has_a_name_that_stays():
    assert trial.processor().strip()
    first = trial.processor()
    trial.processor.cache_clear()
    assert trial.processor() == first
