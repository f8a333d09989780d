"""The same route in each framework: JSON in, a thread asked for nothing in place of an inference, JSON out.

Runs in the frameworks' own environment.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi import Request as FastRequest
from fastapi import Response as FastResponse
from litestar import Litestar, post
from litestar import Request as StarRequest
from litestar import Response as StarResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POOL = ThreadPoolExecutor(1)
ANSWER = [{"label": "positive", "score": 0.75}, {"label": "negative", "score": 0.25}]
HEADERS = [(b"content-type", b"application/json")]


async def answer(body: bytes) -> bytes:
    """What every route does."""
    msgspec.json.decode(body)
    await asyncio.get_running_loop().run_in_executor(POOL, len, body)
    return msgspec.json.encode(ANSWER)


async def bare(_scope: dict[str, Any], receive: Any, send: Any) -> None:
    """No framework."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    content = await answer(body)
    headers = [*HEADERS, (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def by_starlette(request: Request) -> Response:
    """Starlette's."""
    return Response(await answer(await request.body()), media_type="application/json")


async def by_fastapi(request: FastRequest) -> FastResponse:
    """FastAPI's, without its validation."""
    return FastResponse(await answer(await request.body()), media_type="application/json")


@post("/predict", status_code=200)
async def by_litestar(request: StarRequest) -> StarResponse:
    """Litestar's, without its validation."""
    return StarResponse(await answer(await request.body()), media_type="application/json")


starlette = Starlette(routes=[Route("/predict", by_starlette, methods=["POST"])])
fastapi = FastAPI()
fastapi.add_api_route("/predict", by_fastapi, methods=["POST"])
litestar = Litestar([by_litestar], openapi_config=None)
