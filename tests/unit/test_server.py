from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import DIGEST, OPTIONS, GatedRuntime, client_of, expected, live, make_app, open_gate, post, visit

from hasten import served
from hasten.runtime import FakeRuntime, Logits
from hasten.served import AT_ONCE, AT_ONCE_ON_ONE_CORE
from hasten.server import ServeOptions
from hasten.tokenization import Encoding


def test_one_text_gives_labels_with_scores_best_first() -> None:
    reply = post({"inputs": "a fine day"})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == expected("a fine day")
    assert sum(element["score"] for element in reply.json()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("inputs", [["a", "b", "c"], [["a"], ["b"], ["c"]], ["a", ["b"], "c"]])
def test_a_list_gives_a_list_in_its_order(inputs: list[Any]) -> None:
    assert post({"inputs": inputs}).json() == [expected("a"), expected("b"), expected("c")]


def test_a_reply_tells_its_timings_and_its_artifact() -> None:
    headers = post({"inputs": ["a", "b"]}).headers
    assert headers["x-hasten-artifact"] == DIGEST
    for stage in ("tokenize", "queue", "inference"):
        assert 0 <= float(headers[f"x-hasten-{stage}-ms"]) < 10_000


def test_raw_scores_are_the_logits() -> None:
    logits = FakeRuntime().infer(FakeRuntime().encode(["x"]))[0]
    wanted = sorted(map(float, logits), reverse=True)
    for extra in ({"raw_scores": True}, {"parameters": {"function_to_apply": "none"}}):
        assert [element["score"] for element in post({"inputs": "x", **extra}).json()] == pytest.approx(wanted)


def test_sigmoid_and_top_k() -> None:
    labels = ("a", "b", "c", "d")
    body = {"inputs": "x", "parameters": {"function_to_apply": "sigmoid", "top_k": 2}}
    reply = post(body, runtime=FakeRuntime(labels=labels)).json()
    logits = sorted(map(float, FakeRuntime(labels=labels).infer(FakeRuntime().encode(["x"]))[0]), reverse=True)
    wanted = [1 / (1 + math.exp(-logit)) for logit in logits[:2]]
    assert [element["score"] for element in reply] == pytest.approx(wanted)


def test_long_texts_are_truncated_unless_asked_not_to() -> None:
    long = "x" * 600
    assert post({"inputs": long}).json() == expected("x" * 512)
    assert post({"inputs": long, "truncate": True}).status_code == 200
    reply = post({"inputs": long, "truncate": False})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert post({"inputs": "short", "truncate": False}).json() == expected("short")


def test_unknown_fields_are_ignored() -> None:
    body = {"inputs": "a", "options": {"wait_for_model": True}, "parameters": {"odd": 1}, "model": None}
    assert post(body).json() == expected("a")


SURROGATE = b'{"inputs": "a \\ud800 b"}'
HOSTILE = {
    b"": 400, b"{": 400, b"\xff\xfe": 400, b'{"inputs": NaN}': 400, b'{"inputs": "a"} x': 400, SURROGATE: 400,
    b'{"inputs": "\\ud800"}': 400, b'{"inputs": "\xed\xa0\x80"}': 400, b'{"inputs": "a", "x": Infinity}': 400,
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "inputs": "a"}': 400,
    b"[" * 100_000: 422, b'{"inputs": ' + b"[" * 100_000: 422, b"null": 422, b"[]": 422, b'"a"': 422, b"{}": 422,
    b'{"inputs": null}': 422, b'{"inputs": 1}': 422, b'{"inputs": {"a": "b"}}': 422, b'{"inputs": [null]}': 422,
    b'{"inputs": []}': 422, b'{"inputs": ""}': 422, b'{"inputs": ["a", ""]}': 422, b'{"inputs": [[]]}': 422,
    b'{"inputs": [["a", "b"]]}': 422, b'{"inputs": "a", "truncate": "yes"}': 422,
    b'{"inputs": "a", "parameters": {"top_k": 0}}': 422, b'{"inputs": "unreadable"}': 422,
}  # fmt: skip


