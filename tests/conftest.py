"""Tiny real models, built in process: no downloads, no network."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings

# A machine that stalls fails no test, and a failure is the same on every machine.
settings.register_profile("hasten", deadline=None, derandomize=True, database=None)
settings.load_profile("hasten")

WORDS = {
    "good": ("great", "lovely", "superb", "warm", "brilliant", "kind", "fresh", "happy"),
    "bad": ("awful", "dull", "broken", "cold", "stale", "rude", "sad", "late"),
    "mixed": ("okay", "average", "fair", "usual", "plain", "medium", "normal", "standard"),
}
FILLER = ("the", "food", "was", "and", "room", "staff", "it", "a", "film", "story", "then", "we", "had", "some", "very")
LABELS = tuple(WORDS)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Result(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Hasten = Callable[..., Result]


@pytest.fixture
def hasten(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Hasten:
    """Runs the command line as its entry point does, in this process."""
    from hasten.cli import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hasten", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        output = capfd.readouterr()
        return Result(int(ended.value.code or 0), output.out, output.err)

    return run


def sentence(generator: np.random.Generator, label: int) -> str:
    """A sentence of 3 to 24 words, most of whose coloured words are of one label."""
    own, other = WORDS[LABELS[label]], WORDS[LABELS[generator.integers(3)]]
    size = int(generator.integers(2, 20))
    words = [*generator.choice(FILLER, size), *generator.choice(own, 3), *generator.choice(other, 1)]
    generator.shuffle(words)
    return " ".join(words)


def labelled_rows(rows: int, seed: int) -> list[tuple[str, str]]:
    """Distinct sentences with label names."""
    generator = np.random.default_rng(seed)
    made: dict[str, str] = {}
    while len(made) < rows:
        label = int(generator.integers(3))
        made.setdefault(sentence(generator, label), LABELS[label])
    return list(made.items())


def write_csv(path: Path, rows: list[tuple[str, str]]) -> str:
    """Writes text,label rows and returns the path as text."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    return str(path)


def make_tokenizer(folder: Path, pad: str = "[PAD]"):
    """A word-level fast tokenizer over the vocabulary above, with single letters as a last resort."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *FILLER, *(word for group in WORDS.values() for word in group)]
    words += [*"abcdefghijklmnopqrstuvwxyz0123456789.,", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789")]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token=pad,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    return fast


def tiny_config(architecture: str, vocab_size: int, labels: tuple[str, ...] = LABELS):
    """A configuration of a tiny classifier: 2 layers of 32, 4 heads."""
    from transformers import AutoConfig

    common = {
        "vocab_size": vocab_size,
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": 0,
    }
    if architecture == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 66}
    else:
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 66,
        }
    extra = {
        "electra": {"embedding_size": 16},
        "albert": {"embedding_size": 16},
        "modernbert": {"local_attention": 16, "classifier_pooling": "mean"},
        "deberta-v2": {
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": -1,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": 32,
        },
    }.get(architecture, {})
    return AutoConfig.for_model(architecture, **common, **sizes, **extra)


def make_checkpoint(folder: Path, architecture: str = "bert", seed: int = 0) -> Path:
    """A random classifier in the Hugging Face layout, its logits spread so that labels differ between texts."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_config(tiny_config(architecture, len(tokenizer)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes, once a session, a random tiny classifier of an architecture."""
    made: dict[str, Path] = {}

    def make(architecture: str = "bert") -> Path:
        if architecture not in made:
            made[architecture] = make_checkpoint(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a training and a test file for the tiny task."""
    folder = tmp_path_factory.mktemp("data")
    rows = labelled_rows(1200, seed=1)
    return {"train": write_csv(folder / "train.csv", rows[:900]), "test": write_csv(folder / "test.csv", rows[900:])}


@pytest.fixture(scope="session", autouse=True)
def priorities() -> Generator[None]:
    """Servers in process do not yield to the tests that run beside them, which would keep them waiting."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hasten.served.YIELDING", 0)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A tiny BERT of 4 layers of 64, trained on the tiny task until it is nearly always right."""
    return make_trained(tmp_path_factory.mktemp("trained"), data["train"])


def make_trained(folder: Path, train: str) -> Path:
    """Trains the tiny BERT with hasten's own loop and returns its folder."""
    import torch
    from transformers import BertForSequenceClassification

    from hasten.checkpoint import import_checkpoint
    from hasten.distillation import distill
    from hasten.teaching import DistillOptions, Lesson
    from hasten.torch_training import TrainOptions
    from hasten.workload import read_workload

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "raw")
    config = tiny_config("bert", len(tokenizer))
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 4, 64, 128
    BertForSequenceClassification(config).save_pretrained(folder / "raw")
    start = import_checkpoint(str(folder / "raw"), folder / "start", name="start")
    workload = read_workload(train, name="train", labels=LABELS)
    options = DistillOptions(train=TrainOptions(epochs=12, learning_rate=1e-3))
    lesson = Lesson(data=workload, teacher=None)
    distill(start, folder / "model", options, name="model", lesson=lesson, work=folder / "work")
    return folder / "model"
