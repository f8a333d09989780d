"""Training with matrix products in bfloat16, where the machine has them in hardware.

Weights and their gradients, the optimizer's moments and the losses stay fp32; only the products of forward and backward
passes are bfloat16. Source: Micikevicius et al. 2018, "Mixed Precision Training", and Kalamkar et
al. 2019, "A Study of BFLOAT16 for Deep Learning Training", by which losses need no scaling. The lists of operations are
PyTorch's (`torch.autocast`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from hasten.measurement import cpu_flags

Precision = Literal["fp32", "bf16"]
BF16_PRODUCTS = frozenset({"avx512_bf16", "amx_bf16"})  # where oneDNN multiplies bfloat16 faster than fp32
PLAIN_ATTENTION_TOKENS = 128


def native_precision(device: str) -> Precision:
    """The number format that training is fastest in.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        `bf16` where the hardware multiplies it, else `fp32`.
    """
    if device == "cuda":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if BF16_PRODUCTS & cpu_flags() else "fp32"


def products_in(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Within the block, products of forward passes are of that format; their backward passes follow.

    Args:
        precision: The number format.
        device: `cpu` or `cuda`.

    Returns:
        A context manager; blocks may be nested, and the inner one holds.
    """
    import torch

    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def step_in(precision: Precision, device: str, tokens: int) -> Generator[None]:
    """Within the block, the forward pass of a training step runs in a number format as fast as this machine lets it.

    The backward pass of PyTorch's fused attention is slow on CPUs in bfloat16: with it, a step over texts of 16 tokens
    takes 1.85 times as long as with two products and a softmax, one over 128 tokens 1.28 times; at 256 tokens their
    square of scores is the dearer (`benchmarks/results/training_attention.json`).

    Args:
        precision: The number format.
        device: `cpu` or `cuda`.
        tokens: Length of the step's padded texts.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = precision == "bf16" and device == "cpu" and tokens <= PLAIN_ATTENTION_TOKENS
    with products_in(precision, device), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield
