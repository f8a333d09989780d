"""OpenTelemetry traces of a server: a span for each request to classify, and in it one for each stage.

Where they go, how many are sampled and what the service is called is said by the environment:
`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME` and the other variables of the OpenTelemetry
specification. A request's `traceparent` is continued.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from time import time_ns
from typing import Any

from hasten.errors import MissingExtraError

UNTRACED = r"://[^/]+/(metrics|health|docs|openapi\.json)\b|/(live|ready)$"


class Spans:
    """What records spans and sends them.

    Args:
        exporter: Where spans go; by OTLP over HTTP to where the environment says if None.

    Raises:
        MissingExtraError: The extra `traces` is not installed.
    """

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingExtraError("opentelemetry", "traces") from error
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "hasten"}
        self._provider = TracerProvider(resource=Resource.create(name))
        self._middleware: Any = OpenTelemetryMiddleware
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("hasten")

    def around(self, app: Any) -> Any:
        """The ASGI app with a span around each request."""
        return self._middleware(
            app, excluded_urls=UNTRACED, tracer_provider=self._provider, exclude_spans=["receive", "send"]
        )

    def record(self, stages_s: Mapping[str, float], request_id: str) -> None:
        """Adds what has just ended to the request's span.

        Args:
            stages_s: Seconds of each stage, one after the other, the last of which ends now.
            request_id: The request's id.
        """
        from opentelemetry import trace

        trace.get_current_span().set_attribute("http.request.header.x-request-id", [request_id])
        at_ns = time_ns() - int(1e9 * sum(stages_s.values()))
        for stage, seconds in stages_s.items():
            span = self._tracer.start_span(stage, start_time=at_ns)
            at_ns += int(1e9 * seconds)
            span.end(at_ns)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()