def test_hostile_bodies_are_refused_with_a_reason() -> None:
    async def script(client: httpx.AsyncClient) -> None:
        for body, status in HOSTILE.items():
            reply = await client.post("/predict", content=body)
            assert reply.status_code == status, (body[:40], reply.text)
            assert reply.json()["error"]
            assert reply.json()["error_type"] in ("validation", "empty", "tokenizer")
            assert reply.headers["x-hasten-artifact"] == DIGEST
        assert (await client.post("/predict", json={"inputs": "still here"})).status_code == 200

    visit(script, runtime=GatedRuntime(gate=open_gate()))


@pytest.mark.parametrize("text", ["a\0b", "\0", " ", "\ufeff", "\U0010ffff", "naïve 東京 😀", "\u202e", "a" * 5000])
def test_odd_texts_get_the_answer_they_get_alone(text: str) -> None:
    cut = text.encode()[:512].decode(errors="ignore")
    assert post({"inputs": text}).json() == expected(cut)


def test_no_body_makes_the_server_fail() -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["inputs", "truncate", "x"]), inner)
        ),
        max_leaves=6,
    )
    bodies = st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode())

    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(stack.enter_async_context(client_of(make_app())))

        @given(bodies)
        def check(body: bytes) -> None:
            assert runner.run(client.post("/predict", content=body)).status_code in (200, 400, 422)

        check()
        runner.run(stack.aclose())


def test_a_large_body_is_refused_by_the_bytes_that_come() -> None:
    sent = 0

    async def chunks() -> AsyncGenerator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 100

    async def script(client: httpx.AsyncClient) -> None:
        for content in (chunks(), b" " * 1001):
            reply = await client.post("/predict", content=content)
            assert (reply.status_code, reply.headers["connection"]) == (413, "close")
            assert "1000 bytes" in reply.json()["error"]
        body = json.dumps({"inputs": "a"}).encode()
        assert (await client.post("/predict", content=body.ljust(1000))).status_code == 200

    visit(script, options=replace(OPTIONS, max_body_bytes=1000))
    assert sent < 20


@pytest.mark.parametrize("options", [replace(OPTIONS, max_rows=3), replace(OPTIONS, max_queue=3)])
def test_too_many_texts_in_a_request_are_refused(options: ServeOptions) -> None:
    assert post({"inputs": ["a"] * 4}, options=options).status_code == 413
    assert post({"inputs": ["a"] * 3}, options=options).status_code == 200


