"""The server: what OpenAI's own client and others get, beside `LLM.generate`; and that no client costs a block."""

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

openai = pytest.importorskip("openai", reason="the extra `dev` brings openai")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `server` brings uvicorn")

from minipaged import LLM, SamplingParams  # noqa: E402
from minipaged.model.load import Model, load_model  # noqa: E402
from minipaged.model.tokenizer import TextTokenizer  # noqa: E402
from minipaged.server.app import Limits, Server  # noqa: E402
from minipaged.server.engine_loop import EngineLoop  # noqa: E402
from minipaged.server.metrics import ServerMetrics  # noqa: E402

HANGS = 120.0  # seconds after which a wait is a hang


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", "float64")


class Running:
    """A server in this process, on a free port."""

    def __init__(self, model, api_key=None, limits=None, steps=None, **options):
        self.llm = LLM(model, trace=True, **{"block_size": 4, "num_blocks": 256, "max_num_seqs": 16, **options})
        engine = EngineLoop(self.llm, ServerMetrics("tiny"), steps)
        self.server = Server(engine, "tiny", limits or Limits(), api_key, ["127.0.0.1"])
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app(), port=0, log_level="error", lifespan="on"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        until(lambda: self.uvicorn.started)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key or "x", max_retries=0)

    def ask(self, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGS)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(
            "GET" if body is None else "POST", path, data, {"Content-Type": "application/json", **headers}
        )
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
        connection.close()
        return status, text

    def leave_midway(self, body):
        """Send a request, and go when its first byte is there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGS)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read1(1)
        answer.close()
        connection.close()

    def is_empty(self):
        return not self.llm.requests and not self.llm.blocks.tables and self.llm.blocks.num_used == 0

    def stop(self):
        self.server.drain()
        self.uvicorn.should_exit = True
        self.thread.join(HANGS)
        assert not self.thread.is_alive()


@contextmanager
def running(*args, **options):
    server = Running(*args, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def served(model):
    with running(model) as server:
        yield server


def until(holds):
    give_up = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.01)


def test_64_mixed_clients_get_the_texts_of_generate(model, served):
    params = [
        SamplingParams(n=1 + i % 3, temperature=0.9, seed=i, max_tokens=3 + i % 20, stop=["e"] if i % 4 == 0 else None)
        for i in range(64)
    ]
    prompts = [f"Client {i % 7} says {i}" for i in range(64)]
    expected = [out for p, q in zip(prompts, params, strict=True) for out in LLM(model, block_size=4).generate(p, q)]

    def ask(i):
        fields = {
            "n": params[i].n,
            "temperature": 0.9,
            "seed": i,
            "max_tokens": params[i].max_tokens,
            "stop": params[i].stop,
        }
        if i % 2:
            answer = served.client.completions.create(model="tiny", prompt=prompts[i], **fields)
            return [(choice.text, choice.finish_reason) for choice in answer.choices]
        texts, reasons = [""] * params[i].n, [None] * params[i].n
        for chunk in served.client.completions.create(model="tiny", prompt=prompts[i], stream=True, **fields):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        return list(zip(texts, reasons, strict=True))

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [[(c.text, c.finish_reason) for c in out.outputs] for out in expected]
    until(served.is_empty)


def test_a_conversation_gets_the_answers_of_chat(model):
    """Whole, streamed, and several samples, by OpenAI's client."""
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
    byte = model.tokenizer
    talking = Model(model.transformer, TextTokenizer(byte._tokenizer, byte.eos_token_ids, template))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hm?"}]
    params = SamplingParams(n=2, temperature=0.7, seed=4, max_tokens=12, logprobs=2)
    [expected] = LLM(talking, block_size=4).chat(messages, params)
    fields = {"messages": messages, "n": 2, "temperature": 0.7, "seed": 4, "max_tokens": 12, "logprobs": True}
    with running(talking) as server:
        whole = server.client.chat.completions.create(model="tiny", top_logprobs=2, **fields)
        assert [choice.message.content for choice in whole.choices] == [each.text for each in expected.outputs]
        assert [choice.finish_reason for choice in whole.choices] == [each.finish_reason for each in expected.outputs]
        assert whole.usage.completion_tokens == sum(len(each.token_ids) for each in expected.outputs)
        for choice, each in zip(whole.choices, expected.outputs, strict=True):
            chosen = [found[token] for found, token in zip(each.logprobs, each.token_ids, strict=True)]
            assert [token.logprob for token in choice.logprobs.content] == pytest.approx(chosen)
        texts, usage = ["", ""], None
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in server.client.chat.completions.create(model="tiny", **options, **fields):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [each.text for each in expected.outputs]
        assert usage.total_tokens == whole.usage.total_tokens
        until(server.is_empty)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_finishes_what_it_has(how):
    """The command itself: an answer that is under way comes to its end, and the process ends with 0."""
    command = [sys.executable, "-m", "minipaged", "serve", "tiny", "--port", "0"]
    # A shell that starts the suite in the background has SIGINT ignored, and its children inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        try:
            url = re.search(r"http://\S+/v1", process.stdout.readline())[0]
            client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
            stream = client.completions.create(
                model="tiny", prompt="a", max_tokens=200, temperature=1, seed=1, stream=True
            )
            chunks = iter(stream)
            next(chunks)
            process.send_signal(how)
            reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
            assert reasons[-1] in ("length", "stop")
            assert process.wait(HANGS) == 0
        finally:
            process.kill()


