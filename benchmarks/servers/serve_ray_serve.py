"""Ray Serve, with `@serve.batch` where BATCH is above 1."""

from __future__ import annotations

import os
from typing import Any

import ray
from classifier import PORT, Classifier
from ray import serve
from starlette.requests import Request

BATCH = int(os.environ["BATCH"])


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5})
class Deployment:
    """One text in, its labels out."""

    def __init__(self) -> None:
        self.classify = Classifier()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
    async def together(self, texts: list[str]) -> list[list[dict[str, Any]]]:
        """Labels of each text."""
        return self.classify(texts)

    async def __call__(self, request: Request) -> list[dict[str, Any]]:
        """Labels of a text."""
        text = (await request.json())["inputs"]
        return (await self.together(text)) if BATCH > 1 else self.classify([text])[0]


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": PORT, "host": "127.0.0.1"}, logging_config={"enable_access_log": False})
    serve.run(Deployment.bind(), route_prefix="/predict", blocking=True)
