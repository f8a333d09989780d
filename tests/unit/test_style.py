"""What the source promises about itself: sizes, absences, quick start, one place for every default."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from hasten.budget import Budget
from hasten.load import LoadOptions
from hasten.pipeline import Inputs, OptimizeOptions
from hasten.profiling import ProfileOptions
from hasten.quantization import QuantizeOptions
from hasten.serve_options import ServeOptions
from hasten.teaching import DistillOptions
from hasten.torch_training import TrainOptions
from hasten.transfer import TransferOptions

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "hasten").rglob("*.py"))
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "datasets",
    "plotly",
    "safetensors",
    "sympy",
    "jinja2",
    "ray",
    "accelerate",
    "openvino",
    "nncf",
    "sklearn",
    "rapidfuzz",
    "hdrh",
}
NOT_AT_START = {
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "scipy",
    "datasets",
    "plotly",
    "tokenizers",
    "tokie",
    "openvino",
}
ROOMS = {
    "onnx_fusion",
    "packing",
    "integer_products",
    "reshapes",
    "sensitivity",
    "graph_values",
}  # all about a heavy library; only functions import them
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MACHINE_PATH = re.compile(r"(?<![\w./<~$}-])/(?:home|root|Users|work|mnt)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".jinja", ".sh", ".cfg", ""}
OPTIONS: dict[str, tuple[type, ...]] = {
    "optimize": (Budget, Inputs, OptimizeOptions, ProfileOptions, DistillOptions, TransferOptions, TrainOptions),
    "profile": (ProfileOptions, Inputs),
    "quantize": (QuantizeOptions, Inputs),
    "distill": (OptimizeOptions, DistillOptions, TransferOptions, TrainOptions, ProfileOptions, Inputs),
    "students": (Budget, ProfileOptions, Inputs),
    "serve": (ServeOptions,),
    "bench": (LoadOptions,),
    "demo": (Budget, ProfileOptions),
}
OF_THE_RUN = {"threads"}  # a step's own default is one thread; a verb gives it the cores at hand
DEMONSTRATION = {("demo", "speedup")}  # a budget of its own


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named_modules(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names that import statements mention, `a.b` and `a.b.c` for `from a.b import c`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: not in functions, not under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_module_level(child)


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_fits_in_the_head(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400
    sizes = {function.name: body_lines(function) for function in functions(tree(path))}
    assert {name: size for name, size in sizes.items() if size >= 40} == {}


def test_most_functions_are_short() -> None:
    sizes = [body_lines(function) for path in SOURCES for function in functions(tree(path))]
    assert len(sizes) > 100
    assert median(sizes) < 15


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_library_code_never_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_pickled_and_nothing_heavy_loads_with_a_module(path: Path) -> None:
    module = tree(path)
    anywhere = {name.partition(".")[0] for name in named_modules(ast.walk(module))}
    at_once = {name.partition(".")[0] for name in named_modules(at_module_level(module))}
    assert not anywhere & PICKLES
    if path.stem not in ROOMS:
        assert not at_once & HEAVY
        assert not {f"hasten.{room}" for room in ROOMS} & set(named_modules(at_module_level(module)))
    assert not [n.lineno for n in ast.walk(module) if isinstance(n, ast.keyword) and n.arg == "allow_pickle"]


def test_code_of_a_checkpoint_is_never_trusted() -> None:
    given = [
        (path.name, node.value)
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    ]
    assert given
    assert all(isinstance(value, ast.Constant) and value.value is False for _, value in given)


def reachable(start: str) -> set[str]:
    """hasten's modules that a module imports, directly or through others, at any level."""
    known = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path for path in SOURCES}
    found, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        mentioned = {other for other in named_modules(ast.walk(tree(known[name]))) if other in known}
        waiting += mentioned - found
        found |= mentioned
    return found


@pytest.mark.parametrize("name", [path.stem for path in SOURCES if path.stem.startswith("report")])
def test_a_report_never_measures(name: str) -> None:
    measuring = {"profiling", "profiling_worker", "runtime", "torch_runtime", "breakdown", "pipeline"}
    assert not {module.rpartition(".")[2] for module in reachable(f"hasten.{name}")} & measuring


def test_what_serves_needs_no_step() -> None:
    steps = {"onnx_export", "quantization", "students", "distillation", "profiling", "torch_training", "checkpoint"}
    assert not {module.rpartition(".")[2] for module in reachable("hasten.processes")} & steps


@pytest.mark.parametrize("module", ["hasten.cli", "hasten.errors", "hasten.budget", "hasten.pipeline"])
def test_an_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({NOT_AT_START!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def commands() -> dict[str, Any]:
    import typer.main

    from hasten.cli import app

    return typer.main.get_command(app).commands


def defaults(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_has_no_defaults_of_its_own(name: str) -> None:
    given = {parameter.name: parameter.default for parameter in commands()[name].params if not parameter.required}
    owners = {
        option: [defaults(kind)[option] for kind in OPTIONS[name] if option in defaults(kind)]
        for option in given
        if (name, option) not in DEMONSTRATION
    }
    drifted = {
        option: (given[option], wanted)
        for option, wanted in owners.items()
        if wanted and (given[option] not in wanted if option in OF_THE_RUN else set(wanted) != {given[option]})
    }
    assert drifted == {}
    assert [option for option, wanted in owners.items() if wanted]


def test_every_default_of_the_command_line_has_an_owner() -> None:
    orphans = {
        (name, parameter.name)
        for name, command in commands().items()
        for parameter in command.params
        if not parameter.required
        and parameter.default not in (None, False)
        and not any(parameter.name in defaults(kind) for kind in OPTIONS.get(name, ()))
    }
    assert orphans <= {("demo", "out"), ("export", "runtime"), ("quantize", "precision")}


def test_every_verb_has_a_line_of_help() -> None:
    for name, command in commands().items():
        assert command.get_short_help_str(200).endswith("."), name
        assert not [p.name for p in command.params if not p.help and p.name != "help"], name


def tracked() -> list[Path]:
    """Every text file of the tree that is not built."""
    folders = ("src", "tests", "benchmarks", "docs", "deploy", ".ci", ".github")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files = [*(path for path in ROOT.iterdir() if not path.name.startswith(".git")), *inside]
    return [p for p in files if p.is_file() and p.suffix in TEXT_SUFFIXES and "__pycache__" not in p.parts]


def test_the_tree_names_no_path_of_a_machine() -> None:
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in tracked()
        if (match := MACHINE_PATH.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
    assert MACHINE_PATH.search("in " + "/home" + "/someone")
