"""No module of the package imports one that imports it, in functions and for types included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"clusterns": "clusterns", "kernels": "clusterns.kernels"}


def modules(root: Path) -> dict[str, Path]:
    """Path of every module by its full name; of a package that of its __init__."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a module names in an import statement, wherever that stands."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    # What a package's __init__ offers is imported from where it stands when it is first asked for.
    return (found & known) - {name, "clusterns"}


def graph(root: Path) -> dict[str, set[str]]:
    paths = modules(root)
    return {name: imports(name, path, set(paths)) for name, path in paths.items()}


def test_no_circle_of_imports():
    found = graph(ROOT)
    assert len(found) > 80
    assert sum(map(len, found.values())) > 250
    list(TopologicalSorter(found).static_order())


def test_the_objective_is_imported_in_the_order_of_reading():
    rooms = "rules reference objective.norms objective.problem objective.ranks objective.torch_products "
    rooms = (rooms + "objective.sweep captured objective.operators functional centroids loss cached").split()
    found = graph(ROOT)
    for place, room in enumerate(rooms):
        later = {f"clusterns.{each}" for each in rooms[place:]}
        assert not found[f"clusterns.{room}"] & later, room


def test_a_circle_would_be_found(tmp_path):
    (tmp_path / "clusterns").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "clusterns" / "a.py").write_text("def f():\n    from . import b\n", encoding="utf-8")
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from clusterns.a import f\n"
    (tmp_path / "clusterns" / "b.py").write_text(types, encoding="utf-8")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph(tmp_path)).static_order())
