"""Variant folders: whole or not at all, sealed, and refused when a byte of them is another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from hasten.errors import ArtifactError, UsageError
from hasten.files import beside, file_sha256, sweep, write_atomically
from hasten.variant import (
    MANIFEST,
    SCHEMA,
    Manifest,
    Parameters,
    Precision,
    StepRecord,
    Variant,
    building,
    copy_configuration,
    open_variant,
    seal,
)  # fmt: skip

WHOLE = Manifest(
    schema=SCHEMA, name="torch-fp32", task="single_label_classification", format="torch", precision="fp32",
    architecture="bert", labels=["no", "yes"], max_tokens=64,
    parameters=Parameters(embedding=30, encoder=20, head=10), batch_invariant=True,
    step=StepRecord(name="import", parent=None, options={"a": 1}, versions={"torch": "2"}, facts={"loss": 0.5}),
)  # fmt: skip


def make(out: Path, manifest: Manifest = WHOLE, weights: bytes = b"weights") -> Variant:
    with building(out) as draft:
        (draft / "model.safetensors").write_bytes(weights)
        (draft / "config.json").write_text('{"model_type": "bert"}')
        (draft / "deeper").mkdir()
        (draft / "deeper" / "vocabulary.txt").write_text("a\nb\n")
        sealed = seal(draft, manifest)
    return Variant(path=out.resolve(), manifest=sealed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "variants" / "torch-fp32").path


def edit(folder: Path, **changes: object) -> None:
    """Changes fields of `variant.json`."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sealed_folder_opens_as_it_was_made(tmp_path: Path) -> None:
    made = make(tmp_path / "variants" / "torch-fp32")
    assert open_variant(made.path) == made
    assert open_variant(str(made.path)) == made
    assert set(made.manifest.files) == {"model.safetensors", "config.json", "deeper/vocabulary.txt"}
    assert made.manifest.files["model.safetensors"] == file_sha256(made.path / "model.safetensors")
    assert replace(made.manifest, files={}) == WHOLE
    assert [p.name for p in made.path.parent.iterdir()] == ["torch-fp32"]


def test_a_variant_tells_what_it_is(folder: Path) -> None:
    variant = open_variant(folder)
    assert (variant.name, variant.labels, variant.size_bytes) == ("torch-fp32", ("no", "yes"), len(b"weights"))
    assert variant.weights == "model.safetensors"
    assert replace(variant, manifest=replace(variant.manifest, format="onnx")).weights == "model.onnx"
    assert variant.manifest.parameters.total == 60


def test_a_link_to_a_variant_opens_and_is_resolved(folder: Path) -> None:
    link = folder.parent.parent / "chosen"
    link.symlink_to(Path("variants") / "torch-fp32")
    assert open_variant(link).path == folder


