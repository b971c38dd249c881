"""Tutorials are notebooks with the outputs of their own code, and call what exists; `make tutorials` runs them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import virtualcell as vc

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("[0-9]*.ipynb"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tutorials() -> ModuleType:
    """The script that runs them."""
    pytest.importorskip("nbclient")
    return script("tutorials")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_there_are_tutorials() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 10


def test_outputs_are_those_of_the_code(tutorials, notebook) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata["code_that_ran"] == tutorials.code_of(notebook)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr" and "Traceback" in output.text]
    assert all(cell.execution_count for cell in code(notebook))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"(/home|/tmp|/root|/Users|/work)/", nbformat.writes(notebook)), "a path of one machine"


def test_it_begins_with_a_title_and_says_what_not_to_believe(notebook) -> None:
    assert notebook.cells[0].cell_type == "markdown"
    assert re.match(r"# \S", notebook.cells[0].source)
    assert "## What not to believe" in prose(notebook)
    assert len(re.findall(r"^# ", prose(notebook), flags=re.MULTILINE)) == 1


def test_every_picture_is_explained(notebook) -> None:
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type == "code" and any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert after is not None
            assert after.cell_type == "markdown"
            assert not after.source.startswith("#")


def test_links_between_tutorials_lead_somewhere(notebook) -> None:
    for target in re.findall(r"\]\(([^)#:]+\.\w+)\)", prose(notebook)):
        assert (ROOT / "tutorials" / target).exists(), target


def owner_of(node: ast.expr) -> object | None:
    """Follow `vc.tl.fit_state` to the function; `None` for what does not begin with `vc`."""
    if isinstance(node, ast.Name):
        return vc if node.id == "vc" else None
    owner = owner_of(node.value) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)  # raises for a name that there is not


def test_calls_and_their_arguments_exist(notebook) -> None:
    in_prose = re.findall(r"^```python\n(.*?)^```", prose(notebook), flags=re.MULTILINE | re.DOTALL)
    called = set()
    for source in [*(cell.source for cell in code(notebook)), *in_prose]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                owner_of(node)
            if not isinstance(node, ast.Call) or (function := owner_of(node.func)) is None:
                continue
            called.add(ast.unparse(node.func))
            valid = inspect.signature(function).parameters
            named = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            if not any(p.kind is p.VAR_KEYWORD for p in valid.values()):
                assert named <= set(valid), f"{ast.unparse(node.func)} has no {sorted(named - set(valid))}"
    assert len(called) >= 4
    for name in re.findall(r"(?<!`)`(vc\.[\w.]+)`", prose(notebook)):
        owner_of(ast.parse(name, mode="eval").body)


@pytest.mark.parametrize("page", ["docs/tutorials.md", "tutorials/README.md"])
def test_every_tutorial_is_listed(page: str) -> None:
    text = (ROOT / page).read_text()
    assert re.findall(r"\((?:notebooks/)?(\d\d_\w+\.ipynb)\)", text) == [path.name for path in NOTEBOOKS]


def test_the_site_has_the_notebooks() -> None:
    listed = re.findall(r"^notebooks/(\w+)$", (ROOT / "docs" / "tutorials.md").read_text(), flags=re.MULTILINE)
    assert listed == [path.stem for path in NOTEBOOKS]


def test_stale_outputs_are_found_and_figures_may_differ(tutorials, tmp_path: Path) -> None:
    def stored(source: str, text: str) -> nbformat.NotebookNode:
        cell = nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])
        notebook = nbformat.v4.new_notebook(cells=[cell])
        notebook.metadata["code_that_ran"] = tutorials.code_of(notebook)
        return notebook

    verdict = "On new contexts ST is {} the best baseline{}: {} in MAE, 0.{} against 0.2 of {} (+-0.1 over folds)."
    better = verdict.format("better than", "", "better", 1, "Additive")
    path = tmp_path / "01.ipynb"
    nbformat.write(stored("f()", better), path)
    for now in (
        verdict.format("worse than", "", "worse", 311, "NoChange")
        + ' `predict_perturbation(..., fallback="best")` uses the baseline.',
        verdict.format("level with", ", a tie", "level", 2, "Additive"),
        verdict.format("neither better nor worse than", "", "better", "1e-3", "Additive"),
    ):
        assert tutorials.stale(path, stored("f()", now)) is None
    assert "perturbations" in tutorials.stale(path, stored("f()", better.replace("contexts", "perturbations")))
    changed = nbformat.read(path, as_version=4)
    changed.cells[0].source = "g()"
    nbformat.write(changed, path)
    assert "changed after it ran" in tutorials.stale(path, stored("g()", better))
