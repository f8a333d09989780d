"""What the server speaks, as an OpenAPI document, and Swagger UI to read and try it, from the package's own files.

The schemas of requests are made from the types that read them. Source: OpenAPI Specification 3.0.3; not 3.1, which the
packaged Swagger UI does not show, so a type that may be null is written `nullable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from hasten import __version__
from hasten.open_inference import Inference
from hasten.predict_api import Question

POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>hasten: API</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/ui/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="docs/ui/swagger-ui-bundle.js"></script><script src="docs/start.js"></script></body>
</html>
"""
START = "SwaggerUIBundle({url: 'openapi.json', dom_id: '#swagger-ui', validatorUrl: null});\n"

NUMBER: dict[str, Any] = {"type": "number"}
TEXT: dict[str, Any] = {"type": "string"}
COMPONENTS = "#/components/schemas/"
ERRORS = {
    400: "The body is no JSON, or not what the protocol says.",
    408: "The body took too long to come.",
    404: "No such model here.",
    413: "Too many bytes or texts; ask for fewer.",
    422: "A field has a wrong type or value, a text is empty, or it cannot be tokenized.",
    429: "It would be answered too late, or the queue is full; see `Retry-After` (seconds).",
    500: "Inference failed; the server's log tells why.",
    503: "Starting, or closing.",
}
QUESTION = {"inputs": ["A fine film.", "Too long by half."]}
INFERENCE = {
    "inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["A fine film.", "Too long by half."]}]
}
TIMINGS = {"tokenize": "Tokenizing", "queue": "Waiting for an inference", "inference": "Inference"}


def document(name: str, *, deadline: str, request_id: str, artifact: str) -> dict[str, Any]:
    """The document of one server.

    Args:
        name: The variant's name, the one that `/v2/models/NAME` knows.
        deadline: Header of a request's deadline.
        request_id: Header of a request's id.
        artifact: Header of an answer's artifact.

    Returns:
        The JSON.
    """
    time = {**NUMBER, "minimum": 0, "exclusiveMinimum": True, "example": 1000}
    asked = [_header(deadline, "Milliseconds in which the answer must be there.", time),
             _header(request_id, "Sent back.", TEXT)]  # fmt: skip
    told = _told(request_id, artifact)
    named = [{"name": "name", "in": "path", "required": True, "schema": {**TEXT, "example": name}}]
    predict = _classify("Classify texts", ("Question", QUESTION), _predictions(), told, asked)
    infer = _classify("Classify texts, by the Open Inference Protocol", ("Inference", INFERENCE),
                      _ref("InferenceAnswer"), told, [*named, *asked], also=(404,))  # fmt: skip
    return {
        "openapi": "3.0.3",
        "info": {"title": "hasten", "version": __version__, "description": f"Serves the classifier `{name}`."},
        "paths": {
            "/predict": {"post": predict},
            "/": {
                "get": _get("A page for a browser, facts for others", "html", "json"),
                "post": {**predict, "summary": "Classify texts, always answered with a list of lists"},
            },
            "/v2/models/{name}/infer": {"post": infer},
            "/v2/models/{name}": {"get": _get("Inputs and outputs", "json", parameters=named, also=(404,))},
            "/v2/models/{name}/ready": {"get": _get("Readiness", "json", parameters=named, also=(404, 503))},
            "/v2": {"get": _get("Name, version and extensions", "json")},
            "/v2/health/live": {"get": _get("Liveness", "json")},
            "/v2/health/ready": {"get": _get("Readiness", "json", also=(503,))},
            "/health": {"get": _get("Readiness", "json", also=(503,))},
            "/metrics": {"get": _get("Prometheus", "plain")},
        },
        "components": {"schemas": _schemas()},
    }