def test_the_digest_is_of_the_files_and_not_of_the_name(tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    renamed = make(tmp_path / "two", replace(WHOLE, name="other", step=replace(WHOLE.step, facts={})))
    changed = make(tmp_path / "three", weights=b"other weights")
    assert one.digest == renamed.digest != changed.digest
    assert one.digest == open_variant(one.path).digest
    assert len(one.digest) == 64


def test_the_same_files_in_bfloat16_are_another_variant(tmp_path: Path) -> None:
    kinds: tuple[Precision, ...] = ("fp32", "bf16", "int8+bf16")
    made = [make(tmp_path / kind, replace(WHOLE, precision=kind)) for kind in kinds]
    assert made[0].manifest.files == made[1].manifest.files == made[2].manifest.files
    assert len({variant.digest for variant in made}) == 3


def test_an_error_while_building_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), building(tmp_path / "variants" / "new") as draft:
        (draft / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("half way")
    assert list((tmp_path / "variants").iterdir()) == []


def test_an_error_while_building_keeps_the_folder_that_stood_there(folder: Path) -> None:
    before = open_variant(folder)
    with pytest.raises(KeyboardInterrupt), building(folder) as draft:
        (draft / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert open_variant(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_nothing_stands_at_the_place_before_the_end(tmp_path: Path) -> None:
    with building(tmp_path / "new") as draft:
        (draft / "file").write_text("x")
        assert draft.parent == tmp_path
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text() == "x"


def test_building_replaces_a_whole_folder(folder: Path) -> None:
    made = make(folder, weights=b"newer")
    assert (folder / "model.safetensors").read_bytes() == b"newer"
    assert open_variant(folder) == made
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("damaged", ["{", "[]", '{"files": 1}'])
def test_building_replaces_a_variant_whose_manifest_is_damaged(tmp_path: Path, damaged: str) -> None:
    out = tmp_path / "torch-fp32"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "golden.json"):
        (out / name).write_text("{}")
    (out / MANIFEST).write_text(damaged)
    assert make(out) == open_variant(out)


def file(place: Path) -> None:
    place.write_text("the user's")


def link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")


def folder_of_others(place: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("the user's")


def variant_with_notes(place: Path) -> None:
    make(place)
    (place / "notes.txt").write_text("the user's")


def variant_of_an_unknown_kind(place: Path) -> None:
    make(place)
    (place / MANIFEST).write_text("{")


@pytest.mark.parametrize("there", [file, link, folder_of_others, variant_with_notes, variant_of_an_unknown_kind])
def test_nothing_but_a_variant_is_replaced(there: Callable[[Path], None], tmp_path: Path) -> None:
    there(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"out: (is a file or a link|holds other things)"), building(tmp_path / "out"):
        pytest.fail("nothing is to be written")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with building(tmp_path / "empty") as draft:
        (draft / "file").write_text("x")
    assert (tmp_path / "empty" / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_what_an_interruption_left_is_swept(folder: Path) -> None:
    for name in (".torch-fp32.12345678.draft", ".torch-fp32.12345678.old"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "file").write_text("x")
    (folder.parent / ".student.checkpoint.safetensors.1234abcd.draft").write_text("half a checkpoint")
    (folder.parent / ".chosen.1234abcd.draft").symlink_to(folder)
    for name in (".env.old", ".notes.draft", ".config.settings.old"):
        (folder.parent / name).write_text("the user's")
    sweep(folder.parent)
    assert {p.name for p in folder.parent.iterdir()} == {
        folder.name,
        ".env.old",
        ".notes.draft",
        ".config.settings.old",
    }
    open_variant(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "deeper/vocabulary.txt"])
def test_an_altered_byte_is_refused_by_name(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256 differs") as caught:
        open_variant(folder)
    assert name in str(caught.value)


def test_a_missing_file_is_refused_by_name(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        open_variant(folder)


def test_what_an_interrupted_write_left_behind_is_no_stranger(folder: Path) -> None:
    beside(folder / MANIFEST).write_text("{")
    assert open_variant(folder).path == folder.resolve()


@pytest.mark.parametrize("name", ["stranger.py", "deeper/stranger.py", ".hidden"])
def test_a_stranger_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_text("import os")
    with pytest.raises(ArtifactError, match=f"not named in {MANIFEST}: {name}"):
        open_variant(folder)


def test_a_file_outside_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent.parent / "outside.txt"
    outside.write_text("secret")
    files = open_variant(folder).manifest.files
    edit(folder, files=files | {"../../outside.txt": file_sha256(outside)})
    with pytest.raises(ArtifactError, match="points outside the folder"):
        open_variant(folder)
    edit(folder, files=files | {str(outside): file_sha256(outside)})
    with pytest.raises(ArtifactError, match="points outside the folder"):
        open_variant(folder)


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_in_place_of_a_file_is_refused(folder: Path, inside: bool) -> None:
    path = folder / "model.safetensors"
    target = folder / "deeper" / "vocabulary.txt" if inside else folder.parent.parent / "weights"
    if not inside:
        target.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(ArtifactError, match=r"'model\.safetensors' points outside the folder"):
        open_variant(folder)


def test_a_linked_folder_is_refused(folder: Path) -> None:
    aside = folder.parent.parent / "deeper"
    (folder / "deeper").rename(aside)
    (folder / "deeper").symlink_to(aside)
    with pytest.raises(ArtifactError, match=f"not named in {MANIFEST}: deeper"):
        open_variant(folder)
    (folder / "deeper").unlink()
    aside.rename(folder / "deeper")
    (folder / "stranger").symlink_to(folder.parent)
    with pytest.raises(ArtifactError, match=f"not named in {MANIFEST}: stranger"):
        open_variant(folder)


def test_another_schema_is_refused_by_name(folder: Path) -> None:
    edit(folder, schema="hasten.variant/2")
    with pytest.raises(ArtifactError, match=r"schema is 'hasten\.variant/2', this hasten reads 'hasten\.variant/1'"):
        open_variant(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"schema": "hasten.variant/1"}', b'{"schema": 1}'],
)
def test_a_broken_manifest_is_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"variant\.json: "):
        open_variant(folder)


@pytest.mark.parametrize("changes", [{"format": "pickle"}, {"precision": "fp16"}, {"task": "poetry"}, {"labels": "ab"}])
def test_an_unknown_kind_is_refused(folder: Path, changes: dict[str, object]) -> None:
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=next(iter(changes))):
        open_variant(folder)


def test_configuration_is_shared_and_weights_are_not(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    copy_configuration(replace(open_variant_unchecked(folder)), tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"config.json", "tokenizer.json"}


def open_variant_unchecked(folder: Path) -> Variant:
    return Variant(path=folder, manifest=msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest))


def test_writing_atomically_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"three")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_no_variant_is_put_into_another(folder: Path) -> None:
    with pytest.raises(UsageError, match="is inside the variant"):
        make(folder / "onnx")
    assert open_variant(folder).path == folder


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", ".x", "a\x00"])
def test_a_name_that_would_lead_elsewhere_is_refused(folder: Path, name: str) -> None:
    edit(folder, name=name)
    with pytest.raises(ArtifactError, match="has a slash or begins with a dot"):
        open_variant(folder)


def test_what_is_no_variant_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.json").write_text("{}")
    for place, says in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "not a folder that hasten made"),
                        (tmp_path, "a run; name its folder `chosen`")):  # fmt: skip
        with pytest.raises(ArtifactError, match=says):
            open_variant(place)


@pytest.mark.parametrize("name", [".w.12345678.draft", "deeper/.variant.json.12345678.draft"])
def test_only_what_writing_the_manifest_leaves_is_no_stranger(folder: Path, name: str) -> None:
    (folder / ".variant.json.12345678.draft").write_text("{")
    open_variant(folder)
    (folder / name).write_text("weights")
    with pytest.raises(ArtifactError, match="not named in variant"):
        open_variant(folder)
