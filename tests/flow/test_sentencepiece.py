"""Checkpoints whose tokenizer is a SentencePiece model and no `tokenizer.json`, as older ones have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.checkpoint import import_checkpoint
from hasten.tokenization import TextEncoder

TEXTS = [f"the film number {number} was {word} and long" for number in range(200) for word in ("good", "bad", "dull")]
SHAPE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "num_labels": 2, "max_position_embeddings": 64,
}  # fmt: skip
ALBERT_PIECES: dict[str, Any] = {
    "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": ["[CLS]", "[SEP]"], "pad_piece": "<pad>",
    "user_defined_symbols": ["[MASK]"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "file", "pieces", "shift"),
    [("Albert", "spiece", ALBERT_PIECES, 0), ("XLMRoberta", "sentencepiece.bpe", {}, 1)],
)
def test_pieces_are_those_of_sentencepiece(
    architecture: str, file: str, pieces: dict[str, Any], shift: int, tmp_path: Path
) -> None:
    import sentencepiece
    import transformers

    folder = tmp_path / "checkpoint"
    config = getattr(transformers, f"{architecture}Config")(**SHAPE)
    getattr(transformers, f"{architecture}ForSequenceClassification")(config).save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / file), vocab_size=120, hard_vocab_limit=False,
        minloglevel=2, **pieces,
    )  # fmt: skip
    settings = {"model_max_length": 60, "tokenizer_class": f"{architecture}Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    imported = import_checkpoint(str(folder), tmp_path / "imported")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{file}.model"))
    for text, encoding in zip(TEXTS[::97], TextEncoder(imported)(TEXTS[::97]), strict=True):
        assert list(encoding.ids[1:-1]) == [piece + shift for piece in oracle.encode(text)]
