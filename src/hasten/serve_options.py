"""How a variant is served; apart from `hasten.server`, so that the command line reads the defaults at no cost."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.measurement import available_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a variant is served.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        threads: Threads of one inference; None takes all cores at hand.
        workers: Inferences at the same time, at least 1.
        max_batch: Most texts in one inference; a variant that is not batch-invariant is always served one by one.
        max_padded_tokens: Highest cost of an inference of several texts, texts × longest.
        max_queue: Most texts waiting, those being tokenized included; what goes beyond is refused with 429.
        max_rows: Most texts in a request; never more than `max_queue`.
        max_body_bytes: Largest body of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    workers: int = 1
    max_batch: int = 8
    max_padded_tokens: int = 1024
    max_queue: int = 64
    max_rows: int = 32
    max_body_bytes: int = 256 * 1024

    @property
    def resolved_threads(self) -> int:
        """The number of threads of one inference."""
        return self.threads or max(1, int(available_cores()))
