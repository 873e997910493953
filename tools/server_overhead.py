"""What the server adds to a workload: the same requests in process and over HTTP, in turn, on one engine thread.

    OMP_NUM_THREADS=1 python tools/server_overhead.py [MODEL] [ROUNDS]

The clients are asyncio streams in a process of their own; both sides end when the last answer is whole. The engine in
process records no trace, so what the page's trace costs counts as the server's.
"""

import asyncio
import json
import subprocess
import sys
import time
from statistics import median

from minipaged import LLM, SamplingParams

CLIENTS, NEW = 32, 128  # as workload C of the benchmark


def prompt(number: int) -> str:
    return f"Client {number} asks: what does a page table hold, and why is a block of memory as small as it is? "


async def over_http(port: int) -> float:
    async def one(number: int) -> None:
        body = json.dumps(
            {"prompt": prompt(number), "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True}
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        assert b"[DONE]" in await reader.read()
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*map(one, range(CLIENTS)))
    return time.perf_counter() - start


def main() -> None:
    name, rounds = (sys.argv[1:2] or ["smollm2-135m"])[0], int((sys.argv[2:3] or ["5"])[0])
    llm = LLM(name)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    command = [sys.executable, "-m", "minipaged", "serve", name, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(server.stdout.readline().split("/v1")[0].rpartition(":")[2])
        found: list[tuple[float, float]] = []
        for number in range(rounds + 1):
            start = time.perf_counter()
            llm.generate([prompt(i) for i in range(CLIENTS)], params, progress=False)
            inside = time.perf_counter() - start
            outside = asyncio.run(over_http(port))
            if number:  # the first round compiles and warms up
                found.append((inside, outside))
                print(f"in process {inside:.3f} s, server {outside:.3f} s, {outside / inside - 1:+.1%}", flush=True)
        print(f"median {median(b / a for a, b in found) - 1:+.1%} of {rounds} rounds")
        server.terminate()


if __name__ == "__main__":
    main()
