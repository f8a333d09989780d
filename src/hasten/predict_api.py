"""What `/predict` is asked and what it answers: the JSON of Hugging Face Text Embeddings Inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from starlette.exceptions import HTTPException

from hasten.runtime import Logits, softmax


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

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    parameters: Parameters | None = None

    def texts(self, most: int) -> list[str]:
        """The texts, checked.

        Args:
            most: How many a request may hold.

        Returns:
            At least one text, none empty.

        Raises:
            RequestError: There are too many, none, an empty one, or a pair.
        """
        rows = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        if len(rows) > most:
            raise RequestError(413, "validation", f"{len(rows)} texts in one request; send at most {most}")
        if any(isinstance(row, list) and len(row) != 1 for row in rows):
            raise RequestError(422, "validation", "a list inside `inputs` must hold one text; pairs are not supported")
        texts = [row if isinstance(row, str) else row[0] for row in rows]
        if not all(texts) or not texts:
            raise RequestError(422, "empty", "`inputs` holds no text, or an empty one")
        return texts


class RequestError(HTTPException):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, text, headers)
        self.kind = kind


def parse_question(body: bytes) -> Question:
    """Reads the body of a request.

    Args:
        body: JSON.

    Returns:
        The question.

    Raises:
        RequestError: It is no JSON (400), or not what is expected (422).
    """
    try:
        return msgspec.json.decode(body, type=Question)
    except msgspec.ValidationError as error:
        raise RequestError(422, "validation", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "validation", f"the body is not JSON: {error}") from error


def named_scores(logits: Logits, labels: Sequence[str], question: Question) -> list[list[dict[str, Any]]]:
    """Labels with their scores, best first, for each text.

    Args:
        logits: Shape [texts, labels].
        labels: Names of the labels by id.
        question: What was asked.

    Returns:
        For each text, `label` and `score`.

    Raises:
        RuntimeError: A logit is NaN or infinite.
    """
    parameters = question.parameters or Parameters()
    scores = _scores(logits, "none" if question.raw_scores else parameters.function_to_apply)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : parameters.top_k]
    return [
        [{"label": labels[label], "score": float(row[label])} for label in order]
        for row, order in zip(scores, best, strict=True)
    ]


def _scores(logits: Logits, function: str | None) -> Logits:
    if not np.isfinite(logits).all():
        raise RuntimeError("the model answers NaN or infinity")
    if function == "none":
        return logits
    return np.exp(-np.logaddexp(0, -logits)) if function == "sigmoid" else softmax(logits)
