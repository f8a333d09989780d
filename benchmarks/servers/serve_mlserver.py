"""MLServer's model: the Open Inference Protocol, with adaptive batching where BATCH is above 1."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from classifier import PORT, Classifier
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

BATCH = int(os.environ["BATCH"])


class Model(MLModel):
    """A tensor of texts in, a tensor of answers out."""

    async def load(self) -> bool:
        """Loads the model in the process that infers."""
        self.classify = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Labels of each text, as JSON."""
        answers = self.classify(StringCodec.decode_input(payload.inputs[0]))
        found = StringCodec.encode_output("answers", [json.dumps(answer) for answer in answers])
        return InferenceResponse(model_name=self.name, outputs=[found])


async def main() -> None:
    """Serves one model in this process."""
    settings = Settings(
        host="127.0.0.1", http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, parallel_workers=0, debug=False
    )
    batching = {} if BATCH == 1 else {"max_batch_size": BATCH, "max_batch_time": 0.002}
    model = ModelSettings(name="classifier", implementation=Model, **batching)
    await MLServer(settings).start([model])


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    asyncio.run(main())
