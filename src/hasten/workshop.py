"""The folder that a run works in: what stands there whole and was made from the same inputs is used again.

```
OUT/run.json          inputs as resolved
OUT/variants/         one folder a variant, and made.json: the key that each was made for
OUT/measurements/     raw samples
OUT/run-info.json     what the report says beside its measurements
OUT/report.*          JSON, Markdown, HTML
OUT/work/             caches and checkpoints; may be deleted when the run is over
```
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from hasten.errors import ArtifactError, HastenError, MeasurementError, MissingExtraError
from hasten.files import beside, sweep, write_atomically
from hasten.measurement import VERSIONED, Measurement, library_versions, load_measurement, save_measurement
from hasten.variant import MANIFEST, Variant, open_variant

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def make_key(*parts: Any) -> str:
    """Identity (hex) of everything that a step's result depends on, the libraries' versions included."""
    versions = library_versions(VERSIONED)
    return hashlib.sha256(msgspec.json.encode([parts, versions], order="sorted")).hexdigest()


class Workshop:
    """One run's output folder, held by one process at a time."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.variants = out / "variants"
        self.measurements = out / "measurements"
        self.work = out / "work"

    @contextmanager
    def held(self) -> Generator[None]:
        """Creates the folder and locks it against a second run.

        Raises:
            HastenError: The folder cannot be written, or another run holds it.
        """
        try:
            from filelock import FileLock, Timeout
        except ImportError as error:
            raise MissingExtraError("filelock", "optimize") from error
        with ExitStack() as stack:
            try:
                for folder in (self.variants, self.measurements, self.work):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.out / ".lock").acquire(timeout=0))
                self._sweep()
            except Timeout as error:
                raise HastenError(
                    f"{self.out}: another run is writing here; wait for it or choose another --out"
                ) from error
            except OSError as error:
                raise self._unwritable(error) from error
            try:
                yield
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> HastenError:
        return HastenError(f"{self.out}: cannot be written: {error}; choose another --out or make room")

    def _sweep(self) -> None:
        for folder in (self.out, self.variants, self.measurements, self.work, self.work / "shapes"):
            sweep(folder)

    def variant(self, name: str, key: str, build: Callable[[Path], Variant], *, folder: Path | None = None) -> Variant:
        """A variant made for this key: the one that stands there, or a new one.

        Args:
            name: The folder's name.
            key: Identity of the inputs, see `make_key`.
            build: Makes the folder at the path it is given.
            folder: Where; `variants` if None.

        Returns:
            The variant.
        """
        place = folder or self.variants
        made, stands = self._made(place), place / name
        if made.get(name) == key and stands.is_dir():
            with suppress(ArtifactError):  # altered since: make it again
                return open_variant(stands)
        self._withdraw(stands)
        if name in made:
            self.write_json(place / "made.json", {other: made[other] for other in made if other != name})
            if not (stands / MANIFEST).is_file():
                shutil.rmtree(stands, ignore_errors=True)
        variant = build(stands)
        self.write_json(place / "made.json", self._made(place) | {name: key})
        return variant

    def _withdraw(self, folder: Path) -> None:
        """Removes `OUT/chosen` where it names a variant that is about to be another."""
        link = self.out / "chosen"
        if link.is_symlink() and link.resolve() == folder.resolve():
            link.unlink()

    def _made(self, place: Path) -> dict[str, str]:
        path = place / "made.json"
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.is_file() else {}

    def measured(
        self, names: Sequence[str], scenario: str, key: str, measure: Callable[[], list[Measurement]]
    ) -> list[Measurement]:
        """The measurements of one interleaved run: those on disk when all carry its key, or new ones."""
        paths = [self.measurements / f"{name}.{scenario}.json" for name in names]
        try:
            kept = [load_measurement(path) for path in paths]
        except MeasurementError:
            kept = []
        if kept and all(measurement.scenario.key == key for measurement in kept):
            return kept
        fresh = measure()
        for measurement in fresh:
            save_measurement(measurement, self.measurements)
        return fresh

    def cached(self, name: str, key: str, kind: Any, compute: Callable[[], Any]) -> Any:
        """A JSON value of a type, computed once for a key and kept in `work`."""
        path = self.work / f"{name}-{key[:16]}.json"
        if path.is_file():
            return msgspec.json.decode(path.read_bytes(), type=kind)
        value = compute()
        self.write_json(path, value)
        return value

    def write_json(self, path: Path, value: Any) -> None:
        """Writes any dataclass or container as indented JSON, atomically."""
        write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")

    def choose(self, name: str | None) -> None:
        """Points `OUT/chosen` at a variant, or removes it."""
        link = self.out / "chosen"
        if name is None:
            link.unlink(missing_ok=True)
            return
        fresh = beside(link)
        try:
            fresh.symlink_to(os.path.join("variants", name))  # noqa: PTH118 (relative, so that OUT can be moved)
            fresh.replace(link)
        finally:
            fresh.unlink(missing_ok=True)
