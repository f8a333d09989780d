"""The benchmark scripts still fit the code that they measure: they run for hours, and seldom."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def names_in(path: Path) -> set[str]:
    """What a script defines or imports at its top level."""
    found = set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_a_script_imports_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        beside, names = FOLDER / f"{node.module.replace('.', '/')}.py", {alias.name for alias in node.names}
        if beside.exists():
            assert names <= names_in(beside)
        elif (FOLDER / node.module).is_dir():
            assert all((FOLDER / node.module / f"{name}.py").exists() for name in names)
        else:
            module = import_module(node.module)
            assert all(hasattr(module, name) or import_module(f"{node.module}.{name}") for name in names)
