"""Rounding in the loop: a model is trained with its products rounded as INT8 will round them, and learns to bear it.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3. We differ in that ranges of activations are taken once, before the training, as calibration would
take them, and stay.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from hasten.torch_training import TrainingSet
from hasten.workload import some_rows

IN_A_LAYER = re.compile(r"\.(layers?|albert_layers)\.\d+\.")
ACTIVATION_STEPS = 255
WEIGHT_STEPS = {7: 64, 8: 127}  # on either side of 0, as onnxruntime has them
CALIBRATION_ROWS = 128
SMALLEST = 1e-8

Range = tuple[float, float]


@contextmanager
def rounded_products(model: Any, data: TrainingSet, *, weight_bits: int) -> Generator[None]:
    """Lets the products of a model's layers round their inputs and weights, within the block.

    Args:
        model: A transformers encoder; its weights stay fp32 and can be trained, the rounding passes gradients on.
        data: The training texts; some of them give the ranges of activations.
        weight_bits: Bits of the weights, 8 or 7; activations have 8.
    """
    products = {name: module for name, module in model.named_modules() if _is_product(name, module)}
    ranges = _ranges(model, products, data)
    steps = WEIGHT_STEPS[weight_bits]
    try:
        for name, product in products.items():
            product.forward = _rounding(product, ranges[name], steps)
        yield
    finally:
        for product in products.values():
            product.__dict__.pop("forward", None)


def _is_product(name: str, module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and IN_A_LAYER.search(f".{name}.") is not None


def _ranges(model: Any, products: dict[str, Any], data: TrainingSet) -> dict[str, Range]:
    """Smallest and largest input of each product, 0 among them."""
    import torch

    found: dict[str, Range] = dict.fromkeys(products, (0.0, SMALLEST))

    def watch(name: str) -> Any:
        def look(_: Any, inputs: Any) -> None:
            low, high = found[name]
            found[name] = (min(low, float(inputs[0].min())), max(high, float(inputs[0].max())))

        return look

    hooks = [product.register_forward_pre_hook(watch(name)) for name, product in products.items()]
    where = next(model.parameters()).device
    with torch.inference_mode():
        for row in some_rows(len(data.encodings), CALIBRATION_ROWS, seed=0):  # alone: padding is no text
            model(**data.inputs([row], where))
    for hook in hooks:
        hook.remove()
    return found


def _rounding(product: Any, limits: Range, steps: int) -> Any:
    """A product's forward function, rounded."""
    import torch

    low, high = limits
    scale = (high - low) / ACTIVATION_STEPS
    zero_point = round(-low / scale)

    def forward(given: Any) -> Any:
        rounded = torch.fake_quantize_per_tensor_affine(given, scale, zero_point, 0, ACTIVATION_STEPS)
        return torch.nn.functional.linear(rounded, round_weights(product.weight, steps), product.bias)

    return forward


def round_weights(weight: Any, steps: int) -> Any:
    """A matrix rounded with one scale an output channel.

    Args:
        weight: Tensor of shape [outputs, inputs].
        steps: Integers on either side of 0.

    Returns:
        The rounded matrix; gradients pass to `weight`.
    """
    import torch

    scales = weight.detach().abs().amax(dim=1).clamp_min(SMALLEST) / steps
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -steps, steps)
