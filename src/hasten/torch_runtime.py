"""The baseline as it would be served today: eager PyTorch, fp32, `inference_mode`. Needs the extra `optimize`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.errors import ArtifactError, MissingExtraError
from hasten.tokenization import Encoding, TextEncoder, pad_token_id, padded
from hasten.variant import Variant


def load_torch_model(variant: Variant) -> Any:
    """The variant as a transformers model in fp32, in evaluation mode, from safetensors and without remote code.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        ArtifactError: transformers cannot load it.
    """
    try:
        import torch
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise MissingExtraError("torch with transformers", "optimize") from error
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            variant.path, trust_remote_code=False, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # transformers raises many kinds
        raise ArtifactError(f"{variant.path}: transformers cannot load it: {error}") from error
    return model.eval()


class TorchRuntime:
    """A variant's `model.safetensors` in eager PyTorch."""

    def __init__(self, variant: Variant, *, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self.model = load_torch_model(variant)
        self._accepts = set(self.model.forward.__code__.co_varnames)
        self._encode = TextEncoder(variant)
        self._pad_id = pad_token_id(variant)
        self.labels = variant.labels

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes texts; see `hasten.runtime.Runtime.encode`."""
        return self._encode(texts)

    def infer(self, encodings: Sequence[Encoding]) -> Any:
        """Runs one padded batch; see `hasten.runtime.Runtime.infer`."""
        batch = padded(encodings, self._pad_id)
        with self._torch.inference_mode():
            inputs = {k: self._torch.from_numpy(v) for k, v in batch.items() if k in self._accepts}
            return self.model(**inputs).logits.numpy()
