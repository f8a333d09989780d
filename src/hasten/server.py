"""One variant behind HTTP: the ASGI app round one `Batcher`.

```
POST /predict   {"inputs": "text"}        [{"label": "...", "score": 0.98}, ...]         best first
                {"inputs": ["a", "b"]}    [[{"label": ...}, ...], [{"label": ...}, ...]]
POST /          the same, always a list of lists: what huggingface_hub's InferenceClient(url) asks and expects
POST /v2/models/NAME/infer                the Open Inference Protocol, see `hasten.open_inference`
GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME, /v2/models/NAME/ready
GET  /health    200 when ready, 503 when starting or closing
GET  /metrics   Prometheus
GET  /          what this is
```

A text is tokenized before it queues. What could only be answered after its deadline (`x-hasten-deadline-ms`, or the
server's own) is refused at once with 429, as is what does not fit the queue. A reply tells how long its parts took
(`x-hasten-tokenize-ms`, `-queue-ms`, `-inference-ms`; of several texts, those of the slowest) and which artifact
answered (`x-hasten-artifact`).

Source: `/predict` of Hugging Face Text Embeddings Inference. We differ: a flat list is a batch, as `[["a"], ["b"]]` is
(there, `["a", "b"]` is one pair; pairs are refused here); texts are truncated unless `"truncate": false`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import msgspec
import numpy as np
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hasten import __version__
from hasten.asked import Asked, RequestError
from hasten.batching import NEVER, Answer, Batcher, Limits
from hasten.costs import CostModel, measure_costs
from hasten.errors import ArtifactError, DataError, OverloadedError, UsageError
from hasten.golden import other_machine, replay_golden
from hasten.open_inference import JSON_LENGTH, asked_by_inference, model_metadata
from hasten.predict_api import asked_by_question
from hasten.runtime import Logits, Runtime, open_runtime
from hasten.serve_options import ServeOptions
from hasten.server_metrics import Metrics
from hasten.tokenization import Encoding
from hasten.variant import open_variant

DEADLINE = "x-hasten-deadline-ms"
TOKENIZERS = 2  # more than one, so that a long text does not hold up the short ones behind it
DRAIN_S = 30

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _Service:
    """One runtime, its batcher, and the endpoints."""

    def __init__(
        self, runtime: Runtime, identity: dict[str, str], limits: Limits, max_tokens: int, options: ServeOptions,
        workers: int,
    ) -> None:  # fmt: skip
        self._runtime, self._identity = runtime, identity
        self._limits, self._max_tokens, self._options, self._workers = limits, max_tokens, options, workers
        self._metrics = Metrics()
        self._tokenizing_rows = 0
        self._tokenizers: ThreadPoolExecutor
        self._batcher: Batcher[Encoding, Logits]
        self._most = min(options.max_rows, limits.max_queue)
        self._default_s = NEVER if options.p99_ms is None else options.p99_ms / 1000
        self.ready = False

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncGenerator[None]:
        with ThreadPoolExecutor(TOKENIZERS, thread_name_prefix="hasten-tokenize") as self._tokenizers:
            costs = await asyncio.get_running_loop().run_in_executor(self._tokenizers, self._warm_up)
            self._batcher = Batcher(self._compute, self._limits, workers=self._workers, costs=costs)
            self.ready = True
            try:
                yield
            finally:
                self.ready = False
                await self._batcher.close()

    def _warm_up(self) -> CostModel:
        limits = self._limits
        return measure_costs(
            self._runtime, max_tokens=self._max_tokens, max_batch=limits.max_batch,
            max_padded_tokens=limits.max_padded_tokens,
        )  # fmt: skip

    def _compute(self, encodings: Sequence[Encoding]) -> Logits:
        self._metrics.batch.observe(len(encodings))
        return self._runtime.infer(encodings)

    async def predict(self, request: Request, *, nested: bool = False) -> Response:
        return await self._reply(
            request, lambda body: asked_by_question(body, self._most, self._runtime.labels, nested=nested)
        )

    async def infer(self, request: Request) -> Response:
        self._require_named(request)
        length = request.headers.get(JSON_LENGTH)
        return await self._reply(
            request, lambda body: asked_by_inference(body, length, self._most, self._runtime.labels, self._identity)
        )

    async def _reply(self, request: Request, read: Callable[[bytes], Asked]) -> Response:
        started_s = perf_counter()
        try:
            response = await self._classify(request, started_s, read)
        except Exception as error:
            response = await _refusal(request, self._explain(error))
        response.headers["x-hasten-artifact"] = self._identity["digest"]
        self._metrics.requests.labels(str(response.status_code)).inc()
        self._metrics.seconds["total"].observe(perf_counter() - started_s)
        return response

    async def _classify(self, request: Request, started_s: float, read: Callable[[bytes], Asked]) -> Response:
        if not self.ready:
            raise OverloadedError("not ready: starting or closing", reason="closing")
        deadline_s = started_s + self._allowed_s(request)
        asked = read(await _read(request, self._options.max_body_bytes))
        answers, tokenize_s = await _unless_gone(request, self._answer(asked.texts, asked.truncate, deadline_s))
        slowest = max(answers, key=lambda answer: answer.queue_s + answer.inference_s)
        logits = np.stack([answer.row for answer in answers])
        if not np.isfinite(logits).all():
            raise RuntimeError("the model answers NaN or infinity")
        content = asked.answer(logits)
        if perf_counter() > deadline_s:
            self._metrics.misses.inc()
        return _json(content, headers=self._timed(tokenize_s, slowest))

    def _allowed_s(self, request: Request) -> float:
        """Seconds that the request may take: what it says itself, or the server's."""
        if (text := request.headers.get(DEADLINE)) is None:
            return self._default_s
        with contextlib.suppress(ValueError):
            if 0 < (allowed_ms := float(text)) < NEVER:
                return allowed_ms / 1000
        raise RequestError(422, "validation", f"{DEADLINE} is a number of milliseconds above 0, not {text!r}")

    async def _answer(
        self, texts: list[str], truncate: bool | None, deadline_s: float
    ) -> tuple[list[Answer[Logits]], float]:
        if deadline_s < NEVER:
            self._batcher.require_time([], deadline_s)  # before the work of tokenizing, and with it below
        started_s = perf_counter()
        encodings = await self._encode(texts)
        tokenize_s = perf_counter() - started_s
        if truncate is False and any(len(encoding) >= self._max_tokens for encoding in encodings):
            # The tokenizer cuts at the limit, so a text of exactly that length cannot be told from a longer one.
            raise RequestError(422, "validation", f"a text is not below {self._max_tokens} tokens; set `truncate`")
        lengths = [max(1, len(encoding)) for encoding in encodings]
        answers = await self._batcher.submit_all(encodings, lengths, deadline_s)
        return answers, tokenize_s

    async def _encode(self, texts: list[str]) -> list[Encoding]:
        # What is being tokenized will queue next: counted here, it is refused before the work and not after it.
        self._batcher.require_room(self._tokenizing_rows + len(texts))
        self._tokenizing_rows += len(texts)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._tokenizers, self._runtime.encode, texts)
        finally:
            self._tokenizing_rows -= len(texts)

    def _timed(self, tokenize_s: float, answer: Answer[Logits]) -> dict[str, str]:
        stages_s = {"tokenize": tokenize_s, "queue": answer.queue_s, "inference": answer.inference_s}
        for stage, seconds in stages_s.items():
            self._metrics.seconds[stage].observe(seconds)
        return {f"x-hasten-{stage}-ms": f"{1000 * seconds:.3f}" for stage, seconds in stages_s.items()}

    def _explain(self, error: Exception) -> RequestError:
        match error:
            case RequestError():
                return error
            case OverloadedError() if self.ready:
                self._metrics.refusals.labels(error.reason).inc()
                wait_s = max(1, math.ceil(error.retry_after_s))
                return RequestError(429, "overloaded", str(error), {"retry-after": str(wait_s)})
            case OverloadedError():
                return RequestError(503, "unhealthy", str(error), {"retry-after": "1"})
            case DataError():
                return RequestError(422, "tokenizer", str(error))
            case ClientDisconnect():
                return RequestError(499, "cancelled", "the client left")
            case _:
                _log.error("inference failed", exc_info=error)
                return RequestError(500, "backend", "inference failed; the server's log tells why")

    async def root(self, request: Request) -> Response:
        if request.method == "POST":
            return await self.predict(request, nested=True)
        about = {"server": f"hasten {__version__}", **self._identity, "labels": self._runtime.labels}
        routes = ["POST /predict", "POST /", "POST /v2/models/NAME/infer", "GET /health", "GET /metrics"]
        return _json({**about, "routes": routes})

    def _require_named(self, request: Request) -> None:
        if (name := request.path_params["name"]) != self._identity["name"]:
            raise RequestError(404, "validation", f"no model {name!r} here, only {self._identity['name']!r}")

    async def live(self, _request: Request) -> Response:
        return _json({"live": True})

    async def server_metadata(self, _request: Request) -> Response:
        return _json({"name": "hasten", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def model(self, request: Request) -> Response:
        self._require_named(request)
        return _json(model_metadata(self._runtime.labels, self._identity))

    async def model_ready(self, request: Request) -> Response:
        self._require_named(request)
        return _json({"name": self._identity["name"], "ready": self.ready}, status=200 if self.ready else 503)

    async def health(self, _request: Request) -> Response:
        status = "ok" if self.ready else "not ready"
        return _json({"status": status, **self._identity}, status=200 if self.ready else 503)

    async def metrics(self, _request: Request) -> Response:
        self._metrics.queue.set(self._batcher.waiting_rows if self.ready else 0)
        self._metrics.queued.set(self._batcher.queued_s() if self.ready else 0)
        return Response(generate_latest(self._metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


def create_app(
    runtime: Runtime, *, name: str, digest: str, batch_invariant: bool, max_tokens: int, options: ServeOptions,
    workers: int = 1,
) -> Starlette:  # fmt: skip
    """Makes the app for one loaded variant.

    Its lifespan warms the runtime up before it takes requests, and finishes what was admitted before it ends.

    Args:
        runtime: What classifies; its `encode` and `infer` are called from worker threads.
        name: The variant's name.
        digest: The variant's digest (hex).
        batch_invariant: Whether a text's logits are the same alone and in any batch; if not, texts go one by one.
        max_tokens: Longest input in tokens, at which `runtime.encode` truncates.
        options: Limits; host, port, threads and workers are not used here.
        workers: Inferences at the same time, at least 1.

    Returns:
        An ASGI app whose lifespan must be run.

    Raises:
        UsageError: A limit is below 1.
    """
    max_batch = options.max_batch if batch_invariant else 1  # else a text's logits would depend on its batch-mates
    limits = Limits(max_batch=max_batch, max_padded_tokens=options.max_padded_tokens, max_queue=options.max_queue)
    service = _Service(runtime, {"name": name, "digest": digest}, limits, max_tokens, options, workers)
    return Starlette(
        routes=[
            Route("/", service.root, methods=["GET", "POST"]),
            Route("/predict", service.predict, methods=["POST"]),
            Route("/v2", service.server_metadata),
            Route("/v2/health/live", service.live),
            Route("/v2/health/ready", service.health),
            *(
                Route(f"/v2/models/{{name}}{version}{path}", endpoint, methods=[method])
                for version in ("", "/versions/{version}")
                for path, endpoint, method in (
                    ("", service.model, "GET"),
                    ("/ready", service.model_ready, "GET"),
                    ("/infer", service.infer, "POST"),
                )
            ),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ],
        exception_handlers={HTTPException: _refusal},
        lifespan=service.lifespan,
    )


def open_app(folder: Path | str, options: ServeOptions) -> Starlette:
    """The app of a variant folder: checks its hashes, replays its golden logits, loads it; raises what `serve` does."""
    variant = open_variant(folder)
    workers, threads = options.layout(variant.manifest.plan)
    _log.info("%s: %d inferences at the same time, threads of each: %d", variant.name, workers, threads)
    replay_golden(variant, threads=threads)
    for sentence in other_machine(variant):
        _log.warning("%s: %s", variant.name, sentence)
    return create_app(
        open_runtime(variant, threads=threads, workers=workers), name=variant.name, digest=variant.digest,
        batch_invariant=variant.manifest.batch_invariant, max_tokens=variant.manifest.max_tokens, options=options,
        workers=workers,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            for listener in sockets or []:
                _log.info("serving on http://%s:%d", *listener.getsockname()[:2])


def serve(folder: Path | str, options: ServeOptions) -> None:
    """Serves a variant folder until SIGINT or SIGTERM, then finishes the requests that were admitted.

    Args:
        folder: The variant.
        options: Where to listen, threads, limits.

    Raises:
        ArtifactError: The folder is incomplete, altered or cannot be loaded, or the server does not start.
        ParityError: This machine computes other logits than those recorded when the folder was made.
        UsageError: A limit is below 1, or the address cannot be listened on.
    """
    # The port is taken first, so that a wrong one fails before a model is loaded; it answers when the app is ready.
    with _bound(options) as listener:
        server = _Server(uvicorn.Config(
            open_app(folder, options), loop="uvloop", http="httptools", ws="none", lifespan="on", log_config=None,
            access_log=False, server_header=False, timeout_graceful_shutdown=DRAIN_S,
        ))  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            server.run(sockets=[listener])
        if not server.started:
            raise ArtifactError(f"{folder}: the server did not start; the log above tells why")


def _bound(options: ServeOptions) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UsageError(f"cannot listen on {options.host}, port {options.port}: {error}; choose others") from error
    return listener


async def _read(request: Request, max_bytes: int) -> bytes:
    """The body, counted as it comes: a Content-Length may lie or be missing."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RequestError(413, "validation", f"the body is above {max_bytes} bytes", {"connection": "close"})
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Does the work, but drops it as soon as the client leaves."""
    task = asyncio.ensure_future(work)
    # The body has been read, so the next message can only tell that the client left.
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _json(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _refusal(_request: Request, error: Any) -> Response:
    kind = error.kind if isinstance(error, RequestError) else "validation"
    return _json({"error": error.detail, "error_type": kind}, status=error.status_code, headers=error.headers)