def test_logprobs_and_usage(model, served):
    [expected] = LLM(model).generate("one", SamplingParams(max_tokens=4, logprobs=3))
    answer = served.client.completions.create(model="tiny", prompt="one", temperature=0, max_tokens=4, logprobs=3)
    logprobs = answer.choices[0].logprobs
    chosen = [found[t] for found, t in zip(expected.outputs[0].logprobs, expected.outputs[0].token_ids, strict=True)]
    assert logprobs.token_logprobs == pytest.approx(chosen)
    assert answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens == len(chosen)


def test_a_client_that_goes_away_leaves_nothing(served):
    aborted = served.llm.stats.num_aborted
    long = {"prompt": "on and on", "max_tokens": 400, "ignore_eos": True, "stream": True}
    served.leave_midway(long)
    until(served.is_empty)
    assert served.llm.stats.num_aborted == aborted + 1


FIELDS = ("n", "temperature", "top_p", "max_tokens", "stop", "seed", "logprobs", "stream_options", "messages", "prompt")
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
wrong = {
    "n": st.sampled_from([0, -1, 129, 1.5, "2", [1], True]),
    "temperature": st.sampled_from([-1, 3, "hot", [], {}]),
    "top_p": st.sampled_from([0, -0.5, 1.01, "1"]),
    "max_tokens": st.sampled_from([0, -3, 2.5, "9", [1]]),
    "stop": st.sampled_from(["", [""], 7, ["x"] * 17, {"a": 1}]),
    "seed": st.sampled_from([2**63, 0.5, "1"]),
    "stream": st.sampled_from(["yes", 1, []]),
    "stream_options": st.sampled_from([{"include_usage": True}, 3]),
    "model": st.sampled_from(["nosuch", 5]),
    "tools": st.just([{"type": "function"}]),
    "frequency_penalty": st.sampled_from([0.5, "x"]),
}


