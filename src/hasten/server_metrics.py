"""What a server tells Prometheus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

BUCKETS_S = tuple(float(f"{digits}e{power}") for power in range(-4, 1) for digits in (1, 1.5, 2, 3, 4, 5, 7))
BUCKETS_ROWS = (1, 2, 4, 8, 16, 32, 64)

EXPECTED_STATUSES, RELOADED = (200, 400, 413, 422, 429, 500, 503), ("done", "refused")
REASONS = ("late", "expired", "queue full", "closing")

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported


class Metrics:
    """Counters of one app, in a registry of their own; where processes share a folder, what is told is of all."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("hasten_requests", "Requests to classify, by status.", ["status"], registry=registry)
        self.refusals = Counter(
            "hasten_refusals", "Requests refused for lack of room or time, by reason.", ["reason"], registry=registry
        )
        self.misses = Counter(
            "hasten_deadline_misses", "Requests answered after their deadline.", registry=registry
        )  # fmt: skip
        self.gone = Counter("hasten_clients_gone", "Requests whose client left before the answer.", registry=registry)
        tokens = Counter(
            "hasten_inference_tokens", "Tokens in inferences, of texts and of padding.", ["kind"], registry=registry
        )
        self.reloads = Counter("hasten_reloads", "Reloads of the folder, by outcome.", ["outcome"], registry=registry)
        self._serving = dict[str, str]()
        # An Info cannot be shared among processes.
        self._artifact = Gauge(
            "hasten_artifact_info", "1 for what is served, 0 for what was.", ["name", "digest"], registry=registry,
            multiprocess_mode="livemax",
        )  # fmt: skip
        self.queue = Gauge(
            "hasten_queue_rows", "Texts waiting for an inference.", registry=registry, multiprocess_mode="livesum"
        )
        self.queued = Gauge(
            "hasten_queue_predicted_seconds", "Until an inference is free for a text that comes now; of the process "
            "where it is longest.", registry=registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self.batch = Histogram("hasten_batch_rows", "Texts in an inference.", buckets=BUCKETS_ROWS, registry=registry)
        self.seconds = {
            stage: Histogram(f"hasten_{stage}_seconds", f"Time of {stage}.", buckets=BUCKETS_S, registry=registry)
            for stage in ("tokenize", "queue", "inference", "total")
        }
        self.of_status = cache(lambda status: self.requests.labels(str(status)))
        self.of_reason = cache(self.refusals.labels)
        self.tokens_of = cache(tokens.labels)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """What first comes with a 1 has grown by nothing, for who asks by how much."""
        for status in EXPECTED_STATUSES:
            self.of_status(status)
        for outcome in RELOADED:
            self.reloads.labels(outcome)
        for reason in REASONS:
            self.of_reason(reason)

    def serves(self, identity: Mapping[str, str]) -> None:
        """Notes what is served from now on.

        Args:
            identity: Its `name` and `digest`.
        """
        if self._serving:
            self._artifact.labels(**self._serving).set(0)
        self._serving = dict(identity)
        self._artifact.labels(**identity).set(1)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        everyones = CollectorRegistry()
        MultiProcessCollector(everyones)
        return generate_latest(everyones)
