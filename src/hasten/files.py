"""Files: hashed, written whole or not at all, and read as a document of a known schema."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from hasten.errors import HastenError

T = TypeVar("T")
LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{8}\.(draft|old)")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def beside(path: Path, kind: Literal["draft", "old"] = "draft") -> Path:
    """A new hidden name beside a path, for what is not finished yet or no longer wanted; `sweep` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def is_left_over(path: Path, of: Path) -> bool:
    """Whether a path is what an interrupted writing of another has left beside it."""
    return path.parent == of.parent and path.name.startswith(f".{of.name}.") and bool(LEFT_OVER.fullmatch(path.name))


def sweep(folder: Path) -> None:
    """Removes what was interrupted while it had a name of `beside`, in a folder that nobody else is writing to."""
    for path in folder.glob(".*"):
        if LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file aside, flushes it to disk and renames it: a file that exists is whole."""
    draft = beside(path)
    try:
        with draft.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_document(path: Path, kind: type[T], schema: str, error: type[HastenError]) -> T:
    """Reads a JSON document and checks its schema.

    Args:
        path: The file.
        kind: The dataclass it holds, with a field `schema`.
        schema: The schema that this hasten reads.
        error: What to raise when the file holds anything else.

    Returns:
        The document.
    """
    try:
        document = msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: {problem}") from problem
    found = getattr(document, "schema", None)
    if found != schema:
        raise error(f"{path}: schema is {found!r}, this hasten reads {schema!r}")
    return document