@st.composite
def malformed(draw):
    """A body that asks for what there is not: bytes that are no JSON, JSON of another shape, or one wrong field."""
    path = draw(st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
    kind = draw(st.sampled_from(["bytes", "junk", "field", "unknown"]))
    right = (
        {"prompt": "a", "max_tokens": 1}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    )
    if kind == "bytes":
        return path, b"{" + draw(st.binary(max_size=20)) + b"\xff"
    if kind == "junk":
        return path, draw(junk)
    if kind == "unknown":
        return path, right | {
            "no_" + draw(st.text("abc", max_size=3)): draw(junk.filter(lambda each: each is not None))
        }
    name = draw(st.sampled_from(sorted(wrong)))
    return path, right | {name: draw(wrong[name])}


def refused(served, case):
    path, body = case
    status, text = served.ask(path, body if body is not None else b"null")
    assert 400 <= status < 500, (status, text)
    assert json.loads(text)["error"]["message"]


@given(malformed())
def test_a_malformed_body_is_refused_with_a_reason(served, case):
    refused(served, case)


@pytest.mark.slow
@settings(max_examples=1_000)
@given(malformed())
def test_a_thousand_malformed_bodies(served, case):
    refused(served, case)


def test_what_can_never_run_is_refused_with_the_numbers(served):
    status, text = served.ask("/v1/completions", {"prompt": "x" * 600, "max_tokens": 5})
    assert status == 400 and b"600" in text and b"512" in text


def test_a_body_that_is_too_large_and_one_of_another_type(served):
    assert served.ask("/v1/completions", b" " * (1 << 21))[0] == 413
    assert served.ask("/v1/completions", {"prompt": "x"}, **{"Content-Type": "text/plain"})[0] == 415
    assert served.ask("/v1/models", Host="elsewhere.example")[0] == 400


def test_back_pressure_the_key_and_stepping(model):
    with running(model, "secret", Limits(max_waiting=0), 0, max_num_seqs=2) as server:
        key = {"Authorization": "Bearer secret"}
        for path in ("/v1/models", "/metrics", "/live"):
            assert server.ask(path)[0] == 401
        assert server.ask("/health")[0] == server.ask("/")[0] == 200
        body = {"prompt": "wait", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(server.ask, "/v1/completions", body, **key) for _ in range(2)]
            until(lambda: len(server.llm.requests) == 2)
            assert server.ask("/v1/completions", body, **key)[0] == 429
            server.ask("/live", {"steps": 1}, **key)
            until(lambda: server.llm.stats.num_steps == 1)
            assert not any(each.done() for each in asked), "a paused engine ran on"
            server.ask("/live", {"steps": None}, **key)
            assert [each.result(HANGS)[0] for each in asked] == [200, 200]


def test_a_request_that_takes_too_long_is_ended(model):
    with running(model, limits=Limits(seconds=0.2), steps=0) as server:
        status, text = server.ask("/v1/completions", {"prompt": "never", "max_tokens": 3})
        assert status == 504 and b"0.2 s" in text
        until(server.is_empty)


def test_metrics_have_vllms_names(served):
    served.client.completions.create(model="tiny", prompt="count me", max_tokens=2)
    status, text = served.ask("/metrics")
    for name in ("num_requests_running", "kv_cache_usage_perc", "generation_tokens_total", "prompt_tokens_total"):
        assert f"vllm:{name}{{" in text.decode()
    assert status == 200


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_ten_thousand_requests_of_which_a_third_leaves(model):
    """No block is lost, and memory from request 1,000 to 10,000 grows by less than 20 MB."""
    total = int(os.environ.get("REQUESTS", "10000"))
    with running(model) as server:

        async def one(number, turn):
            async with turn:
                leaves = number % 3 == 0
                body = json.dumps(
                    {
                        "prompt": f"n {number % 50}",
                        "stream": True,
                        "ignore_eos": True,
                        "max_tokens": 60 if leaves else 4,
                    }
                )
                head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
                head += "Connection: close\r\nContent-Type: application/json\r\n\r\n"
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write((head + body).encode())
                if leaves:
                    await reader.readuntil(b"data:")
                else:
                    assert b"[DONE]" in await reader.read()
                writer.close()

        async def many(numbers):
            turn = asyncio.Semaphore(16)
            await asyncio.gather(*(one(number, turn) for number in numbers))

        asyncio.run(many(range(total // 10)))
        until(server.is_empty)
        before = resident()
        asyncio.run(many(range(total // 10, total)))
        until(server.is_empty)
        grown = resident() - before
        totals = server.llm.stats
        print(f"{totals.num_finished} finished, {totals.num_aborted} aborted, grown by {grown / 1e6:.1f} MB")
        assert totals.num_finished + totals.num_aborted == total
        assert totals.num_aborted > total // 4
        assert grown < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_shows_the_tables_of_the_engine(model, width, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `site-test` brings playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no browser is on the PATH")
    with running(model, steps=0, num_blocks=24) as server, playwright.sync_playwright() as play:
        page = play.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page(
            viewport={"width": width, "height": 900}
        )
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector(".tp-player")
        with ThreadPoolExecutor(2) as pool:
            body = {"prompt": "<b>bold</b> & on", "max_tokens": 12, "n": 2, "seed": 1, "ignore_eos": True}
            asked = [pool.submit(server.ask, "/v1/completions", body) for _ in range(2)]
            until(lambda: len(server.llm.requests) == 2)
            for steps in range(1, 6):
                page.get_by_role("button", name="One step of the engine", exact=True).click()
                until(lambda steps=steps: server.llm.stats.num_steps == steps)
                held = {
                    seq: [str(block) for block in t.blocks] for seq, t in server.llm.blocks.tables.items() if t.blocks
                }
                read = """() => { const rows = {}; for (const row of document.querySelectorAll('.tp-row'))
                    (rows[row.dataset.seq] ??= [])[row.dataset.logical] = row.dataset.target; return rows; }"""
                until(lambda held=held, read=read: page.evaluate(read) == held)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=os.environ.get("SHOTS", str(tmp_path)) + f"/live_{width}.png", full_page=True)
            page.get_by_role("button", name="Run", exact=True).click()
            assert [each.result(HANGS)[0] for each in asked] == [200, 200]
        assert page.locator("main b").count() == 0, "text of a prompt became HTML"
        assert problems == []
