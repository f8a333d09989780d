"""The benchmark scripts still fit the code that they measure: they run for hours, and seldom."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_a_script_imports_exists(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = node.module or ""
        for name in (alias.name for alias in node.names):
            if module.startswith("hasten"):
                assert hasattr(import_module(module), name) or import_module(f"{module}.{name}")
            elif (FOLDER / f"{module.replace('.', '/')}.py").exists():
                assert f"{name}" in (FOLDER / f"{module.replace('.', '/')}.py").read_text()


def test_every_module_beside_the_scripts_that_is_imported_exists() -> None:
    third_party = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and "." not in node.module:
                third_party.add(node.module)
    for module in sorted(third_party):
        assert (FOLDER / f"{module}.py").exists() or (FOLDER / module).is_dir() or import_module(module)