def routes(current: Callable[[], dict[str, Any]]) -> list[BaseRoute]:
    """Where the document and its page are.

    Args:
        current: Gives the document of what serves at the moment.

    Returns:
        The routes `/openapi.json` and `/docs`.
    """
    from swagger_ui_bundle import swagger_ui_path

    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
    return [
        Route("/openapi.json", lambda _: Response(msgspec.json.encode(current()), media_type="application/json")),
        Route("/docs", lambda _: Response(PAGE, headers=headers, media_type="text/html")),
        Route("/docs/start.js", lambda _: Response(START, media_type="text/javascript")),
        Mount("/docs/ui", StaticFiles(directory=swagger_ui_path)),
    ]


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": COMPONENTS + name}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _predictions() -> dict[str, Any]:
    return {"anyOf": [_list(_ref("Prediction")), _list(_list(_ref("Prediction")))]}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _told(request_id: str, artifact: str) -> dict[str, Any]:
    """The headers of an answer."""
    times = {
        f"x-hasten-{stage}-ms": {"description": f"{what}, in milliseconds.", "schema": NUMBER}
        for stage, what in TIMINGS.items()
    }
    return {
        request_id: {"description": "The request's, or a new one.", "schema": TEXT},
        artifact: {"description": "Digest of the artifact that answered.", "schema": TEXT},
        **times,
    }


def _body(schema: dict[str, Any], example: Any = None) -> dict[str, Any]:
    return {"application/json": {"schema": schema} | ({"example": example} if example else {})}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    content = {"content": _body(_ref("Error"))}
    told = {status: {} if status == 408 else content for status in statuses}  # 408 is the connection's, without a body
    return {str(status): {"description": ERRORS[status], **more} for status, more in told.items()}


def _classify(
    summary: str, asked: tuple[str, Any], answered: dict[str, Any], told: dict[str, Any],
    parameters: list[dict[str, Any]], also: tuple[int, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    right = {"200": {"description": "The answers.", "headers": told, "content": _body(answered)}}
    return {
        "summary": summary,
        "parameters": parameters,
        "requestBody": {"required": True, "content": _body(_ref(asked[0]), asked[1])},
        "responses": right | _errors((400, *also, 408, 413, 422, 429, 500, 503)),
    }


def _get(
    summary: str, *kinds: str, parameters: list[dict[str, Any]] | None = None, also: tuple[int, ...] = ()
) -> dict[str, Any]:
    types = {"json": "application/json", "html": "text/html", "plain": "text/plain"}
    content = {types[kind]: {"schema": {"type": "object"} if kind == "json" else TEXT} for kind in kinds}
    # What is not ready answers with the same facts as what is.
    responses: dict[str, Any] = {"200": {"description": summary, "content": content}} | _errors(also)
    if 503 in also:
        responses["503"] = {"description": "Not ready.", "content": content}
    return {"summary": summary, "parameters": parameters or [], "responses": responses}


def _schemas() -> dict[str, Any]:
    _, asked = msgspec.json.schema_components([Question, Inference], ref_template=COMPONENTS + "{name}")
    tensor = {"name": TEXT, "datatype": TEXT, "shape": _list({"type": "integer"}), "data": _list({})}
    answer = {"id": TEXT, "model_name": TEXT, "model_version": TEXT, "outputs": _list(_object(tensor))}
    return {name: _version_3_0(schema) for name, schema in asked.items()} | {
        "Prediction": _object({"label": TEXT, "score": NUMBER}),
        "InferenceAnswer": _object(answer, optional=("id",)),
        "Error": _object({"error": TEXT, "error_type": TEXT}),
    }


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _version_3_0(schema: Any) -> Any:
    """A JSON schema as OpenAPI 3.0 writes it: no type `null`, no array of anything."""
    if isinstance(schema, list):
        return [_version_3_0(part) for part in schema]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {key: _version_3_0(value) for key, value in schema.items() if value is not None}  # pyright: ignore[reportUnknownVariableType]
    if {"type": "null"} in found.get("anyOf", []):
        (rest,) = [part for part in found.pop("anyOf") if part != {"type": "null"}]
        found |= {"nullable": True} | ({"allOf": [rest]} if "$ref" in rest else rest)
        if "enum" in rest:
            found |= {"type": "string", "enum": [*rest["enum"], None]}
    if found.get("type") == "array":
        found.setdefault("items", {})
    if "description" in found:
        found["description"] = found["description"].partition("\n")[0]
    if found.get("required") == []:
        del found["required"]  # which 3.0 wants to name something
    return found
