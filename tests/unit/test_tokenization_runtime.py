"""Text to tokens, rows to batches, batches to logits: alone, in any batch, and again later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LABELS, labelled_rows
from hasten.checkpoint import import_checkpoint
from hasten.errors import ArtifactError, DataError, ParityError
from hasten.golden import GOLDEN, GOLDEN_TEXTS, Golden, finish, other_machine, replay_golden
from hasten.runtime import FakeRuntime, open_runtime, predict_logits, softmax  # fmt: skip
from hasten.tokenization import Encoding, TextEncoder, pad_token_id, padded
from hasten.variant import MANIFEST, Variant, open_variant, seal

TEXTS = [text for text, _ in labelled_rows(20, seed=7)]
rows = st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def bert(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return import_checkpoint(str(checkpoint("bert")), tmp_path_factory.mktemp("bert") / "torch-fp32")


@pytest.fixture
def copy(bert: Variant, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert.path, tmp_path / "copy"))


def encoding(ids: list[int]) -> Encoding:
    return Encoding(ids=ids, type_ids=[0] * len(ids))


def test_tokens_are_those_of_transformers(bert: Variant) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(bert.path)(TEXTS, return_token_type_ids=True)
    found = TextEncoder(bert)(TEXTS)
    assert [e.ids for e in found] == reference["input_ids"]
    assert [e.type_ids for e in found] == reference["token_type_ids"]
    assert [len(e) for e in found] == [len(ids) for ids in reference["input_ids"]]


def test_long_texts_are_truncated_with_their_special_tokens(bert: Variant) -> None:
    (short, long) = TextEncoder(bert)(["great", "great " * 500])
    assert len(long) == bert.manifest.max_tokens == 64
    assert (long.ids[0], long.ids[-1]) == (short.ids[0], short.ids[-1])


def test_padding_that_a_tokenizer_brings_is_left_out(copy: Path, bert: Variant) -> None:
    path = copy / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    settings["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(settings))
    assert TextEncoder(replace(bert, path=copy))(TEXTS) == TextEncoder(bert)(TEXTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_on_the_tokenizers_side(
    checkpoint: Callable[[str], Path], tmp_path: Path, side: str
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "raw"
    shutil.copytree(checkpoint("bert"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": side}))
    made = import_checkpoint(str(folder), tmp_path / "made")
    long = " ".join(TEXTS * 50)
    theirs = AutoTokenizer.from_pretrained(folder)(long, truncation=True, max_length=made.manifest.max_tokens)
    assert TextEncoder(made)([long])[0].ids == theirs["input_ids"]


def test_an_empty_text_and_no_text(bert: Variant) -> None:
    assert [len(e) for e in TextEncoder(bert)([""])] == [2]
    assert TextEncoder(bert)([]) == []


def test_what_is_no_text_is_refused(bert: Variant) -> None:
    with pytest.raises(DataError, match="takes texts only, not None"):
        TextEncoder(bert)(["fine", cast("str", None)])


def test_plain_texts_are_told_apart_where_that_is_asked(bert: Variant) -> None:
    encode = TextEncoder(bert)
    assert encode.plain(TEXTS) == encode(TEXTS)
    assert encode.plain([]) == []
    assert encode.plain([*TEXTS, "\u200d"]) is None
    assert encode.plain(["great " * 100] * 6) is None, "too long together"


def test_a_lone_surrogate_is_refused(bert: Variant) -> None:
    with pytest.raises(DataError, match="not valid Unicode: surrogates not allowed at character 2"):
        TextEncoder(bert)(["fine", "ab\ud800"])


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "9.0"}'])
def test_a_broken_tokenizer_is_refused_by_name(bert: Variant, copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a tokenizer"):
        TextEncoder(replace(bert, path=copy))


@pytest.mark.parametrize(("config", "wanted"), [({"pad_token_id": 1}, 1), ({"pad_token_id": None}, 0), ({}, 0)])
def test_the_padding_token_is_the_configurations(
    bert: Variant, copy: Path, config: dict[str, object], wanted: int
) -> None:
    (copy / "config.json").write_text(json.dumps(config))
    assert pad_token_id(replace(bert, path=copy)) == wanted


@given(rows, st.integers(100, 200))
@settings(max_examples=60)
def test_a_batch_holds_every_row_and_padding_behind_it(ids: list[list[int]], pad_id: int) -> None:
    batch = padded([Encoding(ids=row, type_ids=[1] * len(row)) for row in ids], pad_id)
    longest = max(1, *map(len, ids))
    assert {array.shape for array in batch.values()} == {(len(ids), longest)}
    assert {array.dtype for array in batch.values()} == {np.dtype("int64")}
    for place, row in enumerate(ids):
        rest = longest - len(row)
        assert batch["input_ids"][place].tolist() == row + [pad_id] * rest
        assert batch["attention_mask"][place].tolist() == [1] * len(row) + [0] * rest
        assert batch["token_type_ids"][place].tolist() == [1] * len(row) + [0] * rest


def test_a_text_is_answered_alike_alone_and_in_any_batch(bert: Variant) -> None:
    runtime = open_runtime(bert)
    alone = predict_logits(runtime, TEXTS)
    assert alone.shape == (len(TEXTS), 3)
    assert alone.dtype == np.float32
    for batch in (3, 8, 100):
        np.testing.assert_allclose(predict_logits(runtime, TEXTS, batch=batch), alone, atol=1e-5)


def test_logits_are_those_of_transformers(bert: Variant, checkpoint: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint("bert")).eval()
    inputs = AutoTokenizer.from_pretrained(checkpoint("bert"))(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        reference = model(**inputs).logits.numpy()
    np.testing.assert_allclose(predict_logits(open_runtime(bert), TEXTS, batch=20), reference, atol=1e-5)
    assert open_runtime(bert).labels == LABELS


texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=12)


@given(texts, st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_predictions_keep_the_order_of_the_texts(given_texts: list[str], batch: int, random: object) -> None:
    runtime = FakeRuntime(labels=("a", "b", "c"), max_tokens=10)
    found = predict_logits(runtime, given_texts, batch=batch)
    assert found.shape == (len(given_texts), 3)
    order = list(range(len(given_texts)))
    random.shuffle(order)
    again = predict_logits(runtime, [given_texts[i] for i in order], batch=1)
    np.testing.assert_array_equal(again, found[order])


def test_batches_are_of_similar_length_and_no_larger_than_asked() -> None:
    seen: list[list[int]] = []

    class Watching(FakeRuntime):
        def infer(self, encodings):
            seen.append([len(e) for e in encodings])
            return FakeRuntime.infer(self, encodings)

    predict_logits(Watching(), ["x" * size for size in (9, 1, 5, 2, 8, 4, 7)], batch=3)
    assert seen == [[1, 2, 4], [5, 7, 8], [9]]


def test_the_fake_runtime_answers_from_the_text_alone() -> None:
    fake = FakeRuntime(labels=("a", "b"), max_tokens=4)
    one, two, cut = predict_logits(fake, ["same", "other", "same but longer"])
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, cut)
    assert np.abs([one, two]).max() <= 1


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=6), st.floats(-1000, 1000, width=16))
@settings(max_examples=60)
def test_softmax_is_a_distribution_that_no_shift_changes(logits: list[float], shift: float) -> None:
    from scipy import special

    row = np.asarray([logits], dtype=np.float32)
    found = softmax(row)
    assert found.dtype == np.float32
    assert found.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found, special.softmax(row.astype(np.float64), axis=-1), atol=1e-6)
    np.testing.assert_allclose(softmax(row + np.float32(shift)), found, atol=2e-3)


def test_softmax_of_huge_logits_stays_finite() -> None:
    assert softmax(np.asarray([[1e30, 0.0], [-1e30, -1e30]], dtype=np.float32)).tolist() == [[1, 0], [0.5, 0.5]]


def test_golden_logits_replay(bert: Variant) -> None:
    assert replay_golden(bert) <= 1e-5
    golden = json.loads((bert.path / GOLDEN).read_text())
    assert tuple(golden["texts"]) == GOLDEN_TEXTS
    np.testing.assert_allclose(golden["logits"], predict_logits(open_runtime(bert), GOLDEN_TEXTS), atol=1e-5)


def resealed(folder: Path, variant: Variant) -> Variant:
    (folder / MANIFEST).unlink()
    seal(folder, variant.manifest)
    return open_variant(folder)


def test_golden_logits_that_another_machine_would_not_give_are_refused(bert: Variant, copy: Path) -> None:
    golden = json.loads((copy / GOLDEN).read_text())
    golden["logits"][1][0] += 0.01
    (copy / GOLDEN).write_text(json.dumps(golden))
    with pytest.raises(ParityError, match=r"logits differ by 0\.01"):
        replay_golden(resealed(copy, bert))


def test_another_machine_is_told_with_what_it_means(bert: Variant, copy: Path) -> None:
    assert other_machine(bert) == []
    golden = json.loads((copy / GOLDEN).read_text())
    golden["machine"] = {"cpu": "Abacus 1", "instructions": ["avx512_vnni"], "versions": {"onnxruntime": "1.0"}}
    (copy / GOLDEN).write_text(json.dumps(golden))
    told = "\n".join(other_machine(resealed(copy, bert)))
    for part in ("avx512_vnni", "measure its accuracy", "Abacus 1", "onnxruntime 1.0", "tokenizers none"):
        assert part in told


def test_bfloat16_counts_only_for_what_runs_in_it(bert: Variant, copy: Path) -> None:
    golden = json.loads((copy / GOLDEN).read_text())
    golden["machine"]["instructions"].append("amx_bf16")
    golden["logits"][1][0] += 0.01
    (copy / GOLDEN).write_text(json.dumps(golden))
    fp32 = resealed(copy, bert)
    bf16 = replace(fp32, manifest=replace(fp32.manifest, precision="bf16"))
    assert other_machine(fp32) == []
    assert "amx_bf16" in "\n".join(other_machine(bf16))
    assert replay_golden(bf16) == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_golden_logits_that_are_not_there_are_refused(bert: Variant, copy: Path, content: str | None) -> None:
    (copy / GOLDEN).unlink()
    if content is not None:
        (copy / GOLDEN).write_text(content)
    with pytest.raises(ArtifactError, match="no golden logits to replay"):
        replay_golden(resealed(copy, bert))


def test_a_model_that_answers_nan_is_never_finished(bert: Variant, copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["classifier.bias"][0] = np.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / MANIFEST).unlink()
    with pytest.raises(ParityError, match="NaN or infinity"):
        finish(copy, bert.manifest)
    assert not (copy / MANIFEST).exists()


def test_golden_takes_any_runtime() -> None:
    recorded = Golden.record(FakeRuntime(), "onnx")
    assert len(recorded.logits) == len(GOLDEN_TEXTS)
    assert {len(row) for row in recorded.logits} == {2}


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_weights_that_no_runtime_loads_are_refused_by_name(bert: Variant, copy: Path, name: str) -> None:
    manifest = replace(bert.manifest, format=name)
    broken = Variant(path=copy, manifest=manifest)
    (copy / broken.weights).write_bytes(b"no weights at all")
    with pytest.raises(ArtifactError, match="cannot load it"):
        open_runtime(broken)
