"""Another variant takes the place of what serves: nothing is lost, nothing answered by half of each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from serving import OPTIONS, GatedRuntime, client_of, expected, open_gate

from hasten.errors import ArtifactError
from hasten.runtime import FakeRuntime, Logits
from hasten.served import AT_ONCE_ON_ONE_CORE, Loaded
from hasten.server import create_app
from hasten.tokenization import Encoding

OLD, NEW = "a" * 64, "b" * 64
OTHER_LABELS = ("no", "yes", "perhaps")


def loaded(runtime: Any, digest: str) -> Loaded:
    return Loaded(
        runtime=runtime, name=f"variant-{digest[0]}", digest=digest, batch_invariant=True, max_tokens=512
    )  # fmt: skip


@dataclass
class Site:
    """A running app whose reload gives what `again` gives."""

    client: httpx.AsyncClient
    reload: Callable[[], None]

    async def ask(self, text: str) -> httpx.Response:
        return await self.client.post("/predict", json={"inputs": text})

    async def reloaded(self, outcome: str, times: int = 1) -> None:
        self.reload()
        while f'hasten_reloads_total{{outcome="{outcome}"}} {times}.0' not in (await self.client.get("/metrics")).text:
            await asyncio.sleep(0.005)


def on_site(script: Callable[[Site], Any], first: Any, again: Callable[[], Loaded] | None) -> Any:
    async def session() -> Any:
        app = create_app(loaded(first, OLD), OPTIONS, again)
        async with asyncio.timeout(10), client_of(app) as client:
            return await script(Site(client, app.state.reload))

    return asyncio.run(session())


def test_after_a_reload_the_new_variant_answers_with_its_own_labels() -> None:
    async def script(site: Site) -> tuple[httpx.Response, ...]:
        before = await site.ask("x")
        await site.reloaded("done")
        metrics = await site.client.get("/metrics")
        return before, await site.ask("x"), await site.client.get("/health"), metrics

    before, after, health, metrics = on_site(
        script, FakeRuntime(), lambda: loaded(FakeRuntime(labels=OTHER_LABELS), NEW)
    )
    assert (before.headers["x-hasten-artifact"], before.json()) == (OLD, expected("x"))
    assert (after.headers["x-hasten-artifact"], after.json()) == (NEW, expected("x", OTHER_LABELS))
    assert health.json() == {"status": "ok", "ready": True, "name": "variant-b", "digest": NEW}
    assert f'hasten_artifact_info{{digest="{NEW}",name="variant-b"}} 1.0' in metrics.text
    assert f'hasten_artifact_info{{digest="{OLD}",name="variant-a"}} 0.0' in metrics.text


def test_what_was_asked_of_the_old_variant_is_answered_by_it() -> None:
    old = GatedRuntime()

    async def script(site: Site) -> list[httpx.Response]:
        waiting = [asyncio.create_task(site.ask(text)) for text in ("x", "y", "z")]
        await old.busy()
        await site.reloaded("done")
        new = await site.ask("x")  # answered while the old one still computes
        old.gate.set()
        return [new, *await asyncio.gather(*waiting)]

    new, *replies = on_site(script, old, lambda: loaded(FakeRuntime(labels=OTHER_LABELS), NEW))
    assert new.json() == expected("x", OTHER_LABELS)
    for text, reply in zip(("x", "y", "z"), replies, strict=True):
        assert (reply.headers["x-hasten-artifact"], reply.json()) == (OLD, expected(text))


def test_a_text_being_tokenized_during_the_swap_is_not_lost() -> None:
    class Slow(FakeRuntime):
        def encode(self, texts: Sequence[str]) -> list[Encoding]:
            if texts == [long]:
                entered.set()
                assert gate.wait(5)
            return super().encode(texts)

    gate, entered, long = threading.Event(), threading.Event(), "x" * (AT_ONCE_ON_ONE_CORE + 1)  # not on the event loop

    async def script(site: Site) -> httpx.Response:
        asked = asyncio.create_task(site.ask(long))
        await asyncio.to_thread(entered.wait, 5)
        await site.reloaded("done")
        gate.set()
        return await asked

    reply = on_site(script, Slow(), lambda: loaded(FakeRuntime(), NEW))
    assert (reply.status_code, reply.headers["x-hasten-artifact"]) == (200, OLD)


def test_a_body_that_comes_slowly_is_answered_by_whatever_serves_when_it_is_there() -> None:
    async def script(site: Site) -> httpx.Response:
        begun, rest = asyncio.Event(), asyncio.Event()

        async def body() -> AsyncGenerator[bytes]:
            yield b'{"inputs": '
            begun.set()
            await rest.wait()
            yield b'"x"}'

        asked = asyncio.create_task(site.client.post("/predict", content=body()))
        await begun.wait()
        await site.reloaded("done")
        rest.set()
        return await asked

    reply = on_site(script, FakeRuntime(), lambda: loaded(FakeRuntime(labels=OTHER_LABELS), NEW))
    assert (reply.headers["x-hasten-artifact"], reply.json()) == (NEW, expected("x", OTHER_LABELS))


class Broken(FakeRuntime):
    def infer(self, encodings: Sequence[Encoding]) -> Logits:
        raise RuntimeError("no kernel for this")


def altered() -> Loaded:
    raise ArtifactError("model.onnx: sha256 differs")


@pytest.mark.parametrize("again", [altered, lambda: loaded(Broken(), NEW)], ids=["altered", "cannot infer"])
def test_what_fails_its_checks_changes_nothing(again: Callable[[], Loaded], caplog: pytest.LogCaptureFixture) -> None:
    async def script(site: Site) -> httpx.Response:
        await site.reloaded("refused")
        await site.reloaded("refused", times=2)  # and may be tried again
        return await site.ask("x")

    reply = on_site(script, FakeRuntime(), again)
    assert (reply.headers["x-hasten-artifact"], reply.json()) == (OLD, expected("x"))
    assert "variant-a goes on serving" in caplog.text


def test_reloads_during_a_reload_are_one_more_since_the_folder_may_have_changed() -> None:
    calls, gate = list[int](), open_gate()
    gate.clear()

    def again() -> Loaded:
        calls.append(1)
        assert gate.wait(5)
        return loaded(FakeRuntime(), NEW)

    async def script(site: Site) -> None:
        for _ in range(3):
            site.reload()
            await asyncio.sleep(0.01)
        gate.set()
        while 'hasten_reloads_total{outcome="done"} 2.0' not in (await site.client.get("/metrics")).text:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)

    on_site(script, FakeRuntime(), again)
    assert calls == [1, 1]


def test_after_a_reload_the_old_one_is_let_go_of() -> None:
    def working() -> int:
        return sum(thread.name.startswith("hasten-worker") for thread in threading.enumerate())

    before = working()

    async def script(site: Site) -> None:
        await site.ask("x")
        await site.reloaded("done")
        await site.ask("x")
        while working() > before + 1:  # a hang fails
            await asyncio.sleep(0.005)

    on_site(script, FakeRuntime(), lambda: loaded(FakeRuntime(), NEW))
