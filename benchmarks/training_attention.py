"""Which attention trains fastest on this CPU, by the length of the texts: PyTorch's fused one, or plain products.

    python benchmarks/training_attention.py MODEL [--rounds 5]

MODEL is a variant folder of a student. A step is a forward and a backward pass over texts of one length, as many as
make up 4,096 tokens, at most 64; the two ways take turns, in fp32 and in bfloat16. Results go to
`results/training_attention.json`: medians, and the ratio of fused to plain.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.mixed_precision import Precision, products_in
from hasten.profiling import ProfileOptions
from hasten.torch_runtime import load_torch_model
from hasten.variant import open_variant
from provenance import save_result

LENGTHS = (16, 32, 64, 128, 256, 512)
STEP_TOKENS, MOST_TEXTS = 4096, 64
WAYS = {"fused": nullcontext, "plain": lambda: sdpa_kernel(SDPBackend.MATH)}


def main(model: Path, rounds: Annotated[int, typer.Option(help="Timed steps of each kind.")] = 5) -> None:
    """Times the steps and saves them."""
    torch.set_num_threads(ProfileOptions().resolved_threads)
    network = load_torch_model(open_variant(model))
    rows = [row(network, precision, tokens, rounds) for precision in get_args(Precision) for tokens in LENGTHS]
    save_result("training_attention", {"shape": f"{network.config.num_hidden_layers}x{network.config.hidden_size}",
                                       "rounds": rounds, "rows": rows})  # fmt: skip


def row(network: Any, precision: Precision, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step, by way."""
    texts = min(MOST_TEXTS, STEP_TOKENS // tokens)
    ids = torch.randint(1000, 20_000, (texts, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):  # one warms up
        for way, block in WAYS.items():
            network.zero_grad()
            began = time.perf_counter()
            with products_in(precision, "cpu"), block():
                value = network(input_ids=ids, attention_mask=mask).logits.float().square().mean()
            value.backward()
            found[way].append(1000 * (time.perf_counter() - began))
    medians = {way: round(statistics.median(times[1:]), 1) for way, times in found.items()}
    ratio = statistics.median(a / b for a, b in zip(found["fused"][1:], found["plain"][1:], strict=True))
    print(precision, tokens, medians, f"{ratio:.2f}", flush=True)
    return {
        "precision": precision, "tokens": tokens, "texts": texts, "step_ms": medians, "fused_to_plain": round(ratio, 2),
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
