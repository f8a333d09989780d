"""The models without layers: they answer as what they were made from, alone and in company, and are served like any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import LABELS, labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, DataError
from hasten.golden import replay_golden
from hasten.ngram_model import NgramOptions, fit_ngrams
from hasten.onnx_export import export
from hasten.runtime import open_runtime, predict_logits, softmax
from hasten.static_student import StaticOptions, train_static
from hasten.teaching import DistillOptions, Lesson
from hasten.tokenization import TextEncoder
from hasten.torch_training import TrainOptions
from hasten.variant import Variant, open_variant
from hasten.workload import Workload


def workload(rows: int, seed: int, name: str = "train") -> Workload:
    found = labelled_rows(rows, seed)
    return Workload(
        name=name, source="memory", texts=tuple(t for t, _ in found), labels=tuple(LABELS.index(x) for _, x in found)
    )


DATA, VALID = workload(120, 1), workload(40, 2, "valid")


@pytest.fixture(scope="module")
def teacher(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(checkpoint("bert")), tmp_path_factory.mktemp("bert") / "torch-fp32")


@pytest.fixture(scope="module")
def tfidf(teacher: Variant, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return fit_ngrams(teacher, tmp_path_factory.mktemp("tfidf") / "tfidf", data=DATA, valid=VALID)


@pytest.fixture(scope="module")
def static(teacher: Variant, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    place = tmp_path_factory.mktemp("static")
    options = StaticOptions(width=16, hidden=16, train=TrainOptions(epochs=30, batch=16, learning_rate=1e-2))
    lesson = Lesson(data=DATA, teacher=None)
    return train_static(teacher, place / "static", options, lesson=lesson, distillation=DistillOptions(soft_weight=0),
                        work=place / "work")  # fmt: skip


@pytest.mark.parametrize("name", ["tfidf", "static"])
def test_they_are_variants_that_learned_something(name: str, request: pytest.FixtureRequest) -> None:
    variant: Variant = request.getfixturevalue(name)
    assert open_variant(variant.path).manifest == variant.manifest
    assert (variant.manifest.format, variant.manifest.precision) == ("onnx", "fp32")
    assert variant.manifest.batch_invariant
    assert replay_golden(variant) < 1e-6
    answers = predict_logits(open_runtime(variant), VALID.texts).argmax(-1)
    assert (answers == np.asarray(VALID.labels)).mean() > 0.8
    assert predict_logits(open_runtime(variant), [""]).shape == (1, 3)


def test_the_graph_gives_scikit_learns_probabilities(teacher: Variant, tfidf: Variant) -> None:
    """Fitted once more by hand, on token ids written as words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    encode = TextEncoder(teacher)

    def written(texts: tuple[str, ...]) -> list[str]:
        return [" ".join(f"t{token}" for token in e.ids[1:-1]) for e in encode(texts)]

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    inputs = vectorizer.fit_transform(written(DATA.texts))
    strength = tfidf.manifest.step.facts["strength"]
    model = LogisticRegression(C=strength, max_iter=2000).fit(inputs, DATA.labels)
    expected = model.predict_proba(vectorizer.transform(written(VALID.texts)))
    found = softmax(predict_logits(open_runtime(tfidf), VALID.texts, batch=8))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert tfidf.manifest.step.facts["terms"] == len(vectorizer.vocabulary_)


@pytest.mark.parametrize("kept", [(0, 2), (1, 2)])
def test_a_label_without_training_texts_is_never_answered(
    teacher: Variant, tmp_path: Path, kept: tuple[int, ...]
) -> None:
    rows = [row for row, label in enumerate(DATA.labels) if label in kept]
    made = fit_ngrams(teacher, tmp_path / "tfidf", NgramOptions(strengths=(4.0,)), data=DATA.take(rows), valid=VALID)
    answers = predict_logits(open_runtime(made), [*VALID.texts, ""]).argmax(-1)
    assert set(answers.tolist()) <= set(kept)


def test_texts_of_unknown_tokens_are_refused(teacher: Variant, tmp_path: Path) -> None:
    unknown = Workload(name="train", source="memory", texts=("東京", "☃ ☃", "ᚠ"), labels=(0, 1, 2))
    with pytest.raises(DataError, match="knows no token"):
        fit_ngrams(teacher, tmp_path / "tfidf", data=unknown, valid=VALID)
    assert not (tmp_path / "tfidf").exists()


def test_a_static_student_starts_from_a_torch_variant_only(teacher: Variant, tmp_path: Path) -> None:
    graph = export(teacher, tmp_path / "onnx-fp32")
    with pytest.raises(ArtifactError, match="embeddings come from a torch variant"):
        train_static(graph, tmp_path / "static", lesson=Lesson(data=DATA, teacher=teacher),
                     distillation=DistillOptions(), work=tmp_path / "work")  # fmt: skip


def test_a_static_student_goes_towards_its_teacher(teacher: Variant, tmp_path: Path) -> None:
    options = StaticOptions(width=16, hidden=32, train=TrainOptions(epochs=60, batch=16, learning_rate=1e-2))
    lesson = Lesson(data=DATA, transfer=("a great day",), teacher=teacher)
    made = train_static(teacher, tmp_path / "static", options, lesson=lesson,
                        distillation=DistillOptions(soft_weight=1.0), work=tmp_path / "work")  # fmt: skip
    wanted, found = (softmax(predict_logits(open_runtime(v), DATA.texts)) for v in (teacher, made))
    chance = np.abs(wanted - wanted.mean(0)).mean()
    assert np.abs(found - wanted).mean() < 0.7 * chance
    assert made.manifest.step.facts["transfer_texts"] == 1
