"""What the export of each architecture fuses, how close it stays to PyTorch, how much faster it is.

    python benchmarks/architectures.py [--out OUT] [--architecture NAME]... [--requests 200]

Nine of those that hasten takes; CamemBERT is built as RoBERTa. Each model has its architecture's published
configuration, but 6 layers of 384 (heads of 64), a vocabulary of 1,000 and random weights, which change neither the
graph's operators nor its time. Against hasten's fused graph stand eager
PyTorch, and `plain`: the trace of PyTorch's exporter that hasten starts from, run by the same onnxruntime. Parity is
the largest difference of a logit from PyTorch's on padded batches of every size from 1 to 16, with lengths of 1 to 256
tokens mixed in each. Latencies are of texts of an exact length, the tokenizer included, in one interleaved run a
length with equal threads. Ratios are of medians, with a paired bootstrap interval. Nothing else may run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hasten.checkpoint import OFFSET_POSITIONS, import_checkpoint
from hasten.golden import finish
from hasten.intervals import median_ratio
from hasten.measurement import Latency
from hasten.onnx_export import export
from hasten.profiling import ProfileOptions, time_only
from hasten.runtime import Runtime, open_runtime
from hasten.tokenization import Encoding
from hasten.torch_runtime import load_torch_model, quiet_transformers
from hasten.tracing import trace
from hasten.variant import Variant, building, copy_configuration, open_variant
from provenance import HERE, save_result

NAMES = {
    "bert": "BERT", "distilbert": "DistilBERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-R", "electra": "ELECTRA",
    "mpnet": "MPNet", "deberta-v2": "DeBERTa-v3", "modernbert": "ModernBERT", "albert": "ALBERT",
}  # fmt: skip
SIZES = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536,
    "max_position_embeddings": 512, "vocab_size": 1000, "pad_token_id": 0, "num_labels": 2,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 1536},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta": {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "electra": {"embedding_size": 384},
    "mpnet": {"max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, "pooler_hidden_size": 384,
    },
    "modernbert": {"intermediate_size": 576, "max_position_embeddings": 8192, "classifier_pooling": "mean"},
    "albert": {"embedding_size": 128, "hidden_act": "gelu_new"},
}  # fmt: skip
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "time")
LENGTHS_TOKENS = (32, 128)
LARGEST_BATCH, LONGEST_TOKENS = 16, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """One model in the three forms that are compared."""

    torch: Variant
    plain: Variant
    fused: Variant

    @property
    def every(self) -> list[Variant]:
        """All three, in the order of the table."""
        return [self.torch, self.plain, self.fused]


def checkpoint(architecture: str, folder: Path) -> Path:
    """A random classifier with the published configuration at the reduced size, and a tokenizer of single words."""
    config = AutoConfig.for_model(architecture, **(SIZES | PUBLISHED.get(architecture, {})))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.06)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    words = [*SPECIAL, *(f"w{n}" for n in range(SIZES["vocab_size"] - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    longest = config.max_position_embeddings - 2 * (architecture in OFFSET_POSITIONS)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=longest,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def forms(architecture: str, out: Path) -> Forms:
    """The model as PyTorch, as its plain trace, and as hasten exports it."""
    source = import_checkpoint(str(checkpoint(architecture, out / "checkpoint")), out / "torch")
    graph = out / "plain.onnx"
    onnx.save_model(trace(load_torch_model(source, attention="eager")), graph)
    return Forms(
        torch=source, plain=as_variant(source, graph, out / "plain", "fp32"), fused=export(source, out / "hasten")
    )


def as_variant(source: Variant, graph: Path, folder: Path, precision: Any) -> Variant:
    """A graph with the source's configuration and tokenizer."""
    with building(folder) as draft:
        copy_configuration(source, draft)
        (draft / "model.onnx").write_bytes(graph.read_bytes())
        graph.unlink()
        finish(draft, replace(source.manifest, name=folder.name, format="onnx", precision=precision))
    return open_variant(folder)


def text_of(source: Variant, tokens: int) -> str:
    """A text of exactly so many tokens, special ones included."""
    runtime = open_runtime(source)
    words = next(n for n in range(1, 2 * tokens) if len(runtime.encode(["time " * n])[0]) >= tokens)
    return "time " * words


def ratio(ours: Latency, theirs: Latency) -> dict[str, float | None]:
    """Their median over ours: above 1 we are faster."""
    found = median_ratio(theirs.samples_ms, ours.samples_ms)
    return {key: None if value is None else round(value, 3) for key, value in asdict(found).items()}


