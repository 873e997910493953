"""`minipaged serve`: the engine behind OpenAI's API, with a page that shows the block tables."""

import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Annotated

import typer

from minipaged.cli.generate import BlockSizeOption, DtypeOption, MaxModelLenOption, NumBlocksOption, PreemptionOption

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[str, typer.Argument(help="smollm2-135m, tiny, a GGUF file, or a folder with safetensors")] = (
        "smollm2-135m"
    ),
    host: Annotated[str, typer.Option(help="where to listen; other machines reach 0.0.0.0, with --api-key")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MINIPAGED_API_KEY", help="clients give it as Authorization: Bearer KEY")
    ] = None,
    step: Annotated[bool, typer.Option("--step", help="start paused: the page's button runs step after step")] = False,
    block_size: BlockSizeOption = 16,
    num_blocks: NumBlocksOption = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="sequences that run at once", min=1)] = 64,
    preemption: PreemptionOption = "recompute",
    dtype: DtypeOption = "float32",
    max_waiting: Annotated[int, typer.Option(help="answers that may wait; more are told to come again", min=0)] = 256,
    timeout: Annotated[float, typer.Option(help="seconds that a request may take", min=0.1)] = 600.0,
) -> None:
    """Serve a model: OpenAI's API under /v1, Prometheus' /metrics, and at / a page that shows the block tables.

    SIGTERM and Ctrl-C let the requests that are there run to their end; a second Ctrl-C does not.

    Example: minipaged serve tiny --step --num-blocks 24 --block-size 4
    """
    try:
        import uvicorn

        from minipaged.server.app import Limits, Server
        from minipaged.server.engine_loop import EngineLoop
        from minipaged.server.metrics import ServerMetrics
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install 'minipaged[server]'") from error
    if host not in LOOPBACK and not api_key:
        raise ValueError(f"--host {host} can be reached by others: give --api-key, or MINIPAGED_API_KEY")
    try:  # before the model is loaded
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)}; give another --port"
        raise ValueError(f"cannot listen on {host}, port {port}: {why}") from error
    from minipaged import LLM

    llm = LLM(
        model,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        preemption=preemption,
        dtype=dtype,
        trace=True,
    )
    engine = EngineLoop(llm, ServerMetrics(model), 0 if step else None)
    hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    server = Server(engine, model, Limits(max_waiting, timeout), api_key, hosts)

    class Draining(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            print(f"ending: {server.load} answers are finished first", file=sys.stderr)
            server.drain()
            await super().shutdown(sockets)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what uvicorn calls at its end
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    print(f"{model} on {url}/v1, its pool on {url} (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(server.app(), log_level="warning", access_log=False, lifespan="on")
    with suppress(KeyboardInterrupt):
        Draining(config).run(sockets=[listener])
    if engine.alive:  # a second Ctrl-C: its thread would keep the process
        os._exit(130)
