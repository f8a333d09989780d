"""The verbs of single steps: each takes a variant folder or a checkpoint, and makes or measures one thing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from hasten.checkpoint import import_checkpoint
from hasten.cli_inputs import labelled, variants_of
from hasten.cli_options import (
    PROFILE,
    QUANTIZE,
    Folder,
    LabelColumn,
    Name,
    Out,
    Samples,
    Seed,
    TextColumn,
    Threads,
    name_of,
    one_of,
)
from hasten.errors import UsageError
from hasten.quantization import Calibration, Method, QuantizeOptions
from hasten.workload import read_texts, some_rows

if TYPE_CHECKING:
    from hasten.variant import Variant

steps = typer.Typer()
MEASURED_TEXTS = 1_000


@steps.command(name="import")
def import_(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a fine-tuned sequence classifier.")], out: Out
) -> None:
    """Copy a Hugging Face classifier into a variant folder."""
    sys.stdout.write(f"{import_checkpoint(model, out).path}\n")


@steps.command()
def profile(
    folders: Annotated[list[str], typer.Argument(help="Variant folders or checkpoints; the first is the baseline.")],
    data: Annotated[str, typer.Option(help="Labelled texts to measure on.")],
    out: Out,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    samples: Samples = PROFILE.samples,
    threads: Threads = PROFILE.threads,
    seed: Seed = PROFILE.seed,
) -> None:
    """Measure variants in one interleaved run; write one JSON file each into OUT/measurements.

    How best to share out the cores is measured too and recorded in each variant's folder, for the server.
    """
    from hasten import profiling, thread_plan
    from hasten.measurement import save_measurement
    from hasten.progress import Bars

    options = replace(PROFILE, samples=samples, threads=threads, seed=seed)
    with variants_of(folders) as variants:
        _check_alike(variants)
        workload = labelled(data, "test", variants[0], text_column, label_column)
        with Bars() as bars:
            bars.stage("measuring, interleaved")
            measured = profiling.profile(variants, workload, options, scenario="test", progress=bars.advance)
            paths = [save_measurement(measurement, out / "measurements") for measurement in measured]
            for variant in (v for v in variants if v.manifest.format != "torch"):
                bars.stage(f"measuring how {variant.name} shares out the cores")
                plan = thread_plan.measure_plan(variant, workload.texts, bars.advance)
                thread_plan.record_plan(variant, plan)
    sys.stdout.writelines(f"{path}\n" for path in paths)


def _check_alike(variants: Sequence[Variant]) -> None:
    """Refuses variants that one set of labelled texts, or one folder of files by name, is not enough for."""
    names = [variant.name for variant in variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two variants are named {min(twice)!r}, and so would be their files; measure one at a time")
    if other := [variant for variant in variants if variant.labels != variants[0].labels]:
        raise UsageError(
            f"{other[0].name} has the labels {', '.join(other[0].labels[:5])}, {variants[0].name} has "
            f"{', '.join(variants[0].labels[:5])}: the same texts cannot judge both"
        )


@steps.command()
def export(
    folder: Annotated[str, typer.Argument(help="A torch variant or a checkpoint.")], out: Out, name: Name = None,
    runtime: Annotated[str, typer.Option(help="What shall run it: 'onnxruntime' or 'openvino'.")] = "onnxruntime",
) -> None:  # fmt: skip
    """Export to a fused graph, proven equal on padded batches."""
    from hasten import onnx_export, openvino_steps

    one_of("--runtime", runtime, ("onnxruntime", "openvino"))
    step = onnx_export.export if runtime == "onnxruntime" else openvino_steps.export_openvino
    name = name_of(out, name)
    with variants_of([folder]) as (source,):
        sys.stdout.write(f"{step(source, out, name=name).path}\n")


@steps.command()
def quantize(
    folder: Folder,
    out: Out,
    data: Annotated[
        str,
        typer.Option(
            help="Texts to calibrate on and to measure the change on; up to 1,000 are drawn, labels are not needed."
        ),
    ],
    text_column: TextColumn = None,
    method: Annotated[
        str, typer.Option(help="Scales of activations: 'static', by calibration, or 'dynamic', by each batch.")
    ] = QUANTIZE.method,
    calibration: Annotated[
        str, typer.Option(help="Ranges that calibration keeps: 'minmax', 'percentile' or 'entropy'.")
    ] = QUANTIZE.calibration,
    per_channel: Annotated[bool, typer.Option(help="One weight scale an output channel.")] = QUANTIZE.per_channel,
    reduce_range: Annotated[
        bool | None, typer.Option(help="7-bit weights; taken on a CPU without VNNI if not given.")
    ] = QUANTIZE.reduce_range,
    embeddings: Annotated[bool, typer.Option(help="Embedding tables in INT8 too.")] = QUANTIZE.embeddings,
    smoothing: Annotated[
        float, typer.Option(help="How much of the activations' outliers moves into the weights, 0 to 1.")
    ] = QUANTIZE.smoothing,
    precision: Annotated[
        str,
        typer.Option(
            help="'int8'; or 'bf16', by which a fp32 or INT8 variant for OpenVINO runs in bfloat16, if the CPU has it."
        ),
    ] = "int8",
    name: Name = None,
) -> None:
    """Quantize a fp32 variant to INT8, an OpenVINO one as NNCF does, whatever the other options; or use bfloat16."""
    from hasten import openvino_steps, quantization

    name, to_bfloat16 = name_of(out, name), one_of("--precision", precision, ("int8", "bf16")) == "bf16"
    options = QuantizeOptions(
        method=one_of("--method", method, get_args(Method)),
        calibration=one_of("--calibration", calibration, get_args(Calibration)),
        per_channel=per_channel, reduce_range=reduce_range, embeddings=embeddings, smoothing=smoothing,
    )  # fmt: skip
    with variants_of([str(folder)]) as (source,):
        if to_bfloat16 and source.manifest.format != "openvino":
            raise UsageError(
                f"--precision bf16 is for OpenVINO variants, and {folder} is a variant for {source.manifest.format}; "
                "make one with hasten export --runtime openvino"
            )
        texts = _sampled(read_texts(data, text_column=text_column))
        if source.manifest.format == "openvino":
            step = openvino_steps.convert_openvino if to_bfloat16 else openvino_steps.quantize_openvino
            made = step(source, out, name=name, texts=texts)
        else:
            made = quantization.quantize(source, out, options, name=name, texts=texts)
    sys.stdout.write(f"{made.path}\n")


def _sampled(texts: Sequence[str]) -> list[str]:
    """Some of the texts, in random order: a file may be sorted, and the first ones are calibrated on."""
    return [texts[row] for row in some_rows(len(texts), MEASURED_TEXTS, seed=0)] if texts else []


@steps.command()
def verify(folder: Folder) -> None:
    """Check every hash of a variant folder and replay the logits recorded when it was made."""
    from hasten.golden import other_machine, replay_golden
    from hasten.variant import open_variant

    variant = open_variant(folder)
    difference = replay_golden(variant)
    sys.stdout.write(f"{variant.name}: {len(variant.manifest.files)} files as written, digest {variant.digest[:16]}, "
                     f"golden logits replayed to within {difference:.2g}\n")  # fmt: skip
    for sentence in other_machine(variant):
        sys.stdout.write(f"{sentence}\n")
