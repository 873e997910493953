"""What the server did, for Prometheus. A metric that means what one of vLLM's means has its name.

Histograms grow as tokens come, in the engine's thread. What the engine counts itself is read when it is asked for.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minipaged.engine.metrics import Metrics
from minipaged.engine.sequence import Request, Sequence

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServerMetrics:
    """Every metric has the label model_name, as vLLM's have."""

    def __init__(self, model: str):
        self.model, self._engine = model, None  # type: tuple[str, Metrics | None]
        self.registry = CollectorRegistry()

        def histogram(name: str, what: str) -> Histogram:
            family = Histogram(f"vllm:{name}_seconds", what, ["model_name"], buckets=SECONDS, registry=self.registry)
            return family.labels(model)

        self.first = histogram("time_to_first_token", "From a request's arrival to its first token.")
        self.between = histogram("inter_token_latency", "From one token of a sequence to its next.")
        self.whole = histogram("e2e_request_latency", "From a request's arrival to its last token.")
        labels = ["model_name", "finished_reason"]
        prompts = Counter("vllm:prompt_tokens", "Tokens of prompts.", labels[:1], registry=self.registry)
        self.prompt_tokens = prompts.labels(model)
        self.success = Counter("vllm:request_success", "Requests that ended.", labels, registry=self.registry)
        self.registry.register(self)

    def token(self, request: Request, seq: Sequence, number: int) -> None:
        """A sequence got its token `number`."""
        now = seq.outputs[number].time
        if number:
            self.between.observe(now - seq.outputs[number - 1].time)
        elif seq.index == 0:
            self.first.observe(now - request.arrival_time)
            self.prompt_tokens.inc(len(seq.prompt_token_ids))

    def finished(self, request: Request) -> None:
        times = [seq.outputs[-1].time for seq in request.seqs if seq.outputs]
        if times:
            self.whole.observe(max(times) - request.arrival_time)
        self.success.labels(self.model, request.seqs[0].finish_reason).inc()

    def text(self, engine: Metrics) -> bytes:
        """All of it in Prometheus' text form."""
        self._engine = engine
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine counts."""
        if (engine := self._engine) is None:
            return
        gauges = [
            ("vllm:num_requests_running", "Sequences that run.", engine.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait.", engine.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the blocks in use.", engine.num_blocks_used / engine.num_blocks),
            ("minipaged:num_blocks_cached", "Cached blocks that no table names.", engine.num_blocks_cached),
            ("minipaged:num_host_blocks_used", "Blocks in use in the host's memory.", engine.num_host_blocks_used),
        ]
        counters = [
            ("vllm:num_preemptions", "Preemptions, by recompute or swap.", sum(engine.preemptions.values())),
            ("vllm:generation_tokens", "Tokens generated.", engine.num_tokens_generated),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", engine.prefix_tokens_looked_up),
            ("vllm:prefix_cache_hits", "Tokens found there.", engine.prefix_tokens_found),
            ("minipaged:requests_aborted", "Requests whose client, or time, was gone.", engine.num_aborted),
            ("minipaged:steps", "Steps of the engine.", engine.num_steps),
        ]
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, what, value in rows:
                family = kind(name, what, labels=["model_name"])
                family.add_metric([self.model], float(value))
                yield family
