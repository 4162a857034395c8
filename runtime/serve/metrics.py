"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from phisight.answer import Stats

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Metrics:
    """What one server counts. Memory is told where the system tells it (Linux)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by path and status", "path", "status")
        self._answers = self._counter("answers", "Answers by the reason of their end", "finish_reason")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, by kind", "kind")
        self._reused = self._counter("prompt_tokens_cached", "Tokens of prompts that were in the KV cache")
        self._generated = self._counter("generated_tokens", "Tokens drawn, by channel", "channel")
        self._images = self._counter("images", "Images by where their features came from", "source")
        self._stages = Histogram(
            "phisight_stage_seconds",
            "Seconds of an answer's stages",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)

    def gauge(self, name: str, purpose: str, value: Callable[[], float]) -> None:
        """Tell what a function returns whenever somebody asks."""
        Gauge(f"phisight_{name}", purpose, registry=self._registry).set_function(value)

    def request(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()

    def answer(self, finish_reason: str, queued_seconds: float, stats: Stats | None) -> None:
        """An answer ended, with a finish reason or another word for its end."""
        self._answers.labels(finish_reason).inc()
        self._stages.labels("queue").observe(queued_seconds)
        if stats is None:
            return
        self._prompt.labels("text").inc(stats.text_tokens)
        self._prompt.labels("image").inc(stats.image_tokens)
        self._reused.inc(stats.reused_positions)
        self._generated.labels("thought").inc(stats.thought_tokens)
        self._generated.labels("answer").inc(stats.generated_tokens - stats.thought_tokens)
        self._images.labels("cache").inc(stats.cached_images)
        self._images.labels("encoder").inc(stats.images - stats.cached_images)
        for stage in ("preprocess", "encode", "prefill", "decode"):
            self._stages.labels(stage).observe(getattr(stats, f"{stage}_seconds"))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, purpose: str, *labels: str) -> Counter:
        return Counter(f"phisight_{name}", purpose, labels, registry=self._registry)
