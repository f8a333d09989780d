"""How a variant is served; apart from `hasten.processes`, so that the command line reads the defaults at no cost."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.cores import available_cores
from hasten.errors import UsageError
from hasten.measurement import this_host
from hasten.variant import ThreadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a variant is served.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        threads: Threads of one inference; None shares out all cores.
        workers: Inferences at the same time, at least 1; None takes 1. Where both are None and there is one process,
            the folder's plan says both.
        processes: Processes that share the port and the cores, at least 1.
        p99_ms: Milliseconds in which a request must be answered that names no deadline itself, above 0; what could only
            be answered later is refused. None has no deadline.
        max_batch: Most texts in one inference, where the measured costs speak for more than one; a variant that is not
            batch-invariant is always served one by one.
        max_padded_tokens: Highest cost of an inference of several texts, texts × longest.
        max_queue: Most texts waiting, those being tokenized included; what goes beyond is refused with 429.
        max_rows: Most texts in a request; never more than `max_queue`.
        max_body_bytes: Largest body of a request.
        traces: Whether requests are traced, see `hasten.spans`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    workers: int | None = None
    processes: int = 1
    p99_ms: float | None = None
    max_batch: int = 8
    max_padded_tokens: int = 1024
    max_queue: int = 64
    max_rows: int = 32
    max_body_bytes: int = 256 * 1024
    traces: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UsageError: The deadline is not above 0 or not finite, or there is none of something that must be there.
        """
        for name in ("processes", "workers", "threads", "max_batch", "max_queue"):
            number: int | None = getattr(self, name)
            if number is not None and number < 1:
                raise UsageError(f"--{name.replace('_', '-')} is at least 1, not {number}")
        if self.p99_ms is not None and not 0 < self.p99_ms < float("inf"):
            raise UsageError(f"--p99-ms is a number of milliseconds above 0, not {self.p99_ms:g}")

    def layout(self, plan: ThreadPlan | None) -> tuple[int, int]:
        """Inferences at the same time, and threads of each.

        Args:
            plan: What was measured for the folder; followed by a single process where it is from a machine like this
                one and neither number is given.

        Returns:
            Workers and threads, of each process.
        """
        cores = available_cores() / self.processes
        free = self.threads is None and self.workers is None and self.processes == 1
        if plan is not None and free and plan.is_of(this_host().cpu, cores):
            return plan.for_latency.workers, plan.for_latency.threads  # what the budget was about
        workers = self.workers or 1
        return workers, self.threads or max(1, int(cores) // workers)
