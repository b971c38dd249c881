from __future__ import annotations

import argparse
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch

import virtualcell as vc
from virtualcell import _files, cli

DOCS = Path(__file__).parents[1] / "docs"
DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
KEYS = ["--perturbation-key", "target_gene", "--control", "non-targeting", "--context-key", "cell_type"]
TINY = ["--network", "n_hidden=32", "n_feedforward=64", "n_layers=1", "set_size=16", "n_networks=1"]
QUICK = ["--training", "max_steps=5", "validate_every=50", "accelerator=cpu"]
CALLS = {
    "fit": vc.tl.fit_state,
    "predict": vc.tl.predict_perturbation,
    "screen": vc.tl.screen,
    "embed": vc.tl.embed,
    "evaluate": vc.tl.evaluate,
    "gene-embeddings": vc.pp.gene_embeddings,
    "datasets": vc.datasets.load,
}
OWN = {"run", "debug", "overwrite", "output", "help"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen, real cells of it to score against, and what `fit` made of it with an SE."""
    folder = tmp_path_factory.mktemp("cli")
    adata = vc.datasets.synthetic(
        n_contexts=2, n_perturbations=4, n_genes=80, n_cells_per_group=15, n_control_cells=30, effect_size=0.5, seed=1
    )
    vc.pp.split(adata, **DESIGN, holdout={"contexts": ["type_2"]})
    adata.write_h5ad(folder / "screen.h5ad")
    fit = ["fit", str(folder / "screen.h5ad"), *KEYS, "--split-key", "split", *TINY, *QUICK]
    fit += ["--se", "max_steps=5", "--no-validate", "--size", "small"]
    assert cli.main([*fit, "--model", str(folder / "model"), "--output", str(folder / "fitted.h5ad")]) == 0
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> str:
    return sorted(set(ad.read_h5ad(folder / "screen.h5ad").obs["target_gene"]) - {"non-targeting"})[0]


def actions(name: str) -> set[str]:
    """Names under which the options of a command reach its function."""
    commands = next(a for a in cli.parser()._actions if a.choices)
    return {action.dest for action in commands.choices[name]._actions}


@pytest.mark.parametrize("name", CALLS)
def test_options_are_arguments_of_the_function(name: str) -> None:
    ours = {
        "fit": {"data", "model"},
        "predict": {"data"},
        "screen": {"data", "up", "down"},
        "embed": {"data"},
        "evaluate": {"predicted_genes"},
    }
    valid = set(inspect.signature(CALLS[name]).parameters)
    assert actions(name) - OWN - ours.get(name, set()) <= valid
    assert set(CALLS) == set(cli.COMMANDS)


def test_fit_does_as_the_function(folder: Path) -> None:
    adata = ad.read_h5ad(folder / "screen.h5ad")
    st = vc.tl.fit_state(
        adata,
        **DESIGN,
        split_key="split",
        network={"n_hidden": 32, "n_feedforward": 64, "n_layers": 1, "set_size": 16, "n_networks": 1},
        training={"max_steps": 5, "validate_every": 50, "accelerator": "cpu"},
        se={"max_steps": 5},
        validate=False,
        size="small",
    )
    by_command = vc.io.load(folder / "model", accelerator="cpu")
    ours, theirs = st.module.state_dict(), by_command.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name].numpy(), theirs[name].numpy()) for name in ours)
    fitted = ad.read_h5ad(folder / "fitted.h5ad")
    np.testing.assert_array_equal(fitted.obsm["X_state"], adata.obsm["X_state"])
    assert fitted.uns["virtualcell"]["design"] == adata.uns["virtualcell"]["design"]


def test_predict_does_as_the_function(folder: Path, target: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "predicted.h5ad"
    same = ["--perturbation", target, "--context", "type_2", "--n-cells", "12", "--seed", "3", "--output", str(out)]
    assert cli.main(["predict", str(folder / "screen.h5ad"), *same, "--model", str(folder / "model")]) == 0
    predicted = ad.read_h5ad(out)
    adata, model = ad.read_h5ad(folder / "screen.h5ad"), vc.io.load(folder / "model")
    expected = vc.tl.predict_perturbation(adata, target, context="type_2", model=model, n_cells=12, seed=3)
    assert (predicted.X != expected.X).nnz == 0
    pd.testing.assert_frame_equal(predicted.obs, expected.obs, check_dtype=False, check_categorical=False)
    # with the model in the data the same cells come out
    assert cli.main(["predict", str(folder / "fitted.h5ad"), *same, "--overwrite"]) == 0
    assert (ad.read_h5ad(out).X != expected.X).nnz == 0


def test_screen_does_as_the_function(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    genes = ad.read_h5ad(folder / "fitted.h5ad").var_names[:3].tolist()
    command = ["screen", str(folder / "fitted.h5ad"), "--context", "type_1", "--objective", "toward"]
    command += ["--up", *genes[:2], "--down", genes[2], "--output", str(tmp_path / "ranked.csv")]
    assert cli.main(command) == 0
    toward = {"objective": "toward", "target": {"up": genes[:2], "down": genes[2:]}}
    expected = vc.tl.screen(ad.read_h5ad(folder / "fitted.h5ad"), context="type_1", progress_bar=False, **toward)
    written = pd.read_csv(tmp_path / "ranked.csv", index_col="perturbation")
    assert written.index.tolist() == expected.index.tolist()
    np.testing.assert_allclose(written["score"], expected["score"].astype(float), rtol=1e-6)
    assert expected.index[0] in capsys.readouterr().out
    assert cli.main([*command, "--target", "type_2", "--overwrite"]) == 2
    assert "leave one of them out" in one_sentence(capsys)


def test_embed_does_as_the_function(folder: Path, tmp_path: Path) -> None:
    rna = ad.read_h5ad(folder / "screen.h5ad")
    del rna.uns["virtualcell"]
    md.MuData({"rna": rna}).write_h5mu(tmp_path / "cells.h5mu")
    command = ["embed", str(tmp_path / "cells.h5mu"), "--model", str(folder / "model"), "--key-added", "X_new"]
    assert cli.main([*command, "--output", str(tmp_path / "out.h5mu")]) == 0
    written = md.read_h5mu(tmp_path / "out.h5mu")
    expected = ad.read_h5ad(folder / "fitted.h5ad").obsm["X_state"]
    np.testing.assert_allclose(written["rna"].obsm["X_new"], expected, rtol=1e-5, atol=1e-6)


def test_evaluate_does_as_the_function(
    folder: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    predicted = vc.tl.predict_perturbation(ad.read_h5ad(folder / "fitted.h5ad"), target, context="type_1")
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    files = [str(tmp_path / "predicted.h5ad"), str(folder / "fitted.h5ad")]
    command = ["evaluate", *files, "--predicted-genes", "--suite", "mae,pearson_delta", "--ceiling"]
    assert cli.main([*command, "--output", str(tmp_path / "scores.csv")]) == 0
    observed = ad.read_h5ad(folder / "fitted.h5ad")
    expected = vc.tl.evaluate(
        predicted, observed, genes=predicted.var_names, suite=["mae", "pearson_delta"], ceiling=True
    )
    written = pd.read_csv(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(written, expected.reset_index(drop=True), check_dtype=False)
    shown = capsys.readouterr().out
    assert f"{vc.tl.summarize(expected)['value'].iloc[0]:.6f}" in shown


def test_gene_embeddings_do_as_the_function(tmp_path: Path) -> None:
    esm = pytest.importorskip("esm")
    torch.manual_seed(0)
    network = esm.model.esm2.ESM2(num_layers=1, embed_dim=12, attention_heads=3)
    names = {
        f"encoder.{'' if n.startswith('lm_head') else 'sentence_encoder.'}{n}": p
        for n, p in network.state_dict().items()
        if not n.startswith("contact_head")
    }
    sizes = argparse.Namespace(encoder_layers=1, encoder_embed_dim=12, encoder_attention_heads=3, token_dropout=True)
    torch.save({"cfg": {"model": sizes}, "model": names}, tmp_path / "esm2_tiny.pt")
    (tmp_path / "proteins.fa").write_text(">a GN=STAT1\nMSQWYELQQLDSK\n>b GN=JAK2\nMGMACLTMTEMEG\n")
    command = ["gene-embeddings", str(tmp_path / "proteins.fa"), "--model", str(tmp_path / "esm2_tiny.pt")]
    assert cli.main([*command, "--device", "cpu", "--output", str(tmp_path / "table.parquet")]) == 0
    expected = vc.pp.gene_embeddings(tmp_path / "proteins.fa", model=tmp_path / "esm2_tiny.pt", device="cpu")
    pd.testing.assert_frame_equal(vc.pp.read_gene_embeddings(tmp_path / "table.parquet"), expected, check_like=True)


def test_datasets_are_listed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["datasets"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(vc.datasets.available().index) | {"kang2018", "norman2019_mcfaline2024", "synthetic"} == set(listed)
    assert listed["norman_2019"] == "CRISPRa of genes and pairs, K562"
    assert cli.main(["datasets", "synthetic", "--output", str(tmp_path / "screen.h5ad")]) == 0
    written, expected = ad.read_h5ad(tmp_path / "screen.h5ad"), vc.datasets.synthetic()
    assert (written.X != expected.X).nnz == 0
    assert written.obs["target_gene"].tolist() == expected.obs["target_gene"].tolist()
    assert cli.main(["datasets", "norman_2091", "--output", str(tmp_path / "x.h5ad")]) == 2
    assert "Did you mean 'norman_2019'" in one_sentence(capsys)


def one_sentence(capsys: pytest.CaptureFixture) -> str:
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("virtualcell: error: ")]
    assert len(lines) == 1
    assert said.endswith(f"{lines[0]}\n")
    assert "Traceback" not in said
    return lines[0]


def test_an_error_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["predict", str(folder / "fitted.h5ad"), "--output", str(tmp_path / "out.h5ad")]
    command += ["--perturbation", "GENE1X"]
    assert cli.main(command) == 2
    assert "perturbation='GENE1X' is unknown" in one_sentence(capsys)
    with pytest.raises(KeyError, match="GENE1X"):
        cli.main([*command, "--debug"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere.h5ad"}, "nowhere.h5ad does not exist"),
        ({"data": "cells.loom"}, "must end in .h5ad, .h5mu or .zarr"),
        ({"data": "there.h5ad"}, "is no HDF5 file, or it is cut off or damaged"),
        ({"--control": "ctrl"}, "control='ctrl' is unknown"),
        ({"--output": "out.csv"}, "out.csv must end in .h5ad"),
        ({"--output": "there.h5ad"}, "pass --overwrite to replace it"),
        ({"--network": "n_hiden=3"}, "Did you mean 'n_hidden'?"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_fitted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    for name in ("there.h5ad", "cells.loom"):
        (tmp_path / name).touch()
    given = {"data": folder / "screen.h5ad", "--perturbation-key": "target_gene", "--control": "non-targeting"}
    given |= {"--output": tmp_path / "out.h5ad", "--model": tmp_path / "model"}
    given |= {k: tmp_path / v if k in ("data", "--output") else v for k, v in change.items()}
    data = given.pop("data")
    assert cli.main(["fit", str(data), *[str(word) for option in given.items() for word in option], *QUICK]) == 2
    assert message in one_sentence(capsys)
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_stays(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = (folder / "model" / "model.safetensors").read_bytes()
    assert cli.main(["fit", str(folder / "screen.h5ad"), *KEYS, "--model", str(folder / "model")]) == 2
    assert "--overwrite" in one_sentence(capsys)
    assert (folder / "model" / "model.safetensors").read_bytes() == before


def test_values_are_read_as_python() -> None:
    given = {"lr": 1e-4, "max_steps": 5, "progress_bar": False, "freeze": ["a"], "size": None}
    assert dict(cli._pair(f"{key}={value}") for key, value in given.items()) == given
    assert cli._pair("precision=bf16-mixed") == ("precision", "bf16-mixed")
    assert cli._pair("x=a=b") == ("x", "a=b")


@pytest.mark.parametrize("command", [["fit", "x.h5ad", "--network", "preset"], ["predict"], ["fitt"], []])
def test_a_wrong_call_ends_with_status_2(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 2
    assert "usage: virtualcell" in capsys.readouterr().err


def test_a_job_that_fails_to_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("whole")

    def die(part: Path) -> None:
        part.write_text("ha")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        _files.put_in_place(path, die)
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "whole"


def test_as_a_module(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "virtualcell", *arguments], capture_output=True, text=True)

    helped = run("--help")
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in CALLS)
    assert run("--version").stdout == f"virtualcell {vc.__version__}\n"
    failed = run(
        "predict", str(folder / "screen.h5ad"), "--perturbation", "STAT1", "--output", str(tmp_path / "out.h5ad")
    )
    assert failed.returncode == 2
    assert "virtualcell: error: uns['virtualcell'] holds no fitted model" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_help_imports_nothing_heavy() -> None:
    program = "import sys\nfrom virtualcell.cli import parser\nparser().format_help()\nprint('anndata' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def commands_of_the_page() -> list[str]:
    text = (DOCS / "cli.md").read_text().replace("\\\n", " ")
    return re.findall(r"^virtualcell .*", text, flags=re.MULTILINE)


def test_commands_of_the_page_are_understood() -> None:
    shown = [shlex.split(line)[1:] for line in commands_of_the_page()]
    assert {words[0] for words in shown} == set(CALLS)
    for words in shown:
        assert cli.parser().parse_args(words).run is cli.COMMANDS[words[0]][0]
