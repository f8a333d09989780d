"""LitServe; with BATCH above 1, its dynamic batching."""

from __future__ import annotations

import os
from typing import Any

import litserve
from classifier import PORT, Classifier

BATCH = int(os.environ["BATCH"])


class Api(litserve.LitAPI):
    """One text in, its labels out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 (what LitServe passes)
        """Loads the model in the process that infers."""
        self.classify = Classifier()

    def decode_request(self, request: dict[str, str]) -> str:
        """The text."""
        return request["inputs"]

    def predict(self, x: Any) -> Any:
        """Labels of a text, or of each of a batch."""
        return self.classify([x])[0] if BATCH == 1 else self.classify(x)

    def batch(self, inputs: list[str]) -> list[str]:
        """Texts stay a list."""
        return inputs

    def unbatch(self, output: Any) -> Any:
        """An answer for each text."""
        return output

    def encode_response(self, output: Any) -> Any:
        """As it is."""
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=BATCH, batch_timeout=0.0 if BATCH == 1 else 0.002)
    litserve.LitServer(api, accelerator="cpu", timeout=60).run(port=PORT, log_level="error", generate_client_file=False)
