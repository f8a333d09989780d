"""A server that does nothing, to measure what asking costs: every request gets the same short answer at once."""

from __future__ import annotations

import socket
import sys
from typing import Any

import uvicorn

HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2")]


async def nothing(_scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that reads the request and answers an empty list."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"[]"})


def main() -> None:
    """Serves on a free port of this machine, which it prints."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        config = uvicorn.Config(nothing, loop="uvloop", http="httptools", ws="none", lifespan="off", log_config=None)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
