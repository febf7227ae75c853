"""Counters and histograms for Prometheus, in a registry of their own, so a program may have several gateways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..errors import ServiceUnavailable
from ..fields import ModelFields
from .openai_services import ServerModel

if TYPE_CHECKING:
    from .records import Record

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTERVAL_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one gateway. A label `key` is the name of an API key, or empty."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.in_progress = Gauge(
            "gateway_requests_in_progress", "HTTP requests that are being answered.", registry=self.registry
        )
        self._requests = Counter(
            "gateway_requests",
            "HTTP requests, by route and status.",
            ["method", "route", "status", "key"],
            registry=self.registry,
        )
        self._failures = Counter(
            "gateway_stream_failures",
            "Streams that ended in an error, by OpenAI's code.",
            ["code"],
            registry=self.registry,
        )
        self._prompt_tokens = Counter("gateway_prompt_tokens", "Tokens of prompts.", ["key"], registry=self.registry)
        self._cached_tokens = Counter(
            "gateway_cached_prompt_tokens",
            "Tokens of prompts that came from the service's prefix cache.",
            ["key"],
            registry=self.registry,
        )
        self._completion_tokens = Counter(
            "gateway_completion_tokens", "Tokens of answers.", ["key"], registry=self.registry
        )
        self._first_token = Histogram(
            "gateway_time_to_first_token_seconds",
            "Seconds from the request to the first piece of text.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._queue_times = Histogram(
            "gateway_queue_time_seconds",
            "Seconds that an answer waited in the service's queue.",
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._intervals = Histogram(
            "gateway_inter_token_latency_seconds",
            "Seconds between two pieces of text of one answer.",
            buckets=_INTERVAL_BUCKETS,
            registry=self.registry,
        )
        self._up = self._of_service("service_up", "1 if a service behind the gateway answers, otherwise 0.")
        self._loads = {
            "running": self._of_service("service_requests_running", "Requests that a service is answering."),
            "waiting": self._of_service("service_requests_waiting", "Requests in a service's queue."),
            "steps": self._of_service("service_steps", "Steps that the model has run since its service started."),
        }

    def _of_service(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, ["service"], registry=self.registry)

    def add(self, record: Record) -> None:
        """Count a request that has ended."""
        method = record.method if record.method in _METHODS else "other"
        self._requests.labels(method, record.route, str(record.status), record.key).inc()
        if record.first_token is not None:
            self._prompt_tokens.labels(record.key).inc(record.prompt_tokens)
            self._cached_tokens.labels(record.key).inc(record.cached_tokens)
            self._completion_tokens.labels(record.key).inc(record.completion_tokens)
            self._first_token.observe(record.first_token)
        for seconds in record.queue_times:
            self._queue_times.observe(seconds)
        for interval in record.intervals:
            self._intervals.observe(interval)
        if record.failure:
            self._failures.labels(record.failure).inc()

    def page(self, services: Mapping[str, ModelFields | ServerModel | ServiceUnavailable]) -> bytes:
        """Return all metrics in Prometheus' text format. `services` are the services' replies by their addresses."""
        for gauge in (self._up, *self._loads.values()):
            gauge.clear()
        for address, reply in services.items():
            self._up.labels(address).set(not isinstance(reply, ServiceUnavailable))
            if isinstance(reply, ModelFields):  # other servers tell no load
                for field, gauge in self._loads.items():
                    gauge.labels(address).set(getattr(reply, field))
        return generate_latest(self.registry)
