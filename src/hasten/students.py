"""Students: smaller models of the teacher's own architecture, their shapes and their first weights.

A student keeps the teacher's tokenizer, head size and kind of layers; it has fewer layers, narrower ones, or both. Its
weights start from the teacher's: evenly spaced layers or those named, the attention heads and feed-forward neurons with
the largest norms, and the residual stream projected onto the principal directions of the token embeddings, by one map
for the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hasten.errors import ArtifactError, UsageError
from hasten.golden import finish
from hasten.measurement import library_versions
from hasten.torch_runtime import count_parameters, load_torch_model
from hasten.variant import StepRecord, Variant, building, copy_configuration

CATALOGUE = (
    (1, 128),
    (2, 128),
    (2, 192),
    (3, 192),
    (2, 256),
    (3, 256),
    (2, 384),
    (3, 384),
    (4, 384),
    (6, 384),
    (6, 768),
)
WIDENING = re.compile(r"(embeddings_project|embed_proj|embedding_hidden_mapping_in)\.weight$")
LAYER = re.compile(r"^(.*\.layers?\.)(\d+)(\..*)$")
HEADS_OUT = re.compile(
    r"(query|key|value|query_proj|key_proj|value_proj|q_lin|k_lin|v_lin|attn\.[qkv])\.(weight|bias)$"
)
HEADS_IN = re.compile(r"(attention\.output\.dense|attention\.dense|out_lin|attn\.o|attn\.Wo)\.weight$")
HEADS_OUT_FUSED = re.compile(r"attn\.Wqkv\.(weight|bias)$")  # queries, keys and values, one under the other
VALUES = re.compile(r"(value|value_proj|v_lin|attn\.v)\.weight$")
VERSIONED = ("torch", "transformers")
Start = Literal["teacher", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of an encoder.

    Attributes:
        layers: Number of transformer layers, at least 1.
        hidden: Width of the residual stream; a multiple of the head size.
        heads: Attention heads.
        intermediate: Neurons of each feed-forward block.
        variation: `f` and the neurons, where they are not in the teacher's ratio to the width; else empty.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    variation: str = ""

    def __str__(self) -> str:
        """Layers x hidden, such as `3x384` or `3x384f768`."""
        return f"{self.layers}x{self.hidden}{self.variation}"

    def holds(self, other: Shape) -> bool:
        """Whether it is at least as deep, as wide and as high in its feed-forward blocks, so no faster."""
        pairs = ((self.layers, other.layers), (self.hidden, other.hidden), (self.intermediate, other.intermediate))
        return all(own >= its for own, its in pairs)

    @property
    def encoder_weights(self) -> int:
        """Approximate number of weights in the layers, which is what a request pays for."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)


def teacher_shape(config: Any) -> Shape:
    """The shape of a transformers configuration."""
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate=getattr(config, _intermediate(config)),
    )


def shape_of(variant: Variant) -> Shape:
    """The shape of a variant, from its `config.json`."""
    from transformers import AutoConfig

    return teacher_shape(AutoConfig.from_pretrained(variant.path, local_files_only=True, trust_remote_code=False))


def _intermediate(config: Any) -> str:
    return "intermediate_size" if hasattr(config, "intermediate_size") else "hidden_dim"


def student_shape(teacher: Shape, layers: int, hidden: int, intermediate: int | None = None) -> Shape:
    """A shape with the teacher's head size.

    Args:
        teacher: The teacher's shape.
        layers: Number of layers.
        hidden: Width.
        intermediate: Neurons of each feed-forward block; None keeps the teacher's ratio to the width.

    Returns:
        The shape.

    Raises:
        UsageError: It is larger than the teacher, or the width is no multiple of the head size.
    """
    head_size = teacher.hidden // teacher.heads
    if not (1 <= layers <= teacher.layers and 1 <= hidden <= teacher.hidden):
        raise UsageError(f"a student of {layers}x{hidden} does not fit into its teacher of {teacher}")
    if hidden % head_size:
        raise UsageError(f"a student's width must be a multiple of the teacher's head size {head_size}, not {hidden}")
    usual = round(hidden * teacher.intermediate / teacher.hidden)
    neurons = intermediate or usual
    if neurons > teacher.intermediate:
        raise UsageError(f"{neurons} feed-forward neurons do not fit into the teacher's {teacher.intermediate}")
    return Shape(
        layers=layers, hidden=hidden, heads=hidden // head_size, intermediate=neurons,
        variation="" if neurons == usual else f"f{neurons}",
    )  # fmt: skip


