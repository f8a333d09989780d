"""hasten: a fine-tuned transformer classifier, made to meet a latency budget on a CPU, with the evidence."""

__version__ = "0.1.0"
