"""hasten's own rows, made by the code at hand as `hasten optimize` makes them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import hasten
from hasten.files import file_sha256
from hasten.onnx_export import export
from hasten.openvino_runtime import has_bfloat16
from hasten.openvino_steps import convert_openvino, export_openvino, quantize_openvino
from hasten.pipeline import OptimizeOptions
from hasten.quantization import QuantizeOptions, quantize
from hasten.quantization_search import Choice, Question, choose_quantization
from hasten.variant import Variant
from hasten.workload import Workload
from hasten.workshop import Workshop, make_key
from peers.environments import Row

MAX_LOST_POINTS = next(option.default for option in fields(OptimizeOptions) if option.name == "max_lost_points")
WHAT = {
    "onnx-fp32": "hasten export",
    "onnx-int8": "hasten export, quantize: static, its calibration chosen on validation data",
    "onnx-int8-dynamic": "hasten export, quantize: dynamic",
    "hasten-openvino-fp32": "hasten export --runtime openvino",
    "hasten-openvino-int8": "hasten export --runtime openvino, quantize",
    "hasten-openvino-bf16": "hasten export --runtime openvino, quantize --precision bf16",
    "hasten-openvino-int8-bf16": "hasten export --runtime openvino, quantize, quantize --precision bf16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Makes hasten's rows.

    Attributes:
        source: The classifier.
        texts: Texts to calibrate on, the same as the peers'.
        valid: Labelled texts to choose the calibration by.
        threads: Threads for an inference.
        shop: Where variants are kept and reused.
    """

    source: Variant
    texts: list[str]
    valid: Workload
    threads: int
    shop: Workshop

    def rows(self) -> list[Row]:
        """Five rows, and two more where the CPU multiplies bfloat16."""
        fp32 = self._variant("onnx-fp32", lambda out: export(self.source, out, texts=self.texts))
        key = self._key(fp32.digest, self.texts, self.valid.digest, MAX_LOST_POINTS)
        choice: Choice = self.shop.cached(
            "quantization", key, Choice, lambda: choose_quantization(self._question(fp32), self.shop.work)
        )
        ways = {"onnx-int8": choice.options, "onnx-int8-dynamic": QuantizeOptions(method="dynamic")}
        made = [fp32] + [self._quantized(fp32, name, options) for name, options in ways.items()]
        made += self._for_openvino()
        how = WHAT | {"onnx-int8": f"{WHAT['onnx-int8']}: {choice}"}
        return [
            Row(
                name=variant.name, peer="hasten", how=how[variant.name], folder=variant.path,
                python=Path(sys.executable), versions={"hasten": hasten.__version__} | variant.manifest.step.versions,
            )
            for variant in made
        ]  # fmt: skip

    def _for_openvino(self) -> list[Variant]:
        name = "hasten-openvino"
        fp32 = self._variant(
            f"{name}-fp32", lambda out: export_openvino(self.source, out, name=f"{name}-fp32", texts=self.texts)
        )
        int8 = self._lowered(fp32, f"{name}-int8", quantize_openvino)
        if not has_bfloat16():
            return [fp32, int8]
        both = ((fp32, f"{name}-bf16"), (int8, f"{name}-int8-bf16"))
        return [fp32, int8, *(self._lowered(source, lowered, convert_openvino) for source, lowered in both)]

    def _lowered(self, source: Variant, name: str, step: Callable[..., Variant]) -> Variant:
        return self._variant(name, lambda out: step(source, out, name=name, texts=self.texts), source.digest)

    def _question(self, fp32: Variant) -> Question:
        return Question(
            source=fp32, texts=self.texts, valid=self.valid, options=QuantizeOptions(),
            max_lost_points=MAX_LOST_POINTS, threads=self.threads,
        )  # fmt: skip

    def _quantized(self, fp32: Variant, name: str, options: QuantizeOptions) -> Variant:
        return self._variant(
            name, lambda out: quantize(fp32, out, options, name=name, texts=self.texts), fp32.digest, options
        )

    def _variant(self, name: str, build: Callable[[Path], Variant], *parts: object) -> Variant:
        return self.shop.variant(name, self._key(self.source.digest, self.texts, *parts), build)

    def _key(self, *parts: object) -> str:
        code = sorted(Path(hasten.__file__).parent.glob("*.py"))
        return make_key(*parts, hashlib.sha256("".join(map(file_sha256, code)).encode()).hexdigest())
