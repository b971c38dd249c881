"""The documentation names what exists: calls, arguments, options, files, and the order of the floors."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import virtualcell as vc
from virtualcell.models import SE, STConfig
from virtualcell.tl._fit_options import FitOptions, NetworkOptions

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "virtualcell"
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


def check_network(given: dict) -> None:
    """Raise for a name or a value that an ST cannot have."""
    options = NetworkOptions.of(given).options
    STConfig(n_input=4, n_output=4, n_perturbation=4, head=options.get("head", "both"))


# what the dictionaries that a fit takes may hold
OPTIONS: dict[str, Callable[[dict], object]] = {
    "network": check_network,
    "training": FitOptions.from_,
    "se": lambda given: SE.train_options({k: v for k, v in given.items() if k != "gene_embeddings"}),
}


def code_of(page: str) -> Iterator[ast.Module]:
    """Parse the Python blocks of a page, and what its prose writes as `vc.something`."""
    text = (ROOT / page).read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield ast.parse(block)
    for span in re.findall(r"(?<!`)`(vc\.[^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        yield ast.parse(span.replace("\n", " "))


def resolved(node: ast.expr) -> object | None:
    """Follow `vc.tl.fit_state` to the function; `None` for what does not begin with `vc`."""
    if isinstance(node, ast.Name):
        return vc if node.id == "vc" else None
    owner = resolved(node.value) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


def arguments(call: ast.Call, dictionaries: dict[str, ast.Call]) -> dict[str, ast.expr]:
    """Keywords of a call, with those of `**design` where the block says `design = dict(...)`."""
    found = {}
    for keyword in call.keywords:
        if keyword.arg is not None:
            found[keyword.arg] = keyword.value
        elif isinstance(keyword.value, ast.Name) and keyword.value.id in dictionaries:
            found |= arguments(dictionaries[keyword.value.id], {})
    return found


@pytest.mark.parametrize("page", PAGES)
def test_calls_and_their_arguments_exist(page: str) -> None:
    for tree in code_of(page):
        dictionaries = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "dict"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                resolved(node)  # raises for a name that there is not
            if not isinstance(node, ast.Call) or (function := resolved(node.func)) is None:
                continue
            stated, valid = arguments(node, dictionaries), inspect.signature(function).parameters
            unknown = [] if any(p.kind is p.VAR_KEYWORD for p in valid.values()) else sorted(set(stated) - set(valid))
            assert not unknown, f"{page}: {ast.unparse(node.func)} has no {unknown}"
            for name in OPTIONS.keys() & stated.keys():
                if isinstance(stated[name], ast.Dict):
                    OPTIONS[name](ast.literal_eval(stated[name]))  # raises for an option that there is not


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_prose_exist(page: str) -> None:
    for name, literal in re.findall(r"(\w+)=(\{[^`]*\})`", (ROOT / page).read_text()):
        if name in OPTIONS:
            OPTIONS[name](ast.literal_eval(literal))


@pytest.mark.parametrize("page", PAGES)
def test_references_exist(page: str) -> None:
    for name in re.findall(r"\}`~?virtualcell\.([\w.]+)`", (ROOT / page).read_text()):
        found = vc
        for part in name.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_files_exist(page: str) -> None:
    named = re.findall(r"[\w./-]*\w\.(?:py|svg|png|cff)\b", (ROOT / page).read_text())
    assert named
    for name in named:
        assert any((folder / name).exists() for folder in (ROOT, SRC, ROOT / "docs")), f"{page} names {name}"


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    """The script that draws the architecture."""
    spec = importlib.util.spec_from_file_location("architecture_figure", ROOT / "scripts" / "architecture_figure.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_drawing_names_things_where_they_are(drawing: ModuleType) -> None:
    for box in drawing.BOXES.values():
        if box.file.endswith(".py"):
            text = (SRC / box.file).read_text()
            is_there = {"Run": "def fit(", "AnnData": "AnnData"}.get(box.name, f"class {box.name}")
            assert is_there in text, f"{box.file} has no {box.name}"


def test_a_floor_imports_only_floors_below_it(drawing: ModuleType) -> None:
    level = {name: i for i, floor in enumerate(drawing.FLOORS) for name, _ in floor}
    assert set(level) == {path.parent.name for path in SRC.glob("*/__init__.py")}
    for path in SRC.glob("*/*.py"):
        here = path.parent.name
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "virtualcell"):
                continue
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            for there in names:
                if there in level and there != here:
                    assert level[there] < level[here], f"{path.relative_to(SRC)} imports {there}"


def test_networks_are_torch_alone() -> None:
    for path in (SRC / "modules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in names:
                    root = name.split(".")[0]
                    assert root in {"torch", *sys.stdlib_module_names} or name.startswith("virtualcell.modules"), path
