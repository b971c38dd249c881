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

import matplotlib.pyplot as plt
import pytest

import virtualcell as vc
from virtualcell.models import SE, STConfig
from virtualcell.tl._fit_options import FitOptions, NetworkOptions

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "virtualcell"
FOLDERS = (ROOT / "docs", ROOT / "docs" / "howto")
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [str(page.relative_to(ROOT)) for folder in FOLDERS for page in sorted(folder.glob("*.md"))]


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
    for block in re.findall(r"^```(?:python|\{code-cell\} python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield ast.parse(re.sub(r"^:tags:.*\n", "", block))
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


def script(name: str) -> ModuleType:
    """Import a script."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    """The script that draws the architecture."""
    return script("architecture_figure")


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


def sentences_of_source() -> list[str]:
    """Return all strings of the package, with an ellipsis where a value is put in."""
    found = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
    return found


def test_quoted_errors_exist() -> None:
    quoted = re.findall(r"^```text\n(.*?)\n```", (ROOT / "docs" / "faq.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(quoted) >= 15
    there = sentences_of_source()
    for quote in quoted:
        for piece in filter(None, (piece.strip() for piece in quote.split("..."))):
            assert any(piece in sentence for sentence in there), f"docs/faq.md quotes {piece!r}, which no error says"


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="#here"></a><a href="sub/b.html#there"></a><a href="https://x.org/#y"></a>'
        '<img src="no.png"><a href="sub/b.html#nowhere"></a><a href="c%20d.html"></a>'
    )
    (tmp_path / "sub" / "b.html").write_text('<a id="there" href="../a.html">up</a><a href="b.html?q=1#gone"></a>')
    (tmp_path / "c d.html").write_text("")
    assert script("check_links").broken_links(tmp_path) == [
        ("a.html", "no.png"),
        ("a.html", "sub/b.html#nowhere"),
        ("sub/b.html", "b.html?q=1#gone"),
    ]


def test_the_concepts_have_their_drawings() -> None:
    figures = script("concept_figures").FIGURES
    text = (ROOT / "docs" / "concepts.md").read_text()
    assert re.findall(r"_static/(concept_\w+)\.svg", text) == list(figures)
    for name, draw in figures.items():
        assert (ROOT / "docs" / "_static" / f"{name}.svg").exists()
        ax = draw()
        box = ax.get_window_extent()
        for label in ax.texts:  # nothing is cut off
            assert box.contains(*label.get_window_extent().p0), f"{name}: {label.get_text()!r}"
            assert box.contains(*label.get_window_extent().p1), f"{name}: {label.get_text()!r}"
        plt.close(ax.figure)
