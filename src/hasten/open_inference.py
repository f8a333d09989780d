"""The Open Inference Protocol, version 2, as Triton and KServe speak it: one input `text`, three outputs.

```
text     BYTES  [n] or [n, 1]   UTF-8
label    BYTES  [n]             the best label
score    FP32   [n]             its probability
scores   FP32   [n, labels]     the probability of each label, in the order of the model's metadata
```

Source: KServe, "Open Inference Protocol (V2)", REST, and Triton's "Binary Tensor Data Extension" for the input, which
its own clients send unless told otherwise. Answers are JSON, which those clients read as well.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import msgspec

from hasten.asked import Asked, RequestError, checked_texts, described
from hasten.runtime import Logits, softmax

INPUT, BYTES = "text", "BYTES"
JSON_LENGTH = "inference-header-content-length"
BINARY_SIZE = "binary_data_size"
MOST_DIGITS = 12  # of a number of bytes
OUTPUTS = ("label", "score", "scores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input.

    Attributes:
        name: Its name.
        shape: Its shape.
        datatype: Its type, as the protocol names them.
        data: Its elements, flat or nested by rows; None where they are binary.
        parameters: `binary_data_size`, where they are.
    """

    name: Annotated[str, described(enum=[INPUT])]
    shape: Annotated[list[int], described(minItems=1, maxItems=2)]
    datatype: Annotated[str, described(enum=[BYTES])]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An output that is asked for.

    Attributes:
        name: Its name.
        parameters: Ignored.
    """

    name: Annotated[str, described(enum=OUTPUTS)]
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """The JSON of a request.

    Attributes:
        inputs: One, called `text`.
        outputs: Which outputs to send; all if None.
        id: Sent back.
        parameters: Ignored.
    """

    inputs: Annotated[list[Tensor], described(minItems=1, maxItems=1)]
    outputs: list[Output] | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


def asked_by_inference(
    body: bytes, json_length: str | None, most: int, labels: Sequence[str], identity: dict[str, str]
) -> Asked:
    """Reads a request.

    Args:
        body: JSON, and the binary tensors after it.
        json_length: Bytes of the JSON, as the request's header has it; None if there is nothing else.
        most: How many texts a request may hold.
        labels: Names of the labels by id.
        identity: `name` and `digest` of the variant.

    Returns:
        The texts and how to answer.

    Raises:
        RequestError: The body is not what the protocol says (400), or holds no text, an empty one, or too many.
    """
    head, tail = _parts(body, json_length)
    try:
        inference = msgspec.json.decode(head, type=Inference)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong(f"the body is not an inference request: {error}") from error
    if len(inference.inputs) != 1 or inference.inputs[0].name != INPUT or inference.inputs[0].datatype != BYTES:
        raise _wrong(f"one input is expected, {INPUT!r} of {BYTES}")
    wanted = OUTPUTS if inference.outputs is None else tuple(output.name for output in inference.outputs)
    if unknown := [name for name in wanted if name not in OUTPUTS]:
        raise _wrong(f"unknown output {unknown[0]!r}; there are {', '.join(OUTPUTS)}")
    if len(set(wanted)) < len(wanted):
        raise _wrong("an output is asked for twice")
    texts = checked_texts(_texts(inference.inputs[0], tail), most)
    answer = partial(_answer, labels=labels, wanted=wanted, identity=identity, number=inference.id)
    return Asked(texts=texts, truncate=None, answer=answer)


def model_metadata(labels: Sequence[str], identity: dict[str, str]) -> dict[str, Any]:
    """What the protocol tells of a model.

    Args:
        labels: Names of the labels by id.
        identity: `name` and `digest` of the variant.

    Returns:
        The JSON.
    """
    shapes = {"label": [-1], "score": [-1], "scores": [-1, len(labels)]}
    return {
        "name": identity["name"],
        "versions": [identity["digest"]],
        "platform": "hasten",
        "inputs": [{"name": INPUT, "datatype": BYTES, "shape": [-1]}],
        "outputs": [{"name": name, "datatype": _type(name), "shape": shapes[name]} for name in OUTPUTS],
        "parameters": {"labels": list(labels)},
    }


def _wrong(text: str) -> RequestError:
    return RequestError(400, "validation", text)


def _type(output: str) -> str:
    return BYTES if output == "label" else "FP32"


def _parts(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not json_length.isdecimal() or len(json_length) > MOST_DIGITS or int(json_length) > len(body):
        raise _wrong(f"{JSON_LENGTH} is {json_length[:20]!r}, the body has {len(body)} bytes")
    return body[: int(json_length)], body[int(json_length) :]


def _texts(tensor: Tensor, tail: bytes) -> list[str]:
    size = (tensor.parameters or {}).get(BINARY_SIZE)
    if size is not None:
        if size != len(tail):
            raise _wrong(f"{BINARY_SIZE} is {size!r}, there are {len(tail)} bytes after the JSON")
        found: list[Any] = _unpacked(tail)
    else:
        found = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in tensor.data or []]
    if not all(isinstance(text, str) for text in found):
        raise _wrong("the elements of `data` must be strings")
    if tensor.shape not in ([len(found)], [len(found), 1]):
        raise _wrong(f"the shape is {tensor.shape}, there are {len(found)} texts")
    return found


def _unpacked(tail: bytes) -> list[str]:
    """Texts, each after its length in bytes: four bytes, the lowest first."""
    texts: list[str] = []
    at = 0
    while at < len(tail):
        try:
            (length,) = struct.unpack_from("<I", tail, at)
            text = tail[at + 4 : at + 4 + length].decode()
        except (struct.error, UnicodeDecodeError) as error:
            raise _wrong(f"the binary texts are broken at byte {at}: {error}") from error
        if at + 4 + length > len(tail):
            raise _wrong(f"the binary text at byte {at} is longer than what was sent")
        texts.append(text)
        at += 4 + length
    return texts


def _answer(
    logits: Logits, *, labels: Sequence[str], wanted: Sequence[str], identity: dict[str, str], number: str | None
) -> dict[str, Any]:
    scores = softmax(logits)
    best = scores.argmax(axis=-1)
    found: dict[str, tuple[list[int], list[Any]]] = {
        "label": ([len(scores)], [labels[label] for label in best]),
        "score": ([len(scores)], scores.max(axis=-1).tolist()),
        "scores": (list(scores.shape), scores.reshape(-1).tolist()),
    }
    outputs = [
        {"name": name, "datatype": _type(name), "shape": found[name][0], "data": found[name][1]} for name in wanted
    ]
    reply = {"model_name": identity["name"], "model_version": identity["digest"], "outputs": outputs}
    return reply if number is None else {"id": number, **reply}
