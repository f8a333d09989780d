"""The Open Inference Protocol: Triton's own client against a live server, and bodies that no client sends."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from serving import DIGEST, expected, live, make_app, post, visit

NAME = "onnx-fp32"
INFER = f"/v2/models/{NAME}/infer"


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "b"], **changes}


def named(reply: dict[str, Any]) -> dict[str, Any]:
    return {output["name"]: output for output in reply["outputs"]}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("texts", [["a fine day"], ["a fine day", "ein schöner Tag", "🜂"]])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own dependencies
def test_tritons_client_gets_what_predict_gives(texts: list[str], *, binary: bool) -> None:
    from tritonclient import http as httpclient

    with live(make_app()) as url:
        client = httpclient.InferenceServerClient(url.removeprefix("http://"))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(NAME)
        metadata = client.get_model_metadata(NAME)
        assert (metadata["name"], metadata["versions"]) == (NAME, [DIGEST])
        given = httpclient.InferInput("text", [len(texts)], "BYTES")
        given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_), binary_data=binary)
        reply = client.infer(NAME, [given], request_id="seven")
        assert reply.get_response()["id"] == "seven"
        best = [expected(text)[0] for text in texts]
        assert reply.as_numpy("label").tolist() == [element["label"] for element in best]
        assert reply.as_numpy("score").tolist() == [element["score"] for element in best]
        np.testing.assert_allclose(reply.as_numpy("scores").sum(axis=1), 1, atol=1e-6)
        client.close()


def test_a_row_for_each_text_and_only_the_outputs_that_are_asked_for() -> None:
    body = {"inputs": [tensor(shape=[2, 1], data=[["a"], ["b"]])], "outputs": [{"name": "label"}]}
    reply = post(body, INFER)
    assert reply.status_code == 200
    assert list(named(reply.json())) == ["label"]
    assert named(reply.json())["label"]["shape"] == [2]
    assert reply.headers["x-hasten-artifact"] == DIGEST
    assert post({"inputs": [tensor()]}, f"/v2/models/{NAME}/versions/1/infer").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"inputs": []}, 400, "one input is expected"),
        ({"inputs": [tensor(), tensor()]}, 400, "one input is expected"),
        ({"inputs": [tensor(name="x")]}, 400, "one input is expected"),
        ({"inputs": [tensor(datatype="FP32")]}, 400, "one input is expected"),
        ({"inputs": [tensor(shape=[3])]}, 400, "the shape is [3], there are 2 texts"),
        ({"inputs": [tensor(data=[1, 2])]}, 400, "must be strings"),
        ({"inputs": [tensor(data=[["a", "b"], ["c", "d"]])]}, 400, "must be strings"),
        ({"inputs": [tensor(shape=[0], data=[])]}, 422, "holds no text"),
        ({"inputs": [tensor(data=["a", ""])]}, 422, "or an empty one"),
        ({"inputs": [tensor(shape=[99], data=["a"] * 99)]}, 413, "99 texts in one request"),
        ({"inputs": [tensor()], "outputs": [{"name": "logits"}]}, 400, "unknown output 'logits'"),
        ({"inputs": [tensor()], "outputs": [{"name": "scores"}] * 2}, 400, "an output is asked for twice"),
        ({"inputs": [tensor(parameters={"binary_data_size": 5})]}, 400, "there are 0 bytes after the JSON"),
        ({"inputs": "a"}, 400, "not an inference request"),
        (b"\xff{", 400, "not an inference request"),
        (b"[" * 10_000, 400, "not an inference request"),
    ],
)
def test_what_the_protocol_does_not_say_is_a_clear_error(body: Any, status: int, says: str) -> None:
    reply = post(body, INFER)
    assert reply.status_code == status
    assert says in reply.json()["error"]


def binary(tail: bytes, *, size: int | None = None, length: str | None = None) -> tuple[int, str]:
    parameters = {"binary_data_size": len(tail) if size is None else size}
    head = json.dumps({"inputs": [{**tensor(shape=[1], parameters=parameters), "data": None}]}).encode()
    headers = {"inference-header-content-length": str(len(head)) if length is None else length}

    async def ask(client: Any) -> Any:
        return await client.post(INFER, content=head + tail, headers=headers)

    reply = visit(ask)
    return reply.status_code, reply.json().get("error", "")


def test_binary_texts_are_read_to_the_byte() -> None:
    assert binary(struct.pack("<I", 1) + b"a") == (200, "")
    for tail, says in (
        (b"\x01\x00", "broken at byte 0"),
        (struct.pack("<I", 9) + b"a", "longer than what was sent"),
        (struct.pack("<I", 2) + b"\xff\xfe", "broken at byte 0"),
        (struct.pack("<I", 2**32 - 1), "longer than what was sent"),
    ):
        status, error = binary(tail)
        assert (status, says in error) == (400, True)
    assert "4 bytes after the JSON" in binary(b"abcd", size=3)[1]
    assert binary(b"", length="soon")[0] == binary(b"", length="99999")[0] == binary(b"", length="-1")[0] == 400


def test_another_model_is_not_here() -> None:
    for path in ("/v2/models/other", "/v2/models/other/ready"):
        reply = visit(lambda client, path=path: client.get(path))
        assert reply.status_code == 404
        assert "no model 'other' here" in reply.json()["error"]
    assert post({"inputs": [tensor()]}, "/v2/models/other/infer").status_code == 404
