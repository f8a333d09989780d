"""What the verbs of single steps are given: variants, checkpoints, texts."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.checkpoint import import_checkpoint
from hasten.pipeline import BASELINE
from hasten.variant import PLAIN_NAME

if TYPE_CHECKING:
    from hasten.variant import Variant
    from hasten.workload import Workload


def labelled(data: str, name: str, variant: Variant, text_column: str | None, label_column: str | None) -> Workload:
    """Reads labelled texts for a variant.

    Args:
        data: Where they are.
        name: What to call them.
        variant: Whose labels they have.
        text_column: Column of the texts; None guesses.
        label_column: Column of the labels; None guesses.

    Returns:
        The texts and their label ids.
    """
    from hasten.workload import read_workload

    return read_workload(data, name=name, labels=variant.labels, text_column=text_column, label_column=label_column)


def _name_of(checkpoint: str) -> str:
    """What a checkpoint is called while it is measured: as its folder, where that can be a variant's name."""
    name = Path(checkpoint).name
    return name if PLAIN_NAME.fullmatch(name) else BASELINE


@contextmanager
def variants_of(sources: list[str]) -> Generator[list[Variant]]:
    """Opens variant folders; a checkpoint that is none yet is imported into a folder that goes away again.

    Args:
        sources: Folders, or hub ids.

    Yields:
        A variant for each.
    """
    from hasten.variant import MANIFEST, open_variant

    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        yield [
            open_variant(source) if (Path(source) / MANIFEST).is_file()
            else import_checkpoint(source, Path(folder) / str(number), name=_name_of(source))
            for number, source in enumerate(sources)
        ]  # fmt: skip
