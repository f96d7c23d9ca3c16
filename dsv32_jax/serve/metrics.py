"""Counters of requests, and what the engine has done, for Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..generation.engine import Engine

COUNTERS = {
    "generated": "tokens generated",
    "prefix_hits": "prompt tokens that were found in the cache",
    "preemptions": "rows that lost their place for want of pages",
    "answered": "rows that have had a token",
    "prefill_seconds": "seconds spent on prompts",
    "decode_seconds": "seconds spent on new tokens",
    "compile_seconds": "seconds spent on compilation",
}
GAUGES = {
    "running": "rows that generate",
    "reading": "rows whose prompt is being read",
    "waiting": "rows that wait for a place",
    "pages": "pages of 64 tokens",
    "pages_of_rows": "pages that rows use",
    "pages_used": "pages that rows use or that hold what may be asked again",
}
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class EngineCollector(Collector):
    """Reads an engine's statistics when they are asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        """Yield them as metrics."""
        stats = self._engine.stats()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"dsv32_{name}", text, stats[name])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"dsv32_{name}", text, stats[name])


class Metrics:
    """The metrics of one server.

    first_token  seconds from a request to its first token;  requests: those that were answered, by their status
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self.first_token = Histogram(
            "dsv32_first_token_seconds", "time to the first token", buckets=SECONDS, registry=self._registry
        )
        self.requests = Counter("dsv32_requests", "requests by status", ["status"], registry=self._registry)

    def write(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)
