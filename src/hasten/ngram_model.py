"""The simplest rival: TF-IDF over tokens with logistic regression, as an ONNX variant like any other.

A transformer has to earn its milliseconds against this row, and on easy data it does not. Terms are runs of the
teacher's own tokens (special ones left out), counted by ONNX's operator `TfIdfVectorizer`, so that the folder has
the same tokenizer and the same inputs as every other variant and is served by the same server.

Source: scikit-learn's `TfidfVectorizer` with `sublinear_tf` and `LogisticRegression`; ONNX operators specification,
`TfIdfVectorizer` (mode `TF`; the logarithm, the weights and the norm are applied by operators of their own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hasten.errors import DataError, MissingExtraError, ParityError
from hasten.golden import finish
from hasten.invariance import batch_invariance
from hasten.measurement import library_versions
from hasten.runtime import open_runtime, predict_logits, softmax
from hasten.tokenization import TextEncoder
from hasten.tracing import OPSET
from hasten.variant import Parameters, StepRecord, Variant, building, copy_configuration
from hasten.workload import Workload

ARCHITECTURE = "tf-idf"
COMPARED_TEXTS = 256
TOLERANCE = 1e-4  # of a probability
NEVER = -100.0
VERSIONED = ("scikit-learn", "onnx", "onnxruntime")
Ids = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramOptions:
    """How to fit.

    Attributes:
        longest: Tokens in the longest term, at least 1.
        features: Most terms; the most frequent ones are kept.
        strengths: Inverse strengths of regularisation to try; the one with the best accuracy on validation texts stays.
    """

    longest: int = 2
    features: int = 20_000
    strengths: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)


def fit_ngrams(
    teacher: Variant, out: Path, options: NgramOptions | None = None, *, name: str = "tfidf", data: Workload,
    valid: Workload,
) -> Variant:  # fmt: skip
    """Fits TF-IDF with logistic regression on labelled texts.

    Args:
        teacher: The variant whose tokenizer and labels to take.
        out: The folder to make.
        options: How; the defaults if None.
        name: The new variant's name.
        data: Training texts with labels.
        valid: Labelled texts to choose the regularisation by.

    Returns:
        An ONNX variant in fp32, proven to answer as scikit-learn does.

    Raises:
        DataError: The tokenizer knows no token of any text.
        ParityError: The graph answers otherwise than scikit-learn.
        MissingExtraError: scikit-learn or onnx is not installed.
    """
    options = options or NgramOptions()
    encode = TextEncoder(teacher)
    special = _special_ids(teacher)
    vectorizer, model, share = _fitted(encode, special, data, valid, options)
    with building(out) as draft:
        copy_configuration(teacher, draft)
        graph = _graph(vectorizer, model, len(teacher.labels))
        _write(graph, draft / "model.onnx")
        terms, labels = len(vectorizer.vocabulary_), len(teacher.labels)
        step = StepRecord(
            name="tfidf", parent=teacher.digest, options=asdict(options) | {"strengths": list(options.strengths)},
            versions=library_versions(VERSIONED),
            facts={"terms": terms, "strength": model.C, "valid_accuracy": round(share, 4), "texts": len(data),
                   "data": data.digest},
        )  # fmt: skip
        manifest = replace(
            teacher.manifest, name=name, format="onnx", precision="fp32", architecture=ARCHITECTURE, plan=None,
            parameters=Parameters(embedding=0, encoder=0, head=terms + terms * labels + labels), step=step,
        )  # fmt: skip
        runtime = open_runtime(Variant(path=draft, manifest=manifest))
        texts = data.texts[:COMPARED_TEXTS]
        expected = model.predict_proba(vectorizer.transform([e.ids for e in encode(texts)]))
        found = softmax(predict_logits(runtime, texts, batch=8))[:, model.classes_]
        difference = float(np.abs(expected - found).max())
        if not difference <= TOLERANCE:
            raise ParityError(f"{name}: the graph's probabilities differ by {difference:.2g} from scikit-learn's")
        holds = batch_invariance(runtime, valid.texts[:COMPARED_TEXTS]).holds
        sealed = finish(draft, replace(manifest, batch_invariant=holds))
    return Variant(path=out.resolve(), manifest=sealed)


def _special_ids(variant: Variant) -> frozenset[int]:
    """Ids that the tokenizer adds by itself, and padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(variant.path / "tokenizer.json"))
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def _fitted(
    encode: TextEncoder, special: frozenset[int], data: Workload, valid: Workload, options: NgramOptions
) -> tuple[Any, Any, float]:
    """The vectorizer, the classifier with the best strength, and its share of right answers on validation texts."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "optimize") from error
    analyzer: Any = partial(_terms, longest=options.longest, special=special)
    vectorizer = TfidfVectorizer(analyzer=analyzer, sublinear_tf=True, max_features=options.features)
    train, held = ([e.ids for e in encode(part.texts)] for part in (data, valid))
    try:
        inputs = vectorizer.fit_transform(train)
    except ValueError as error:
        raise DataError(f"{data.source}: the tokenizer knows no token of any text") from error
    asked, wanted = vectorizer.transform(held), np.asarray(valid.labels)
    tried: list[tuple[float, Any]] = []
    for strength in options.strengths:
        model = LogisticRegression(C=strength, max_iter=2000, random_state=0).fit(inputs, data.labels)
        tried.append((float((model.predict(asked) == wanted).mean()), model))
    share, best = max(tried, key=lambda found: found[0])
    return vectorizer, best, share


def _terms(ids: Sequence[int], longest: int, special: frozenset[int]) -> list[tuple[int, ...]]:
    """Every run of tokens that holds none of the special ones."""
    runs = [tuple(ids[at : at + size]) for size in range(1, longest + 1) for at in range(len(ids) - size + 1)]
    return [run for run in runs if special.isdisjoint(run)]


def _layer(model: Any, labels: int) -> tuple[Any, Any]:
    """Weights [terms, labels] and bias [labels]; a label without training texts is never answered."""
    weights, bias = model.coef_.T, model.intercept_
    if len(model.classes_) == 2:  # one score against the other: halves, so that their difference is the score
        weights, bias = np.concatenate([-weights / 2, weights / 2], 1), np.concatenate([-bias / 2, bias / 2])
    every = np.zeros((len(weights), labels), dtype=np.float32), np.full(labels, NEVER, dtype=np.float32)
    every[0][:, model.classes_], every[1][model.classes_] = weights, bias
    return every


def _graph(vectorizer: Any, model: Any, labels: int) -> Any:
    """The graph from token ids to logits."""
    from onnx import TensorProto, helper, numpy_helper

    terms = sorted(vectorizer.vocabulary_, key=lambda term: (len(term), term))
    places = [vectorizer.vocabulary_[term] for term in terms]
    starts = [sum(len(t) for t in terms if len(t) < size) for size in range(1, max(map(len, terms)) + 1)]
    weights, bias = _layer(model, labels)
    constants = {
        "idf": vectorizer.idf_.astype(np.float32), "weights": weights, "bias": bias,
        "one": np.float32(1), "least": np.float32(1e-12), "axis": np.asarray([1], dtype=np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node(
            "TfIdfVectorizer", ["input_ids"], ["counts"], mode="TF", min_gram_length=1,
            max_gram_length=len(starts), max_skip_count=0, ngram_counts=starts, ngram_indexes=places,
            pool_int64s=[token for term in terms for token in term],
        ),
        helper.make_node("Max", ["counts", "one"], ["at_least_one"]),
        helper.make_node("Log", ["at_least_one"], ["logarithm"]),
        helper.make_node("Min", ["counts", "one"], ["present"]),
        helper.make_node("Add", ["logarithm", "present"], ["sublinear"]),
        helper.make_node("Mul", ["sublinear", "idf"], ["weighted"]),
        helper.make_node("ReduceL2", ["weighted", "axis"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "least"], ["safe_norm"]),
        helper.make_node("Div", ["weighted", "safe_norm"], ["unit"]),
        helper.make_node("Gemm", ["unit", "weights", "bias"], ["logits"]),
    ]  # fmt: skip
    return helper.make_graph(
        nodes, "tfidf",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", labels])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )  # fmt: skip


def _write(graph: Any, path: Path) -> None:
    import onnx

    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)
