"""The layout of the package: imports run one way, and private modules stay inside their room."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "speechbrain_ext"
# A room may import itself and the rooms on lines above it
ROOMS = [
    {"utils"},
    {"registry", "hparams"},
    {"lobes", "dataio"},
    {"encoders", "convert"},
    {"speech_encoder"},
    {"asr"},
    {"decoders"},
    {"model_folder"},
    {"brains", "training", "inference"},
    {"export", "bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in PACKAGE.rglob("*.py")}


def imports(path):
    """(module of ours, name or None) of every import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] in (PACKAGE.name, "recipes"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (PACKAGE.name, "recipes"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in MODULES else (node.module, alias.name)


def room_of(module):
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = room_of(module_of(path))
    for module, name in imports(path):
        assert not module.startswith("recipes"), "recipes are named in YAML only"
        room = room_of(module)
        assert room in (None, own) or LEVEL[room] < LEVEL[own], f"{own} imports {module}"
        assert name is None or not name.startswith("_") or name == "__version__", f"{name} is private to {module}"
        private = any(part.startswith("_") and part != "__main__" for part in module.split("."))
        assert room == own or not private, f"{module} is private to {room}"


def test_no_circle():
    graph = {module_of(path): {module for module, _ in imports(path)} - {module_of(path)} for path in FILES}
    for module, names in graph.items():  # a package's __init__ runs for each of its modules
        graph[module] = {name for name in names if name in MODULES}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_train_py_is_short_and_nothing_in_the_package_names_a_corpus():
    assert len((ROOT / "train.py").read_text().splitlines()) < 70
    for path in FILES:
        code = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(code):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        names = ("prepare_librispeech", "train-clean", "openslr", "train-mini")
        assert not [name for name in names if name in ast.unparse(code)], path
