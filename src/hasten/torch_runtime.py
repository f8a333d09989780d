"""The baseline as it would be served today: eager PyTorch, fp32, `inference_mode`. Needs the extra `optimize`."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from hasten.errors import ArtifactError, MissingExtraError
from hasten.tokenization import MODEL_INPUTS, Encoding, TextEncoder, pad_token_id, padded
from hasten.variant import Parameters, Variant


def load_torch_model(variant: Variant, *, attention: str | None = None) -> Any:
    """The variant as a transformers model in fp32, in evaluation mode, from safetensors and without remote code.

    Args:
        variant: A torch variant.
        attention: transformers' `attn_implementation`; None leaves its default.

    Returns:
        The `PreTrainedModel`.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        ArtifactError: transformers cannot load it.
    """
    try:
        import torch
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise MissingExtraError("torch with transformers", "optimize") from error
    quiet_transformers()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            variant.path,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation=attention,
        )
    except Exception as error:  # transformers raises many kinds
        raise ArtifactError(f"{variant.path}: transformers cannot load it: {error}") from error
    return model.eval()


class TorchRuntime:
    """A variant's `model.safetensors` in eager PyTorch."""

    compiles_shapes = False

    def __init__(self, variant: Variant, *, threads: int) -> None:
        self.model = load_torch_model(variant)
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._accepts = model_inputs(self.model)
        self._encode = TextEncoder(variant)
        self._pad_id = pad_token_id(variant)
        self.labels = variant.labels

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenizes texts; see `hasten.runtime.Runtime.encode`."""
        return self._encode(texts)

    def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:
        """Tokenizes plain texts; see `hasten.runtime.Runtime.encode_plain`."""
        return self._encode.plain(texts)

    def infer(self, encodings: Sequence[Encoding]) -> Any:
        """Runs one padded batch; see `hasten.runtime.Runtime.infer`."""
        batch = padded(encodings, self._pad_id)
        with self._torch.inference_mode():
            inputs = {k: self._torch.from_numpy(v) for k, v in batch.items() if k in self._accepts}
            return self.model(**inputs).logits.numpy()


def model_inputs(model: Any) -> tuple[str, ...]:
    """Which of `MODEL_INPUTS` a transformers model takes."""
    parameters = signature(model.forward).parameters
    return tuple(name for name in MODEL_INPUTS if name in parameters)


def quiet_transformers() -> None:
    """Keeps transformers' progress bars and reports off the terminal; its errors still come as exceptions."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def count_parameters(model: Any) -> Parameters:
    """Counts a transformers classifier's weights by part of the model."""
    counts = {"embedding": 0, "encoder": 0, "head": 0}
    base: str = model.base_model_prefix
    for name, weight in model.named_parameters():
        part = "head" if not name.startswith(f"{base}.") or ".pooler." in name else "encoder"
        part = "embedding" if name.startswith(f"{base}.embeddings.") else part
        counts[part] += weight.numel()
    return Parameters(**counts)
