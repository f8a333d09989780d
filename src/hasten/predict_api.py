"""What `/predict` is asked and what it answers: the JSON of Hugging Face Text Embeddings Inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from hasten.asked import Asked, RequestError, Text, checked_texts, described
from hasten.runtime import Logits, softmax

ONE = described(minItems=1, maxItems=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How scores are given.

    Attributes:
        function_to_apply: From logits to scores; `softmax` if None.
        top_k: Most labels of a text, the best first; all if None.
    """

    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The body of a request.

    Attributes:
        inputs: A text or a list of texts, each alone or in a list of one.
        raw_scores: Whether the logits themselves are asked for.
        truncate: Whether texts that are too long are cut; they are if None.
        parameters: How scores are given.
    """

    inputs: Text | Annotated[list[Text | Annotated[list[Text], ONE]], described(minItems=1)]
    raw_scores: bool | None = None
    truncate: bool | None = None
    parameters: Parameters | None = None


def asked_by_question(body: bytes, most: int, labels: Sequence[str], *, nested: bool = False) -> Asked:
    """Reads a request.

    Args:
        body: JSON.
        most: How many texts a request may hold.
        labels: Names of the labels by id.
        nested: Whether even a single text is answered with a list of lists.

    Returns:
        The texts and how to answer.

    Raises:
        RequestError: The body is no JSON (400) or not what is expected (422), or holds no text, an empty one, a pair,
            or too many texts.
    """
    question = _parsed(body)
    rows = [question.inputs] if isinstance(question.inputs, str) else question.inputs
    if any(isinstance(row, list) and len(row) != 1 for row in rows):
        raise RequestError(422, "validation", "a list inside `inputs` must hold one text; pairs are not supported")
    texts = checked_texts([row if isinstance(row, str) else row[0] for row in rows], most)

    def answer(logits: Logits) -> Any:
        named = _named(logits, labels, question)
        return named[0] if isinstance(question.inputs, str) and not nested else named

    return Asked(texts=texts, truncate=question.truncate, answer=answer)


def _parsed(body: bytes) -> Question:
    try:
        return msgspec.json.decode(body, type=Question)
    except msgspec.ValidationError as error:
        raise RequestError(422, "validation", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "validation", f"the body is not JSON: {error}") from error


def _named(logits: Logits, labels: Sequence[str], question: Question) -> list[list[dict[str, Any]]]:
    """Labels with their scores, best first, for each text."""
    parameters = question.parameters or Parameters()
    scores = _scores(logits, "none" if question.raw_scores else parameters.function_to_apply)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : parameters.top_k]
    return [
        [{"label": labels[label], "score": row[label]} for label in order]
        for row, order in zip(scores.tolist(), best.tolist(), strict=True)
    ]


def _scores(logits: Logits, function: str | None) -> Logits:
    if function == "none":
        return logits
    return np.exp(-np.logaddexp(0, -logits)) if function == "sigmoid" else softmax(logits)
