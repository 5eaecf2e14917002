"""What a server is doing, for Prometheus to fetch."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from focusllm.serving.worker import Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class _OfWorker(Collector):
    """Read when they are asked for."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def collect(self) -> Iterator[Metric]:
        totals, order = self.worker.totals, self.worker.scheduler
        tokens = CounterMetricFamily("focusllm_tokens", "Tokens, by what was done with them.", labels=["kind"])
        tokens.add_metric(["read"], totals.read_tokens)
        tokens.add_metric(["cached"], totals.cached_tokens)
        tokens.add_metric(["generated"], totals.generated_tokens)
        yield tokens
        jobs = CounterMetricFamily("focusllm_jobs", "Prompts, by how they ended.", labels=["end"])
        jobs.add_metric(["finished"], totals.finished_jobs)
        jobs.add_metric(["cancelled"], totals.cancelled_jobs)
        jobs.add_metric(["failed"], totals.failed_jobs)
        yield jobs
        yield CounterMetricFamily("focusllm_steps", "Steps of the model's thread.", value=totals.steps)
        under_way = GaugeMetricFamily("focusllm_jobs_now", "Prompts that are not done, by state.", labels=["state"])
        under_way.add_metric(["waiting"], len(order.waiting))
        under_way.add_metric(["reading"], len(order.reading))
        under_way.add_metric(["decoding"], len(order.decoding))
        yield under_way
        yield GaugeMetricFamily("focusllm_kept_bytes", "Of chunks kept for later.", value=self.worker.chunks.nbytes)


class Metrics:
    """Counts of one server.

    Args:
        worker: whose work is counted.
    """

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        self._registry.register(_OfWorker(worker))
        labels = ["route", "status"]
        self._requests = Counter("focusllm_requests", "Requests over HTTP.", labels, registry=self._registry)
        self._seconds = Histogram(
            *("focusllm_request_seconds", "Until a response was complete.", ["route"]),
            buckets=SECONDS,
            registry=self._registry,
        )

    def count(self, route: str, status: int, seconds: float) -> None:
        """A response is complete."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