def mixed_batches() -> list[list[Encoding]]:
    """Batches of every size up to the largest, in which every length stands at least once as far as rows suffice."""
    generator = np.random.default_rng(7)
    rows = LARGEST_BATCH * (LARGEST_BATCH + 1) // 2
    lengths = np.concatenate([[1, LONGEST_TOKENS], generator.permutation(np.arange(2, LONGEST_TOKENS))])[:rows]
    generator.shuffle(lengths)
    sizes = [lengths[n * (n - 1) // 2 :][:n] for n in range(1, LARGEST_BATCH + 1)]
    return [[random_row(generator, int(tokens)) for tokens in size] for size in [[1], *sizes]]


def random_row(generator: np.random.Generator, tokens: int) -> Encoding:
    """A text of random words, as token ids."""
    ids = generator.integers(len(SPECIAL), SIZES["vocab_size"], tokens)
    return Encoding(ids=ids.tolist(), type_ids=[0] * tokens)


def parity(made: Forms, threads: int) -> dict[str, float]:
    """Largest difference from PyTorch's logits, for both graphs, and how far PyTorch's own logits spread."""
    batches = mixed_batches()
    oracle, plain, fused = (logits(open_runtime(v, threads=threads), batches) for v in made.every)
    return {
        "plain_max_logit_difference": float(np.abs(plain - oracle).max()),
        "max_logit_difference": float(np.abs(fused - oracle).max()),
        "label_flips": int((fused.argmax(-1) != oracle.argmax(-1)).sum()),
        "rows": len(oracle),
        "logit_spread": float(np.ptp(oracle, axis=0).max()),
    }


def logits(runtime: Runtime, batches: Sequence[list[Encoding]]) -> Any:
    """Logits of all batches, one after the other; shape [rows, labels]."""
    return np.concatenate([runtime.infer(batch) for batch in batches])


def operators(variant: Variant) -> dict[str, int]:
    """How many nodes of each kind a graph has, the most frequent first."""
    graph = onnx.load(variant.path / "model.onnx").graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def latency(made: Forms, requests: int, options: ProfileOptions) -> list[dict[str, Any]]:
    """Medians and ratios by length, all three forms interleaved."""
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS_TOKENS:
        torch_ms, plain_ms, fused_ms = time_only(made.every, [text_of(made.torch, tokens)] * requests, options)
        rows.append({
            "tokens": tokens,
            "p50_ms": {
                name: round(of.percentile(50).value, 3)
                for name, of in (("torch", torch_ms), ("plain", plain_ms), ("hasten", fused_ms))
            },
            "times_faster_than": {"torch": ratio(fused_ms, torch_ms), "plain": ratio(fused_ms, plain_ms)},
        })  # fmt: skip
    return rows


def measured(architecture: str, out: Path, requests: int) -> dict[str, Any]:
    """Everything about one architecture."""
    options = ProfileOptions()
    made = forms(architecture, out)
    facts = made.fused.manifest.step.facts
    plain, fused = operators(made.plain), operators(made.fused)
    return {
        "architecture": architecture, "name": NAMES[architecture],
        "encoder_parameters": made.torch.manifest.parameters.encoder,
        "fused": facts["fused"], "not_fused": facts["not_fused"],
        "nodes": {"plain": sum(plain.values()), "hasten": sum(fused.values())},
        "operators": {"plain": plain, "hasten": fused},
        "parity": parity(made, options.resolved_threads),
        "latency": latency(made, requests, options),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    heads = ["architecture", "nodes, plain → hasten", "fused operators", "not fused", "largest logit difference"]
    for tokens in LENGTHS_TOKENS:
        heads += [f"{tokens} tokens: PyTorch / plain / hasten, ms", "faster than PyTorch", "faster than plain"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        fused = ", ".join(f"{count} {what}" for what, count in row["fused"].items() if count)
        cells = [row["name"], f"{row['nodes']['plain']} → {row['nodes']['hasten']}", fused]
        cells += [", ".join(row["not_fused"]) or "–", f"{row['parity']['max_logit_difference']:.1e}"]
        for at in row["latency"]:
            cells += [" / ".join(f"{ms:.1f}" for ms in at["p50_ms"].values())]
            cells += [times(at["times_faster_than"][peer]) for peer in ("torch", "plain")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def times(found: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{found['value']:.2f}× ({found['lower']:.2f} to {found['upper']:.2f})"


def main(
    out: Path = Path("architectures"), architecture: Annotated[list[str] | None, typer.Option()] = None,
    requests: int = 200,
) -> None:  # fmt: skip
    """Makes all models, measures, prints and saves."""
    logging.disable(logging.WARNING)
    quiet_transformers()
    rows: list[dict[str, Any]] = []
    for name in architecture or list(NAMES):
        rows.append(measured(name, out / name, requests))
        print({k: v for k, v in rows[-1].items() if k != "operators"}, flush=True)
    threads = ProfileOptions().resolved_threads
    save_result("architectures", {
        "sizes": SIZES, "published": PUBLISHED, "threads": threads, "requests": requests,
        "longest_tokens": LONGEST_TOKENS, "largest_batch": LARGEST_BATCH, "architectures": rows,
    })  # fmt: skip
    (HERE / "results" / "architectures.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