def parse_shapes(text: str, teacher: Shape) -> list[Shape]:
    """Shapes from a list such as `2x128,3x384,3x384f768`: layers x width, and feed-forward neurons after an `f`.

    Args:
        text: The list.
        teacher: The teacher's shape.

    Returns:
        The shapes, from the smallest to the largest.

    Raises:
        UsageError: A part is not of the form LAYERSxHIDDEN or LAYERSxHIDDENfNEURONS, or does not fit the teacher.
    """
    parts = [re.fullmatch(r"(\d+)x(\d+)(?:f([1-9]\d*))?", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"student shapes are written as LAYERSxHIDDEN, such as 2x128,3x384, not {text!r}")
    shapes = [student_shape(teacher, int(p[1]), int(p[2]), int(p[3]) if p[3] else None) for p in parts if p]
    return sorted(shapes, key=lambda shape: shape.encoder_weights)


def candidate_shapes(teacher: Shape) -> list[Shape]:
    """Shapes worth measuring, from the smallest to the largest.

    Args:
        teacher: The teacher's shape.

    Returns:
        Those of the catalogue that the teacher can start, or, for an unusual teacher, halves and quarters of it; none
        where even these are no smaller or split a head.
    """
    head_size = teacher.hidden // teacher.heads
    halves = [(max(1, teacher.layers // part), teacher.hidden // part) for part in (4, 2)]
    for pairs in (CATALOGUE, halves):
        fitting = [
            student_shape(teacher, layers, hidden) for layers, hidden in pairs
            if layers <= teacher.layers and hidden <= teacher.hidden and hidden % head_size == 0
        ]  # fmt: skip
        if smaller := [shape for shape in fitting if shape.encoder_weights < teacher.encoder_weights]:
            return sorted(smaller, key=lambda shape: shape.encoder_weights)
    return []


def init_student(
    teacher: Variant,
    shape: Shape,
    out: Path,
    *,
    name: str,
    start: Start = "teacher",
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Variant:
    """Makes an untrained student of a shape.

    Args:
        teacher: A torch variant.
        shape: The student's shape.
        out: The folder to make.
        name: The new variant's name.
        start: Whether the first weights come from the teacher or are random.
        layers: Which of the teacher's layers (from 0) to start from, one for each of the student's; None takes evenly
            spaced ones.
        seed: Seed of the weights that are drawn.

    Returns:
        The student as a torch variant.

    Raises:
        ArtifactError: The teacher is no torch variant, or its weights do not map onto the shape.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    if teacher.manifest.format != "torch":
        raise ArtifactError(
            f"{teacher.path}: format is {teacher.manifest.format}; a student starts from a torch variant"
        )
    torch.set_num_threads(1)  # whatever ran before, or did not since it was on disk
    parent = load_torch_model(teacher)
    chosen = spaced_layers(parent.config.num_hidden_layers, shape.layers) if layers is None else list(layers)
    torch.manual_seed(seed)
    student = AutoModelForSequenceClassification.from_config(student_config(parent.config, shape, chosen)).eval()
    if start == "teacher":
        _inherit(parent, student, teacher_shape(parent.config), shape, chosen)
    with building(out) as draft:
        copy_configuration(teacher, draft)
        student.save_pretrained(draft)
        step = StepRecord(
            name="init", parent=teacher.digest, versions=library_versions(VERSIONED),
            options={"shape": asdict(shape), "start": start, "layers": chosen, "seed": seed},
        )  # fmt: skip
        manifest = replace(teacher.manifest, name=name, parameters=count_parameters(student), step=step)
        sealed = finish(draft, manifest)
    return Variant(path=out.resolve(), manifest=sealed)


def student_config(config: Any, shape: Shape, layers: Sequence[int]) -> Any:
    """A copy of a transformers configuration with another shape, made of some of its layers."""
    changed = config.__class__.from_dict(config.to_dict())
    if getattr(config, "embedding_size", None) == config.hidden_size:
        changed.embedding_size = shape.hidden
    if types := getattr(config, "layer_types", None):  # windows and rotations go by layer
        changed.layer_types = [types[layer] for layer in layers]
    changed.num_hidden_layers = shape.layers
    changed.hidden_size = shape.hidden
    changed.num_attention_heads = shape.heads
    setattr(changed, _intermediate(config), shape.intermediate)
    if getattr(config, "pooler_hidden_size", None) == config.hidden_size:
        changed.pooler_hidden_size = shape.hidden
    return changed


def spaced_layers(teacher: int, student: int) -> list[int]:
    """Which of the teacher's layers (from 0) a student starts from: evenly spaced, the last one included."""
    return [round((i + 1) * teacher / student) - 1 for i in range(student)]


def stand_for(teacher: Variant, student: Variant) -> tuple[int, ...]:
    """Which of the teacher's layers (from 0) each of the student's stands for; none where the student is deeper."""
    begun = student.manifest.step
    if begun.name == "init" and begun.parent == teacher.digest:
        return tuple(begun.options["layers"])
    theirs, ours = shape_of(teacher).layers, shape_of(student).layers
    return tuple(spaced_layers(theirs, ours)) if ours <= theirs else ()


def _inherit(parent: Any, student: Any, old: Shape, new: Shape, layers: Sequence[int]) -> None:
    """Copies, selects or projects every weight of the student from its counterpart in the teacher."""
    weights = parent.state_dict()
    maps = _Maps(weights, parent.get_input_embeddings().weight.detach(), old, new)
    inherited: dict[str, Any] = {}
    for name, own in student.state_dict().items():
        source = LAYER.sub(lambda m: f"{m[1]}{layers[int(m[2])]}{m[3]}", name)
        inherited[name] = maps.fit(source, weights[source], own)
    student.load_state_dict(inherited)


class _Maps:
    """How each axis of a teacher's weight becomes an axis of the student's."""

    def __init__(self, weights: dict[str, Any], embeddings: Any, old: Shape, new: Shape) -> None:
        import torch

        self._weights, self._old, self._new = weights, old, new
        self._torch = torch
        self._head_rows = self._select_heads()
        self._project = None if old.hidden == new.hidden else self._directions(embeddings.float())

    def _directions(self, embeddings: Any) -> Any | None:
        """Where the residual stream lies, as its embeddings tell; shape [old hidden, new hidden]."""
        narrow, decompose = embeddings.shape[1], self._torch.linalg.svd
        if narrow != self._old.hidden:
            found = [weight for name, weight in self._weights.items() if WIDENING.search(name)]
            if not found:
                return None
            if narrow == self._new.hidden:  # the student's embeddings may go into the stream as they are
                left, _, right = decompose(found[0].float(), full_matrices=False)
                return left @ right
            embeddings = embeddings @ found[0].float().T
        return decompose(embeddings, full_matrices=False)[2][: self._new.hidden].T.contiguous()

    def fit(self, name: str, weight: Any, own: Any) -> Any:
        """The teacher's weight in the student's shape; normalisation of a narrower stream starts anew."""
        if weight.shape == own.shape:
            return weight.clone()
        if weight.dim() == 1 and "norm" in name.lower():
            return own.clone()
        for axis in range(weight.dim()):
            if weight.shape[axis] != own.shape[axis]:
                weight = self._axis(name, weight, axis, own.shape[axis])
        return weight.contiguous()

    def _axis(self, name: str, weight: Any, axis: int, size: int) -> Any:
        old = weight.shape[axis]
        if old == self._old.heads and size == self._new.heads:
            return weight.index_select(axis, self._heads)
        if axis == 0 and HEADS_OUT_FUSED.search(name):
            return weight.index_select(0, self._stacked(self._head_rows, self._old.hidden, 3))
        if (axis == 0 and HEADS_OUT.search(name)) or (axis == 1 and HEADS_IN.search(name)):
            return weight.index_select(axis, self._head_rows)
        if old == self._old.intermediate and size == self._new.intermediate:
            return weight.index_select(axis, self._neurons(name))
        if axis == 0 and old == 2 * self._old.intermediate and size == 2 * self._new.intermediate:  # gated
            return weight.index_select(0, self._stacked(self._neurons(name), self._old.intermediate, 2))
        if old == self._old.hidden and size == self._new.hidden:
            return self._projected(weight, axis)
        raise ArtifactError(
            f"no map from {name} of axis {axis} ({old}) to {size}; hasten cannot narrow this architecture"
        )

    def _stacked(self, rows: Any, height: int, parts: int) -> Any:
        """The same rows of several matrices that lie one under the other."""
        return self._torch.cat([rows + part * height for part in range(parts)])

    def _projected(self, weight: Any, axis: int) -> Any:
        if self._project is None:  # embeddings that nothing known widens say nothing of the stream's directions
            return weight.narrow(axis, 0, self._new.hidden)
        return (weight.movedim(axis, -1) @ self._project).movedim(-1, axis)

    def _select_heads(self) -> Any:
        """Rows of the heads with the largest sum of norms of value and output weights over all layers."""
        old, size = self._old, self._old.hidden // self._old.heads
        score = self._torch.zeros(old.heads)
        for name, weight in self._weights.items():
            if HEADS_OUT_FUSED.search(name) and weight.dim() == 2:
                score += weight[2 * old.hidden :].reshape(old.heads, size, -1).norm(dim=(1, 2))
            elif VALUES.search(name):
                score += weight.reshape(old.heads, size, -1).norm(dim=(1, 2))
            elif HEADS_IN.search(name):
                score += weight.reshape(-1, old.heads, size).norm(dim=(0, 2))
        self._heads = score.argsort(descending=True, stable=True)[: self._new.heads].sort().values
        return (self._heads[:, None] * size + self._torch.arange(size)).reshape(-1)

    def _neurons(self, name: str) -> Any:
        """The feed-forward neurons of the weight's own layer with the largest product of norms."""
        match = LAYER.match(name)
        prefix = f"{match[1]}{match[2]}." if match else ""
        score = self._torch.ones(self._old.intermediate)
        for other, weight in self._weights.items():
            if not other.startswith(prefix) or weight.dim() != 2 or HEADS_OUT_FUSED.search(other):
                continue
            if self._old.intermediate in weight.shape:
                score *= weight.norm(dim=1 - list(weight.shape).index(self._old.intermediate))
            elif weight.shape[0] == 2 * self._old.intermediate:
                score *= weight.reshape(2, self._old.intermediate, -1).norm(dim=(0, 2))
        return score.argsort(descending=True, stable=True)[: self._new.intermediate].sort().values


def largest_fitting(shapes: Sequence[tuple[Shape, bool]]) -> Shape | None:
    """The largest shape that fits; None where none does."""
    fitting = [shape for shape, fits in shapes if fits]
    return max(fitting, key=lambda shape: shape.encoder_weights, default=None)
