"""What an engine did so far, for a table: the figures of `LLM.metrics()` in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the engine is above
    from minipaged.engine.metrics import Metrics


def metrics_table(metrics: "Metrics") -> list[tuple[str, str]]:
    """What, and how much."""
    blocks = f"{metrics.num_blocks_used} used, {metrics.num_blocks_cached} cached, {metrics.num_blocks_free} free"
    running, waiting, finished = metrics.num_running, metrics.num_waiting, metrics.num_finished
    batch = metrics.num_scheduled_seqs / max(1, metrics.num_steps)
    first, between = metrics.time_to_first_token, metrics.time_between_tokens
    return [
        ("requests", f"{running} running, {waiting} waiting, {finished} finished"),
        ("blocks", f"{blocks} of {metrics.num_blocks}"),
        ("blocks on the host", f"{metrics.num_host_blocks_used} used of {metrics.num_host_blocks}"),
        ("prefix cache", f"{metrics.prefix_hit_rate:.1%} of {metrics.prefix_tokens_looked_up:,} tokens found"),
        ("preemptions", ", ".join(f"{number} by {mode}" for mode, number in metrics.preemptions.items())),
        ("steps", f"{metrics.num_steps:,}, of {batch:.1f} sequences on average"),
        ("tokens", f"{metrics.num_tokens_computed:,} computed, {metrics.num_tokens_generated:,} generated"),
        ("time to first token", f"mean {first.mean * 1e3:.1f} ms, p99 {first.p99 * 1e3:.1f} ms"),
        ("time between tokens", f"mean {between.mean * 1e3:.1f} ms, p99 {between.p99 * 1e3:.1f} ms"),
        ("scheduler", f"{metrics.scheduler_share:.1%} of {metrics.step_seconds:.2f} s"),
    ]
