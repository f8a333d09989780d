"""What a server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

BUCKETS_S = tuple(float(f"{digits}e{power}") for power in range(-4, 1) for digits in (1, 1.5, 2, 3, 4, 5, 7))
BUCKETS_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one app, in a registry of their own."""

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
        self.tokens = Counter(
            "hasten_inference_tokens", "Tokens in inferences, of texts and of padding.", ["kind"], registry=registry
        )
        self.reloads = Counter("hasten_reloads", "Reloads of the folder, by outcome.", ["outcome"], registry=registry)
        self.artifact = Info("hasten_artifact", "What is served.", registry=registry)
        self.queue = Gauge("hasten_queue_rows", "Texts waiting for an inference.", registry=registry)
        self.queued = Gauge(
            "hasten_queue_predicted_seconds", "Until an inference is free for a text that comes now.", registry=registry
        )  # fmt: skip
        self.batch = Histogram("hasten_batch_rows", "Texts in an inference.", buckets=BUCKETS_ROWS, registry=registry)
        self.seconds = {
            stage: Histogram(f"hasten_{stage}_seconds", f"Time of {stage}.", buckets=BUCKETS_S, registry=registry)
            for stage in ("tokenize", "queue", "inference", "total")
        }
