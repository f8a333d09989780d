"""A run's folder: what it keeps, what it withdraws, what it says of a full disk."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from test_variant import WHOLE, make

from hasten.errors import HastenError
from hasten.variant import Variant
from hasten.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    shop = Workshop(tmp_path / "out")
    with shop.held():
        shop.variant("torch-fp32", "a key", make)
        shop.variant("onnx-fp32", "a key", onnx)
        shop.choose("onnx-fp32")
    return shop


def onnx(out: Path) -> Variant:
    return make(out, replace(WHOLE, name="onnx-fp32"))


def failing(out: Path) -> Variant:
    raise HastenError(f"{out} cannot be made")


def test_what_was_made_for_the_same_key_is_chosen_still(shop: Workshop) -> None:
    shop.variant("onnx-fp32", "a key", failing)
    shop.variant("torch-fp32", "another key", make)
    assert (shop.out / "chosen").resolve() == shop.variants.resolve() / "onnx-fp32"


def test_what_is_about_to_be_another_is_chosen_no_more(shop: Workshop) -> None:
    with pytest.raises(HastenError, match="onnx-fp32 cannot be made"):
        shop.variant("onnx-fp32", "another key", failing)
    assert not (shop.out / "chosen").is_symlink()


def test_a_full_disk_is_named_with_the_folder(shop: Workshop) -> None:
    with pytest.raises(HastenError, match=r"out: cannot be written: .*No space left"), shop.held():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_another_fault_of_the_system_is_not_taken_for_a_full_disk(shop: Workshop) -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"), shop.held():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
