"""The profiler's turns, without the processes that take them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Self

import pytest

from hasten import profiling
from hasten.errors import MeasurementError
from hasten.profiling import ProfileOptions, Worker, time_only
from hasten.profiling_worker import Reply, Request, classify, warm_up
from hasten.runtime import FakeRuntime, Logits
from hasten.tokenization import Encoding


def turns_of(monkeypatch: pytest.MonkeyPatch, names: str, options: ProfileOptions, texts: int) -> list[tuple[str, str]]:
    """Who was asked what, in which order."""
    taken = list[tuple[str, str]]()

    class Recorded:
        def __init__(self, variant: Any, threads: int) -> None:
            self.name = variant.name

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def classify(self, texts: Sequence[str], *, warmup: int) -> Reply:
            taken.append((self.name, texts[0]))
            return Reply(samples_ms=[1.0] * len(texts), tokenizer_ms=[0.1] * len(texts), tokens=[3] * len(texts))

    monkeypatch.setattr(profiling, "Worker", Recorded)
    found = time_only([SimpleNamespace(name=name) for name in names], [f"text {i}" for i in range(texts)], options)
    assert [len(latency.samples_ms) for latency in found] == [texts] * len(names)
    return taken


def test_each_length_is_met_once_before_it_is_timed() -> None:
    lengths, met = list[int](), set[int]()

    class Watching(FakeRuntime):
        def infer(self, encodings: Sequence[Encoding]) -> Logits:
            lengths.extend(map(len, encodings))
            return FakeRuntime.infer(self, encodings)

    compiling = Watching(compiles_shapes=True)
    warm_up(compiling, ["aa", "b", "cc", "b"], 0, met)
    warm_up(compiling, ["dd", "eee"], 1, met)
    assert lengths == [2, 1, 3, 2]


def test_clients_ask_at_the_same_time_each_its_share_in_order_from_a_thread_that_is_warm() -> None:
    seen: dict[int, list[bytes]] = defaultdict(list)

    class Watching(FakeRuntime):
        def infer(self, encodings: Sequence[Encoding]) -> Logits:
            seen[threading.get_ident()].append(bytes(encodings[0].ids))
            return FakeRuntime.infer(self, encodings)

    block = ["a", "b", "c", "d", "e"]
    reply = classify(Watching(), Request(texts=block * 5, warmup=1, clients=5), set())
    assert sorted(seen.values()) == [[b"a", b"a", b"b", b"c", b"d", b"e"]] * 5
    assert len(reply.samples_ms) == 25
    with pytest.raises(ZeroDivisionError):
        classify(Failing(), Request(texts=["a", "bad"], warmup=1, clients=2), set())


class Failing(FakeRuntime):
    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        return FakeRuntime.infer(self, encodings) if len(encodings[0]) == 1 else 1 / 0  # pyright: ignore


def test_a_process_that_was_killed_between_its_turns_is_named() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    gone.wait()
    worker = object.__new__(Worker)
    worker.variant, worker._process = SimpleNamespace(name="onnx-int8"), gone
    with pytest.raises(MeasurementError, match="onnx-int8: the measuring process ended with status 0"):
        worker.classify(["text"])
    worker.__exit__()  # what it was not told any more is still in the pipe's buffer


def test_every_variant_gets_every_block_and_every_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ProfileOptions(settle_s=0, block=5)
    taken = turns_of(monkeypatch, "abc", options, 200)
    rounds = [taken[at : at + 3] for at in range(0, len(taken), 3)]
    assert [{name for name, _ in one} for one in rounds] == [{"a", "b", "c"}] * 40
    assert [{text for _, text in one} for one in rounds] == [{f"text {5 * number}"} for number in range(40)]
    neighbours = {(one, other) for (one, _), (other, _) in pairwise(taken)}
    assert {(one, other) for one in "abc" for other in "abc" if one != other} <= neighbours
    assert len({tuple(name for name, _ in one) for one in rounds}) == 6


def test_the_order_of_turns_is_that_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (
        turns_of(monkeypatch, "abcd", ProfileOptions(settle_s=0, seed=seed), 500) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