def test_batched_answers_are_those_given_alone() -> None:
    texts = [f"text {'x' * (7 * number % 50)}" for number in range(20)]

    async def script(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/predict", json={"inputs": text}) for text in texts))

    assert [reply.json() for reply in visit(script)] == [expected(text) for text in texts]


@pytest.mark.parametrize(("batch_invariant", "largest"), [(True, 4), (False, 1)])
def test_a_variant_that_is_not_batch_invariant_answers_one_by_one(batch_invariant: bool, largest: int) -> None:
    runtime = GatedRuntime(gate=open_gate())
    reply = post({"inputs": ["t1", "t2", "t3", "t4"]}, runtime=runtime, batch_invariant=batch_invariant)
    assert reply.json() == [expected(text) for text in ("t1", "t2", "t3", "t4")]
    assert max(map(len, runtime.batches)) == largest


def test_the_other_routes() -> None:
    async def script(client: httpx.AsyncClient) -> None:
        health = (await client.get("/health")).json()
        assert health == {"status": "ok", "ready": True, "name": "onnx-fp32", "digest": DIGEST}
        about = (await client.get("/")).json()
        assert about["labels"] == ["negative", "positive"]
        assert "POST /predict" in about["routes"]
        missing, wrong = await client.get("/nothing"), await client.get("/predict")
        assert (missing.status_code, missing.json()["error"]) == (404, "Not Found")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")

    visit(script)


def test_metrics_count_requests_stages_and_batches() -> None:
    async def script(client: httpx.AsyncClient) -> str:
        await client.post("/predict", json={"inputs": ["a", "b", "c"]})
        await client.post("/predict", content=b"{")
        return (await client.get("/metrics")).text

    text = visit(script)
    assert 'hasten_requests_total{status="200"} 1.0' in text
    assert 'hasten_requests_total{status="400"} 1.0' in text
    assert 'hasten_requests_total{status="429"} 0.0' in text  # so that the first refusal is seen to be one more
    assert 'hasten_refusals_total{reason="late"} 0.0' in text
    assert 'hasten_reloads_total{outcome="refused"} 0.0' in text
    assert 'hasten_batch_rows_bucket{le="2.0"} 0.0' in text
    assert 'hasten_batch_rows_bucket{le="4.0"} 1.0' in text
    for stage, count in (("tokenize", 1), ("queue", 1), ("inference", 1), ("total", 1)):
        assert f"hasten_{stage}_seconds_count {count}.0" in text
        assert f'hasten_{stage}_seconds_bucket{{le="0.0001"}}' in text


def test_the_inference_client_of_the_hub_works_against_a_live_server(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with live(make_app()) as url:
        client = hub.InferenceClient(url, token="none")
        answer = client.text_classification("a fine day", top_k=1)
        both = client.text_classification("a fine day")
        reply = httpx.post(f"{url}/predict", json={"inputs": "a fine day"}, timeout=10)
        with pytest.raises(hub.errors.HfHubHTTPError, match="422"):
            client.text_classification("")
        hub.utils.close_session()
    wanted = expected("a fine day")
    assert [{"label": element.label, "score": element.score} for element in both] == wanted
    assert [element.label for element in answer] == [wanted[0]["label"]]
    assert reply.json() == wanted
    assert reply.headers["x-hasten-artifact"] == DIGEST


def test_plain_text_is_tokenized_on_the_event_loop_however_long() -> None:
    class Plain(FakeRuntime):
        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            assert texts != [long], "by a thread"
            return super().encode(texts)

        def encode_plain(self, texts: Sequence[str]) -> list[Encoding] | None:
            loops.append(asyncio.get_running_loop())
            return super().encode(texts)

    long, loops = "x" * 2_000, list[asyncio.AbstractEventLoop]()
    reply = post({"inputs": long}, runtime=Plain(max_tokens=2_000))
    assert (reply.status_code, len(loops)) == (200, 1)


@pytest.mark.parametrize(("cores", "most"), [(1.0, AT_ONCE_ON_ONE_CORE), (2.0, AT_ONCE)])
def test_a_long_text_is_tokenized_off_the_event_loop(cores: float, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(FakeRuntime):
        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            threads.append(threading.current_thread().name)
            return super().encode(texts)

    monkeypatch.setattr(served, "available_cores", lambda: cores)
    threads = list[str]()

    async def script(client: httpx.AsyncClient) -> None:
        threads.clear()
        for texts in (["x" * most], ["x" * most, "y"]):
            assert (await client.post("/predict", json={"inputs": texts})).status_code == 200

    visit(script, Watched())
    assert threads[0] == threading.current_thread().name
    assert threads[1].startswith("hasten-tokenize")


def test_where_shapes_are_compiled_none_is_new_under_traffic() -> None:
    class Compiling(FakeRuntime):
        """Words are tokens, between two more."""

        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            rows = [[0, *(len(word) for word in text.split()), 0] for text in texts]
            return [Encoding(ids=ids[:512], type_ids=[0] * len(ids[:512])) for ids in rows]

        def infer(self, encodings: Sequence[Encoding]) -> Logits:
            shapes.append((len(encodings), max(len(encoding) for encoding in encodings)))
            return super().infer(encodings)

    shapes = list[tuple[int, int]]()

    async def script(client: httpx.AsyncClient) -> None:
        before = set(shapes)
        texts = [" ".join(["b"] * words) for words in (1, 2, 3, 50, 509, 510, 900)]
        asking = [client.post("/predict", json={"inputs": inputs}) for inputs in (*texts, texts)]
        assert {reply.status_code for reply in await asyncio.gather(*asking)} == {200}
        assert set(shapes) == before == {(1, tokens) for tokens in range(3, 513)}

    visit(script, Compiling(compiles_shapes=True))
