"""Files: hashed, written whole or not at all, and read as a document of a known schema."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import TypeVar

import msgspec

from hasten.errors import HastenError

T = TypeVar("T")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file aside, flushes it to disk and renames it: a file that exists is whole."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.draft")
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
