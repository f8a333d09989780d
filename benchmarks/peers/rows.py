"""What the build scripts of all peers share: one folder a row, whole or with the reason why there is none.

Runs in the environment of a peer, so it needs nothing but tokenizers. A row's folder holds `model.onnx` or
`openvino_model.xml` with `.bin`, `tokenizer.json` and `config.json` as the classifier has them, and `row.json`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONFIGURATION = ("config.json", "tokenizer.json", "tokenizer_config.json")
LONGEST_ERROR = 300

Recipe = Callable[[Path], None]


class Job:
    """What a build script was asked: the classifier's folder, texts to calibrate on, where to write.

    Attributes:
        checkpoint: Folder of the classifier, as transformers reads it.
        texts: Texts of the training side.
        out: Folder for the rows.
        work: A folder that is removed in the end.
    """

    def __init__(self, arguments: list[str]) -> None:
        if len(arguments) != 3:
            sys.exit("usage: build_PEER.py TORCH_VARIANT CALIBRATION_JSONL OUT")
        self.checkpoint, self.out = Path(arguments[0]), Path(arguments[2])
        lines = Path(arguments[1]).read_text(encoding="utf-8").splitlines()
        self.texts: list[str] = [json.loads(line)["text"] for line in lines]
        self.work = Path(tempfile.mkdtemp(prefix="peer-", dir=self.out.parent))

    @property
    def config(self) -> dict[str, Any]:
        """The classifier's `config.json`."""
        return json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))

    @property
    def max_tokens(self) -> int:
        """The model's longest input."""
        return json.loads((self.checkpoint / "variant.json").read_text(encoding="utf-8"))["max_tokens"]

    def encoded(self, inputs: Iterable[str]) -> list[dict[str, list[int]]]:
        """The texts tokenized, each truncated to the longest input of the model; the named inputs only."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)
        rows = [
            {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
            for e in tokenizer.encode_batch(self.texts)
        ]
        return [{name: row[name] for name in inputs} for row in rows]

    def write(self, recipes: dict[str, tuple[str, Recipe]], libraries: Iterable[str]) -> None:
        """Makes every row that does not stand yet, then removes the work folder.

        Args:
            recipes: By row name: what it is, in words, and what writes the model into a folder.
            libraries: Packages whose versions are noted.
        """
        versions = {name: found for name in libraries if (found := installed(name))}
        for name, (how, recipe) in recipes.items():
            if not is_whole(self.out / name):
                self._write_row(name, recipe, {"how": how, "versions": versions})
        shutil.rmtree(self.work)

    def _write_row(self, name: str, recipe: Recipe, about: dict[str, Any]) -> None:
        draft, error = self.work / f"row-{name}", None
        draft.mkdir()
        try:
            recipe(draft)
        except Exception as problem:
            traceback.print_exc()
            error = one_line(problem)
        for file in CONFIGURATION:
            if error is None and (self.checkpoint / file).is_file():
                shutil.copyfile(self.checkpoint / file, draft / file)
        (draft / "row.json").write_text(json.dumps(about | {"error": error}, indent=2), encoding="utf-8")
        shutil.rmtree(self.out / name, ignore_errors=True)
        shutil.move(draft, self.out / name)


def is_whole(folder: Path) -> bool:
    """Whether a row stands that was made without an error."""
    path = folder / "row.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["error"] is None


def installed(package: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def one_line(problem: BaseException) -> str:
    """An error in a line: its kind and the first line of its message, with folders taken out of paths."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return without_folders(f"{type(problem).__name__}: {lines[0] if lines else ''}")[:LONGEST_ERROR]


def without_folders(text: str) -> str:
    """A text in which each absolute path of this machine is shortened to its last part; names of nodes stay."""

    def shortened(found: re.Match[str]) -> str:
        top = "/" + found[0].split("/")[1]
        return "" if Path(top).exists() else found[0]

    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", shortened, text)
