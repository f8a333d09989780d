"""BentoML; with BATCH above 1, its adaptive batching, for which a request holds a list of one text."""

from __future__ import annotations

import os
from typing import Any

import bentoml
from classifier import Classifier

BATCH = int(os.environ["BATCH"])

if BATCH == 1:

    @bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
    class Service:
        """One text in, its labels out."""

        def __init__(self) -> None:
            self.classify = Classifier()

        @bentoml.api(route="/predict")
        def predict(self, inputs: str) -> list[dict[str, Any]]:
            """Labels of a text."""
            return self.classify([inputs])[0]

else:

    @bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
    class Service:
        """A list of one text in, its labels out."""

        def __init__(self) -> None:
            self.classify = Classifier()

        @bentoml.api(route="/predict", batchable=True, max_batch_size=BATCH, max_latency_ms=50)
        def predict(self, inputs: list[str]) -> list[list[dict[str, Any]]]:
            """Labels of each text."""
            return self.classify(inputs)
