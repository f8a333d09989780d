"""Traces, as a collector gets them over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import DIGEST, OPTIONS, client_of

from hasten.runtime import FakeRuntime
from hasten.served import Loaded
from hasten.server import create_app
from hasten.spans import Spans

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Generator[tuple[str, list[Any]]]:
    """A collector on a free port, and the spans that it got, with their service."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in sent.resource_spans:
                service = {pair.key: pair.value.string_value for pair in resource.resource.attributes}["service.name"]
                got.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name that the library has)
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_with_its_stages_in_the_callers_trace(collector: tuple[str, list[Any]]) -> None:
    url, got = collector

    async def script() -> None:
        loaded = Loaded(runtime=FakeRuntime(), name="a", digest=DIGEST, batch_invariant=True, max_tokens=512)
        app = create_app(loaded, OPTIONS, spans=Spans(OTLPSpanExporter(url)))
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "first"}
        async with client_of(app) as client:
            reply = await client.post("/predict", json={"inputs": "a"}, headers=headers)
            assert reply.status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/health")).status_code == 200

    asyncio.run(script())
    assert {service for service, _ in got} == {"hasten"}
    spans = {span.name: span for _, span in got}
    assert sorted(spans) == ["POST /predict", "inference", "queue", "tokenize"]
    request = spans["POST /predict"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    found = {pair.key: pair.value for pair in request.attributes}
    assert found["http.request.header.x-request-id"].array_value.values[0].string_value == "first"
    stages = [spans[name] for name in ("tokenize", "queue", "inference")]
    assert {stage.parent_span_id for stage in stages} == {request.span_id}
    times = [time for stage in stages for time in (stage.start_time_unix_nano, stage.end_time_unix_nano)]
    assert times == sorted(times)
    assert request.start_time_unix_nano <= times[0] + 1_000_000
    assert times[-1] <= request.end_time_unix_nano
