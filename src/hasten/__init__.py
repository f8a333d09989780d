"""hasten: a fine-tuned transformer classifier, made to meet a latency budget on a CPU, with the evidence."""

import os

# onnxruntime reports usage over the network unless told otherwise before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
