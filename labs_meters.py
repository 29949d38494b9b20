# SPDX-License-Identifier: Apache-2.0
"""Metrics of requests and engines for Prometheus, under vLLM's names with labs_ instead of vllm:.

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
import labs_history

LABEL = ("model_name",)  # of metrics that exist once per model


class Meters:
    """Count requests, tokens and latencies in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry, self.history = registry, labs_history.History()
        waits = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
        gaps = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = waits) -> Histogram:
            return Histogram(
                f"labs_{name}_seconds", text, LABEL, registry=registry, buckets=buckets
            )

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"labs_{name}", text, (*LABEL, *labels), registry=registry)

        self.first = seconds("time_to_first_token", "Seconds from request to first text")
        self.gap = seconds("inter_token_latency", "Seconds between two pieces of text", gaps)
        self.whole = seconds("e2e_request_latency", "Seconds from request to end of answer")
        self.queued = seconds("request_queue_time", "Seconds from acceptance to a batch row")
        self.prompt = counter("prompt_tokens", "Prompt tokens")
        self.cached = counter("prefix_cache_hits", "Prompt tokens reused from the KV cache")
        self.generated = counter("generation_tokens", "Generated tokens")
        self.success = counter("request_success", "Finished answers", "finished_reason")
        names, text = ("rule", "side"), "Texts that a rule of [guard] masked or refused"
        self.guard = Counter("labs_guard", text, names, registry=registry)

    def acted(self, rule: str, side: str) -> None:
        self.guard.labels(rule, side).inc()

    def piece(self, name: str, now: float, last: float, began: float) -> None:
        """Count a piece of text. last: when the one before came, 0 for the first; perf_counter."""
        if last:
            self.gap.labels(name).observe(now - last)
        else:
            self.first.labels(name).observe(now - began)
            self.history.first(name, now - began)
        self.history.add(name, tokens=1)

    def done(self, name: str, event: labs.Done, seconds: float, pieces: int = 0) -> None:
        """Count a finished answer. pieces: how many of its pieces `piece` has counted."""
        self.history.add(name, tokens=event.usage.completion_tokens - pieces, answers=1)
        self.success.labels(name, event.finish_reason).inc()
        self.prompt.labels(name).inc(event.usage.prompt_tokens)
        self.cached.labels(name).inc(event.usage.cached_tokens)
        self.generated.labels(name).inc(event.usage.completion_tokens)
        self.queued.labels(name).observe(event.timings.queue_s)
        self.whole.labels(name).observe(seconds)


def engine_metrics(statuses: dict[str, labs_engine.Status]) -> Iterator[Any]:
    """Yield the current metrics of engines, the GPU and the log. statuses: by model name."""
    for kind, name, text, field in ENGINE_METRICS:
        family = kind(f"labs_{name}", text, labels=LABEL)
        for model, status in statuses.items():
            family.add_metric([model], float(getattr(status, field)))
        yield family
    memory = GaugeMetricFamily("labs_gpu_memory_bytes", "Memory of the GPU", labels=["kind"])
    for kind, size in gpu_memory().items():
        memory.add_metric([kind], size)
    yield memory
    text = "Writes to standard error that were dropped"
    yield CounterMetricFamily(
        "labs_log_lines_dropped", text, value=getattr(sys.stderr, "dropped", 0)
    )


def draft_metrics(engines: dict[str, Any]) -> Iterator[Any]:
    """Yield how many tokens draft models guessed, and how many were right. engines: by name."""
    decoders = {name: getattr(each.model, "decoder", None) for name, each in engines.items()}
    found = {name: getattr(each, "draft", None) for name, each in decoders.items()}
    for name, text, field in (
        ("num_draft_tokens", "Tokens that a draft model guessed", "proposed"),
        ("num_accepted_tokens", "Tokens of these that were right", "accepted"),
    ):
        family = CounterMetricFamily(f"labs_spec_decode_{name}", text, labels=LABEL)
        for model, draft in found.items():
            family.add_metric([model], getattr(draft, field, 0))
        yield family


ENGINE_METRICS: tuple[tuple[Any, str, str, str], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Requests in the batch", "running"),
    (GaugeMetricFamily, "num_requests_waiting", "Requests waiting for a batch row", "waiting"),
    (GaugeMetricFamily, "num_requests_paused", "Running requests that wait for memory", "paused"),
    (GaugeMetricFamily, "kv_cache_usage_perc", "KV cache in use, from 0 to 1", "cache_usage"),
    (GaugeMetricFamily, "batch_rows", "Batch rows at most", "max_rows"),
    (GaugeMetricFamily, "engine_alive", "1 while the engine's thread runs", "alive"),
    (CounterMetricFamily, "response_cache_hits", "Cached answers sent", "response_cache_hits"),
    (CounterMetricFamily, "steps", "Decode steps", "steps"),
    (CounterMetricFamily, "out_of_memory", "Batches split for lack of memory", "halvings"),
    (CounterMetricFamily, "engine_failures", "Forward passes that failed", "failures"),
)


def gpu_memory() -> dict[str, int]:
    """Return CUDA's memory in bytes by kind, or an empty dict without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return {"allocated": allocated, "reserved": reserved, "free": free, "total": total}
