"""One variant behind HTTP: the ASGI app round one `Batcher`.

```
POST /predict   {"inputs": "text"}        [{"label": "...", "score": 0.98}, ...]         best first
                {"inputs": ["a", "b"]}    [[{"label": ...}, ...], [{"label": ...}, ...]]
POST /          the same, always a list of lists: what huggingface_hub's InferenceClient(url) asks and expects
POST /v2/models/NAME/infer                the Open Inference Protocol, see `hasten.open_inference`
GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME, /v2/models/NAME/ready
GET  /health    200 when ready, 503 when starting or closing
GET  /metrics   Prometheus
GET  /          a page to try a text on and to watch the server; to a client that is no browser, what this is
GET  /docs      the API to read and try; GET /openapi.json, the document behind it, see `hasten.openapi`
```

A text is tokenized before it queues. What could only be answered after its deadline (`x-hasten-deadline-ms`, or the
server's own) is refused at once with 429, as is what does not fit the queue. A reply tells how long its parts took
(`x-hasten-tokenize-ms`, `-queue-ms`, `-inference-ms`; of several texts, those of the slowest) and which artifact
answered (`x-hasten-artifact`), and repeats `x-request-id` or gives one.

Source: `/predict` of Hugging Face Text Embeddings Inference. We differ: a flat list is a batch, as `[["a"], ["b"]]` is
(there, `["a", "b"]` is one pair; pairs are refused here); texts are truncated unless `"truncate": false`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import getrandbits
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hasten import __version__, openapi
from hasten.asgi_calls import Endpoint
from hasten.asked import Asked, RequestError
from hasten.batch_choice import NEVER
from hasten.batching import LATE, Answer
from hasten.calls import SHORT_WAY, Call, Reply, ShortWay
from hasten.errors import DataError, OverloadedError
from hasten.open_inference import JSON_LENGTH, asked_by_inference, model_metadata
from hasten.page import page
from hasten.predict_api import asked_by_question
from hasten.runtime import Logits
from hasten.serve_options import ServeOptions
from hasten.served import TOKENIZING_YIELDS, Loaded, Served, aside, load, yield_to_the_loop
from hasten.server_metrics import Metrics
from hasten.spans import Spans

ARTIFACT, DEADLINE, REQUEST_ID = "x-hasten-artifact", "x-hasten-deadline-ms", "x-request-id"
MOST_ID = 128
TOKENIZERS = 2  # more than one, so that a long text does not hold up the short ones behind it
OBSERVE_S = 0.25
TOO_LATE = msgspec.json.encode({"error": LATE, "error_type": "overloaded"})

_log = logging.getLogger(__name__)


class _Service:
    """What serves at the moment, and the endpoints.

    Args:
        loaded: The variant.
        options: Limits.
        again: Loads the variant anew, for a reload.
        spans: What records traces.
    """

    def __init__(
        self, loaded: Loaded, options: ServeOptions, again: Callable[[], Loaded] | None, spans: Spans | None
    ) -> None:
        self._options, self._again, self._spans = options, again, spans
        self._metrics = Metrics()
        self._tokenizers = ThreadPoolExecutor(
            TOKENIZERS, "hasten-tokenize", initializer=partial(yield_to_the_loop, TOKENIZING_YIELDS)
        )
        self._served = Served(loaded, options, self._metrics, self._tokenizers)
        self._default_s = NEVER if options.p99_ms is None else options.p99_ms / 1000
        self._reloading: asyncio.Task[None] | None = None
        self._reload_wanted = False
        self.ready = False

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncGenerator[dict[str, Any]]:
        with self._tokenizers:
            await self._served.start()
            self._metrics.serves(self._loaded.identity)
            self.ready = True
            if self._reload_wanted:
                self.reload_soon()
            observing = asyncio.create_task(self._observe())
            try:
                yield {} if self._spans else {SHORT_WAY: self._short_way()}  # what goes past ASGI is not traced
            finally:
                self.ready = False
                observing.cancel()
                if self._reloading is not None:
                    await self._reloading
                await self._served.close()
                if self._spans is not None:
                    await asyncio.to_thread(self._spans.close)

    def _short_way(self) -> ShortWay:
        answers = {b"/predict": self.predict, b"/": self.predict_nested}
        return ShortWay(answers=answers, refusal=self.refusal, most_body=self._options.max_body_bytes)

    @property
    def _loaded(self) -> Loaded:
        return self._served.loaded

    async def _observe(self) -> None:
        """Tells of the queue now and then, for whoever asks another process."""
        while True:
            self._observe_queue()
            await asyncio.sleep(OBSERVE_S)

    def _observe_queue(self) -> None:
        self._metrics.queue.set(self._served.batcher.waiting_rows if self.ready else 0)
        self._metrics.queued.set(self._served.batcher.queued_s() if self.ready else 0)

    def reload_soon(self) -> None:
        """Begins to load the folder anew; where that is under way or the first is not ready, once that is done."""
        self._reload_wanted = True
        if self.ready and (self._reloading is None or self._reloading.done()):
            self._reloading = asyncio.create_task(self._reload_as_wanted())

    async def _reload_as_wanted(self) -> None:
        while self._reload_wanted and self.ready:
            self._reload_wanted = False
            await self._reload()

    async def _reload(self) -> None:
        """Puts what stands in the folder now in place of what serves; if it fails its checks, nothing changes."""
        if self._again is None:
            return
        try:
            loaded = await aside(self._again)
            fresh = Served(loaded, self._options, self._metrics, self._tokenizers)
            await fresh.start()
        except Exception as error:  # whatever is wrong with the new one, the old one goes on
            self._metrics.reloads.labels("refused").inc()
            _log.error("reload refused, %s goes on serving: %s", self._loaded.name, error)
            return
        old, self._served = self._served, fresh
        self._metrics.reloads.labels("done").inc()
        self._metrics.serves(loaded.identity)
        _log.info("now serving %s (%s)", loaded.name, loaded.digest[:12])
        await old.retire()

    async def predict(self, call: Call, *, nested: bool = False) -> Reply:
        def read(body: bytes, served: Served) -> Asked:
            return asked_by_question(body, served.most_rows, served.loaded.runtime.labels, nested=nested)

        return await self._reply(call, read)

    async def predict_nested(self, call: Call) -> Reply:
        return await self.predict(call, nested=True)

    async def infer(self, call: Call) -> Reply:
        def read(body: bytes, served: Served) -> Asked:
            self._require_named(call.params["name"])
            length, loaded = call.header(JSON_LENGTH), served.loaded
            return asked_by_inference(body, length, served.most_rows, loaded.runtime.labels, loaded.identity)

        return await self._reply(call, read)

    async def _reply(self, call: Call, read: Callable[[bytes, Served], Asked]) -> Reply:
        name = _name_of(call)
        try:
            body, told = await self._classify(call, name, read)
        except Exception as error:
            return self._refused(error, name)
        self._metrics.of_status(200).inc()
        self._metrics.seconds["total"].observe(perf_counter() - call.read_s)
        return Reply(status=200, body=body, headers={REQUEST_ID: name[:MOST_ID], **told})

    def refusal(self, call: Call) -> Reply | None:
        """The reply to a call that could only be late, told by the connection before the body is there."""
        try:
            deadline_s = call.read_s + self._allowed_s(call.header(DEADLINE))
        except RequestError:
            return None  # a deadline that is none: told where the body is read
        if not self.ready or deadline_s == NEVER or (late_s := self._served.batcher.late_s(deadline_s)) <= 0:
            return None
        # As `_refused` does, but by way of no error: under overload this is what is done most.
        self._metrics.of_reason("late").inc()
        self._metrics.of_status(429).inc()
        headers = {REQUEST_ID: _name_of(call)[:MOST_ID], ARTIFACT: self._loaded.digest}
        return Reply(status=429, body=TOO_LATE, headers=headers | {"retry-after": str(max(1, math.ceil(late_s)))})

    def _refused(self, error: Exception, name: str) -> Reply:
        refusal = self._explain(error, name)
        self._metrics.of_status(refusal.status_code).inc()
        headers = {REQUEST_ID: name[:MOST_ID], ARTIFACT: self._loaded.digest, **(refusal.headers or {})}
        return Reply(status=refusal.status_code, body=_error_body(refusal), headers=headers)

    async def _classify(
        self, call: Call, name: str, read: Callable[[bytes, Served], Asked]
    ) -> tuple[bytes, dict[str, str]]:
        if not self.ready:
            raise OverloadedError("not ready: starting or closing", reason="closing")
        allowed_s = self._allowed_s(call.header(DEADLINE))
        if call.body_is_awaited:
            self._served.require_time(call.read_s + allowed_s)
        body, served = await call.body(self._options.max_body_bytes), self._served
        deadline_s = call.read_s + allowed_s  # how long the client took to send the body is not the server's
        served.require_time(deadline_s)
        with served.in_use():
            asked = read(body, served)
            answers, tokenize_s = await call.unless_gone(served.answer(asked.texts, asked.truncate, deadline_s))
        slowest = max(answers, key=lambda answer: answer.queue_s + answer.inference_s)
        logits = np.stack([answer.row for answer in answers])
        if not np.isfinite(logits).all():
            raise RuntimeError("the model answers NaN or infinity")
        content = msgspec.json.encode(asked.answer(logits))
        if perf_counter() > deadline_s:
            self._metrics.misses.inc()
        return content, {ARTIFACT: served.loaded.digest, **self._timed(tokenize_s, slowest, name)}

    def _allowed_s(self, text: str | None) -> float:
        """Seconds that a request may take: what it says itself, or the server's."""
        if text is None:
            return self._default_s
        with contextlib.suppress(ValueError):
            if 0 < (allowed_ms := float(text)) < NEVER:
                return allowed_ms / 1000
        raise RequestError(422, "validation", f"{DEADLINE} is a number of milliseconds above 0, not {text!r}")

    def _timed(self, tokenize_s: float, answer: Answer[Logits], name: str) -> dict[str, str]:
        stages_s = {"tokenize": tokenize_s, "queue": answer.queue_s, "inference": answer.inference_s}
        for stage, seconds in stages_s.items():
            self._metrics.seconds[stage].observe(seconds)
        if self._spans is not None:
            self._spans.record(stages_s, name)
        return {f"x-hasten-{stage}-ms": f"{1000 * seconds:.3f}" for stage, seconds in stages_s.items()}

    def _explain(self, error: Exception, name: str) -> RequestError:
        match error:
            case RequestError():
                return error
            case OverloadedError() if self.ready:
                self._metrics.of_reason(error.reason).inc()
                wait_s = max(1, math.ceil(error.retry_after_s))
                return RequestError(429, "overloaded", str(error), {"retry-after": str(wait_s)})
            case OverloadedError():
                return RequestError(503, "unhealthy", str(error), {"retry-after": "1"})
            case DataError():
                return RequestError(422, "tokenizer", str(error))
            case ClientDisconnect():
                self._metrics.gone.inc()
                return RequestError(499, "cancelled", "the client left")
            case _:
                _log.error("request %.128s: inference failed", name, exc_info=error, extra={"request_id": name})
                return RequestError(500, "backend", "inference failed; the server's log tells why")

    async def root(self, request: Request) -> Response | Endpoint:
        if request.method == "POST":
            return Endpoint(self.predict_nested)
        if "text/html" in request.headers.get("accept", ""):
            return page()
        about = {"server": f"hasten {__version__}", **self._loaded.identity, "labels": self._loaded.runtime.labels}
        routes = ["POST /predict", "POST /", "POST /v2/models/NAME/infer", "GET /health", "GET /metrics", "GET /docs"]
        reply = _json({**about, "routes": routes})
        reply.headers["vary"] = "accept"
        return reply

    def _require_named(self, name: str) -> None:
        if name != self._loaded.identity["name"]:
            raise RequestError(404, "validation", f"no model {name!r} here, only {self._loaded.identity['name']!r}")

    def api(self) -> dict[str, Any]:
        return openapi.document(self._loaded.name, deadline=DEADLINE, request_id=REQUEST_ID, artifact=ARTIFACT)

    async def live(self, _request: Request) -> Response:
        return _json({"live": True})

    async def server_metadata(self, _request: Request) -> Response:
        return _json({"name": "hasten", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def model(self, request: Request) -> Response:
        self._require_named(request.path_params["name"])
        return _json(model_metadata(self._loaded.runtime.labels, self._loaded.identity))

    async def model_ready(self, request: Request) -> Response:
        self._require_named(request.path_params["name"])
        return _json({"name": self._loaded.identity["name"], "ready": self.ready}, status=200 if self.ready else 503)

    async def health(self, _request: Request) -> Response:
        told = {"status": "ok" if self.ready else "not ready", "ready": self.ready}
        return _json(told | self._loaded.identity, status=200 if self.ready else 503)

    async def metrics(self, _request: Request) -> Response:
        self._observe_queue()
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def create_app(
    loaded: Loaded, options: ServeOptions, again: Callable[[], Loaded] | None = None, spans: Spans | None = None
) -> Starlette:
    """Makes the app for one loaded variant.

    Its lifespan warms the runtime up before it takes requests, and finishes what was admitted before it ends.

    Args:
        loaded: The variant.
        options: Limits; host, port, threads and workers are not used here.
        again: Loads the variant anew when `app.state.reload()` is called; None cannot.
        spans: What records traces; None records none.

    Returns:
        An ASGI app whose lifespan must be run.

    Raises:
        UsageError: A limit is below 1.
    """
    service = _Service(loaded, options, again, spans)
    app = Starlette(
        routes=[
            Route("/", service.root, methods=["GET", "POST"]),
            Route("/predict", Endpoint(service.predict), methods=["POST"]),
            Route("/v2", service.server_metadata),
            Route("/v2/health/live", service.live),
            Route("/v2/health/ready", service.health),
            *(
                Route(f"/v2/models/{{name}}{version}{path}", endpoint, methods=[method])
                for version in ("", "/versions/{version}")
                for path, endpoint, method in (
                    ("", service.model, "GET"),
                    ("/ready", service.model_ready, "GET"),
                    ("/infer", Endpoint(service.infer), "POST"),
                )
            ),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
            *openapi.routes(service.api),
        ],
        middleware=[Middleware(spans.around)] if spans else [],
        exception_handlers={HTTPException: _refusal},
        lifespan=service.lifespan,
    )
    app.state.reload = service.reload_soon
    return app


def open_app(folder: Path | str, options: ServeOptions) -> Starlette:
    """The app of a variant folder, see `hasten.served.load`; raises what `hasten.processes.serve` does."""
    spans = Spans() if options.traces else None
    return create_app(load(folder, options), options, partial(load, folder, options), spans)


def _name_of(call: Call) -> str:
    return call.header(REQUEST_ID) or f"{getrandbits(64):016x}"


def _json(content: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _refusal(_request: Request, error: Any) -> Response:
    return Response(_error_body(error), error.status_code, error.headers, media_type="application/json")


def _error_body(error: HTTPException) -> bytes:
    kind = error.kind if isinstance(error, RequestError) else "validation"
    return msgspec.json.encode({"error": error.detail, "error_type": kind})
