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
from hasten.openvino_steps import export_openvino, quantize_openvino
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
        """The five rows."""
        fp32 = self._variant("onnx-fp32", lambda out: export(self.source, out, texts=self.texts))
        key = self._key(fp32.digest, self.texts, self.valid.digest, MAX_LOST_POINTS)
        choice: Choice = self.shop.cached(
            "quantization", key, Choice, lambda: choose_quantization(self._question(fp32), self.shop.work)
        )
        ways = {"onnx-int8": choice.options, "onnx-int8-dynamic": QuantizeOptions(method="dynamic")}
        made = [fp32] + [self._quantized(fp32, name, options) for name, options in ways.items()]
        other = self._variant(
            "hasten-openvino-fp32",
            lambda out: export_openvino(self.source, out, name="hasten-openvino-fp32", texts=self.texts),
        )
        made += [other, self._variant(
            "hasten-openvino-int8",
            lambda out: quantize_openvino(other, out, name="hasten-openvino-int8", texts=self.texts), other.digest,
        )]  # fmt: skip
        return [
            Row(
                name=variant.name, peer="hasten", how=WHAT[variant.name], folder=variant.path,
                python=Path(sys.executable), versions={"hasten": hasten.__version__} | variant.manifest.step.versions,
            )
            for variant in made
        ]  # fmt: skip

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
