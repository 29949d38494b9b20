# SPDX-License-Identifier: Apache-2.0
"""What /metrics tells, of requests and of engines, under vLLM's names with labs_ for vllm:.

    meters = labs_meters.Meters(prometheus_client.CollectorRegistry())
    meters.done("small", done, seconds=0.4)  # at the end of an answer

Needs labs_engine.py; prometheus-client.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

import labs
import labs_engine

LABEL = ("model_name",)  # of what is told for each model


class Meters:
    """What is counted of requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        waits = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
        gaps = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = waits) -> Histogram:
            return Histogram(
                f"labs_{name}_seconds", text, LABEL, registry=registry, buckets=buckets
            )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"labs_{name}", text, (*LABEL, *labels), registry=registry)

        self.first = seconds("time_to_first_token", "From the request to its first text")
        self.gap = seconds("inter_token_latency", "From one piece of text to the next", gaps)
        self.whole = seconds("e2e_request_latency", "From the request to its end")
        self.queued = seconds("request_queue_time", "From being taken in to a row of its own")
        self.prompt = counter("prompt_tokens", "Prompt tokens")
        self.cached = counter("prefix_cache_hits", "Prompt tokens not computed again")
        self.generated = counter("generation_tokens", "Generated tokens")
        self.success = counter("request_success", "Answers", "finished_reason")
        names, text = ("rule", "side"), "Times that a rule of [guard] masked or refused"
        self.guard = Counter("labs_guard", text, names, registry=registry)

    def acted(self, rule: str, side: str) -> None:
        self.guard.labels(rule, side).inc()

    def done(self, name: str, event: labs.Done, seconds: float) -> None:
        self.success.labels(name, event.finish_reason).inc()
        self.prompt.labels(name).inc(event.usage.prompt_tokens)
        self.cached.labels(name).inc(event.usage.cached_tokens)
        self.generated.labels(name).inc(event.usage.completion_tokens)
        self.queued.labels(name).observe(event.timings.queue_s)
        self.whole.labels(name).observe(seconds)


def engine_metrics(statuses: dict[str, labs_engine.Status]) -> Iterator[Any]:
    """Yield what engines, by their models' names, and the log tell of themselves at this moment."""
    for kind, name, text, field in ENGINE_METRICS:
        family = kind(f"labs_{name}", text, labels=LABEL)
        for model, status in statuses.items():
            family.add_metric([model], float(getattr(status, field)))
        yield family
    memory = GaugeMetricFamily("labs_gpu_memory_bytes", "Memory of the GPU", labels=["kind"])
    for kind, size in gpu_memory().items():
        memory.add_metric([kind], size)
    yield memory
    text = "Writes to standard error that were given up"
    yield CounterMetricFamily(
        "labs_log_lines_dropped", text, value=getattr(sys.stderr, "dropped", 0)
    )


ENGINE_METRICS: tuple[tuple[Any, str, str, str], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Requests with a row", "running"),
    (GaugeMetricFamily, "num_requests_waiting", "Requests that wait for a row", "waiting"),
    (GaugeMetricFamily, "kv_cache_usage_perc", "Share of the slots in use, 0 to 1", "cache_usage"),
    (GaugeMetricFamily, "batch_rows", "Rows that may run at once", "max_rows"),
    (GaugeMetricFamily, "engine_alive", "Whether the engine's thread runs", "alive"),
    (CounterMetricFamily, "response_cache_hits", "Answers not made anew", "response_cache_hits"),
    (CounterMetricFamily, "steps", "Decode steps", "steps"),
    (CounterMetricFamily, "out_of_memory", "Steps halved as memory ran out", "halvings"),
    (CounterMetricFamily, "engine_failures", "Forward passes that failed", "failures"),
)


def gpu_memory() -> dict[str, int]:
    """Return the bytes of CUDA's memory by kind; nothing where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return {"allocated": allocated, "reserved": reserved, "free": free, "total": total}
