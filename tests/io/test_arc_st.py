from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy import sparse

import virtualcell as vc
from virtualcell.io import UnsafePickleError
from virtualcell.models import ST

TOLERANCE = 1e-5
NAMES = ["p0", "p1", "p2", "p3", "non-targeting"]
BARE = ["st_genes", "st_genes_batch", "st_all_genes", "st_embedding"]


def bare(folder: Path, **changes: object) -> ST:
    """A golden model that is a checkpoint alone."""
    described = folder if folder.is_dir() else folder.parent
    h = json.loads((described / "description.json").read_text())["hyper_parameters"]
    n = h["decoder_cfg"]["gene_dim"] if h["decoder_cfg"] else h["output_dim"]
    options = {"checkpoint": "model.ckpt", "gene_names": [f"gene{i}" for i in range(n)], "perturbations": NAMES}
    return ST.from_arc(folder, **(options | changes))


def largest_difference(st: ST, folder: Path) -> float:
    """Of all sets to what the reference predicted, through the public method."""
    expected = {k: v.numpy() for k, v in load_file(folder / "expected.safetensors").items()}
    worst = 0.0
    s = st.set_size
    for i in range(len(expected["control"]) // s):
        rows = slice(i * s, (i + 1) * s)
        name = NAMES[int(expected["perturbation"][rows.start].argmax())]
        control, codes = expected["control"][rows], expected["batch"][rows].astype(int)
        batch = np.array(st.batches)[codes] if st.batches else None
        found = {"predicted": st.predict_embedding(control, name, batch=batch)}
        if "predicted_genes" in expected:
            base = control.mean(axis=0)
            found["predicted_genes"] = st.predict_cells(control, name, context="any", base=base, batch=batch)
        for key, ours in found.items():
            assert expected[key][rows].std() > 0.01
            worst = max(worst, float(np.abs(ours - expected[key][rows]).max()))
        if "confidence" in expected:
            with torch.no_grad():
                out = st.module(torch.from_numpy(control)[None], st.table.encode([name]), torch.from_numpy(codes)[None])
            worst = max(worst, abs(float(out.confidence) - float(expected["confidence"][i, 0])))
    return worst


@pytest.mark.parametrize("name", BARE)
def test_checkpoint_alone_predicts_what_the_reference_predicts(golden: Path, name: str, tmp_path: Path) -> None:
    folder = golden / name
    st = bare(folder)
    assert largest_difference(st, folder) < TOLERANCE
    st.to_arc(tmp_path / "arc")
    again = ST.from_arc(tmp_path / "arc")
    assert largest_difference(again, folder) < TOLERANCE
    assert (again.config, again.genes, again.batches) == (st.config, st.genes, st.batches)
    st.save(tmp_path / "ours")
    assert largest_difference(ST.load(tmp_path / "ours"), folder) < TOLERANCE
    # the file itself may be named too, and vectors given by name
    vectors = pd.DataFrame(np.eye(5), index=NAMES)
    assert largest_difference(bare(folder / "model.ckpt", perturbations=vectors), folder) < TOLERANCE


def run_difference(st: ST, golden: Path) -> float:
    expected = load_file(golden / "st_run" / "expected.safetensors")
    names = [k.removeprefix("predicted.") for k in expected if k.startswith("predicted.")]
    assert set(names) == {"g2", "g7", "non-targeting"}
    found = {n: st.predict_embedding(expected["control"].numpy(), n) for n in names}
    return max(float(np.abs(found[n] - expected[f"predicted.{n}"].numpy()).max()) for n in names)


def test_run_folder_predicts_what_the_reference_predicts(golden: Path, tmp_path: Path) -> None:
    st = ST.from_arc(golden / "st_run")
    described = json.loads((golden / "st_run" / "description.json").read_text())
    assert run_difference(st, golden) < TOLERANCE
    assert st.genes == described["genes"]
    assert set(st.perturbations) == set(described["perturbations"]) - {"non-targeting"}
    assert st.contexts == ["jurkat", "k562", "rpe1"]
    assert st.set_size == 16
    assert st.is_trained_
    st.to_arc(tmp_path / "arc")
    assert run_difference(ST.from_arc(tmp_path / "arc"), golden) < TOLERANCE
    st.save(tmp_path / "ours")
    assert run_difference(ST.load(tmp_path / "ours"), golden) < TOLERANCE


def test_written_run_is_what_the_reference_wrote(golden: Path, tmp_path: Path) -> None:
    theirs, ours = golden / "st_run", tmp_path / "arc"
    ST.from_arc(theirs).to_arc(ours)
    expected_only = {"description.json", "expected.safetensors"}
    names = {p.name for p in theirs.rglob("*")} - expected_only
    assert {p.name for p in ours.rglob("*")} == names
    before, after = (torch.load(f / "checkpoints" / "final.ckpt", weights_only=True) for f in (theirs, ours))
    assert set(after) == set(before)
    a, b = before["state_dict"], after["state_dict"]
    assert set(a) == set(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    # of the hyper-parameters, all that describe the model; those of the training run are not known
    for key in set(before["hyper_parameters"]) & set(after["hyper_parameters"]) - {"decoder_cfg", "batch_size", "lora"}:
        assert after["hyper_parameters"][key] == before["hyper_parameters"][key], key
    described = {"input_dim", "output_dim", "pert_dim", "batch_dim", "hidden_dim", "cell_set_len", "embed_key"}
    described |= {"output_space", "gene_names", "control_pert", "transformer_backbone_kwargs", "predict_residual"}
    described |= {"n_encoder_layers", "n_decoder_layers", "use_basal_projection", "gene_decoder_bool", "decoder_cfg"}
    assert described <= set(after["hyper_parameters"])
    with (theirs / "var_dims.pkl").open("rb") as f, (ours / "var_dims.pkl").open("rb") as g:
        a, b = pickle.load(f), pickle.load(g)
    assert set(a) == set(b)
    assert {k for k in a if a[k] != b[k]} == {"gene_dim"}  # genes before the choice of 1,000: not in the model
    for name in ("pert_onehot_map.pt", "batch_onehot_map.torch", "cell_type_onehot_map.torch"):
        a, b = torch.load(theirs / name, weights_only=False), torch.load(ours / name, weights_only=True)
        assert list(a) == list(b)
        if name != "batch_onehot_map.torch":
            assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (yaml.safe_load((f / "config.yaml").read_text()) for f in (theirs, ours))
    for section in ("data", "model"):
        shared = set(a[section]["kwargs"]) & set(b[section]["kwargs"]) - {"lora"}
        assert {k: b[section]["kwargs"][k] for k in shared} == {k: a[section]["kwargs"][k] for k in shared}
    module = torch.load(ours / "data_module.torch", weights_only=True)
    assert module["pert_col"] == "gene"
    with pytest.raises(FileExistsError, match="Pass overwrite=True"):
        ST.from_arc(theirs).to_arc(ours)
    (ours / "config.yaml").unlink()  # a run that lacks a file is not overwritten either
    with pytest.raises(FileExistsError, match=r"checkpoints/final.ckpt already"):
        ST.from_arc(theirs).to_arc(ours)


# -- genes and perturbations -------------------------------------------------------------------------------------------


@pytest.fixture
def run(golden: Path, tmp_path: Path) -> Path:
    shutil.copytree(golden / "st_run", tmp_path / "run")
    return tmp_path / "run"


def change_checkpoint(file: Path, change) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def without_gene_names(run: Path) -> None:
    """As Tahoe's."""
    change_checkpoint(run / "checkpoints" / "final.ckpt", lambda c: c["hyper_parameters"].pop("gene_names"))
    sizes = pickle.loads((run / "var_dims.pkl").read_bytes())
    del sizes["gene_names"]
    (run / "var_dims.pkl").write_bytes(pickle.dumps(sizes))


def test_genes_are_named_or_refused(run: Path, golden: Path) -> None:
    without_gene_names(run)
    with pytest.raises(ValueError, match=r"predicts 1000 genes and carries no gene names. Give gene_names="):
        ST.from_arc(run)
    with pytest.raises(ValueError, match=r"gene_names holds 999 names, but .* predicts 1000 genes"):
        ST.from_arc(run, gene_names=[f"x{i}" for i in range(999)])
    with pytest.raises(ValueError, match="names 1 genes twice"):
        ST.from_arc(run, gene_names=["x1", *[f"x{i}" for i in range(999)]])
    st = ST.from_arc(run, gene_names=[f"x{i}" for i in range(1000)])
    assert st.genes[:2] == ["x0", "x1"]
    assert run_difference(st, golden) < TOLERANCE


def test_names_of_another_number_of_genes_are_not_used(run: Path) -> None:
    change_checkpoint(run / "checkpoints" / "final.ckpt", lambda c: c["hyper_parameters"].pop("gene_names"))
    sizes = pickle.loads((run / "var_dims.pkl").read_bytes())
    sizes["gene_names"] = [f"g{i}" for i in range(2000)]
    (run / "var_dims.pkl").write_bytes(pickle.dumps(sizes))
    with pytest.raises(ValueError, match="predicts 1000 genes and carries 2000 gene names"):
        ST.from_arc(run)


def test_perturbations_are_named_or_refused(golden: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no pert_onehot_map.pt"):
        bare(golden / "st_genes", perturbations=None)
    with pytest.raises(ValueError, match="perturbations holds 4 perturbations of 4 dimensions, but this model takes 5"):
        bare(golden / "st_genes", perturbations=NAMES[1:])
    with pytest.raises(
        ValueError, match=r"no row for the control, 'non-targeting' by the checkpoint. Closest:.*'non-targetin'"
    ):
        bare(golden / "st_genes", perturbations=[*NAMES[:4], "non-targetin"])


def test_control_has_a_vector_of_its_own(golden: Path) -> None:
    st = ST.from_arc(golden / "st_run")
    assert st.table.encode(["non-targeting"]).argmax() == 20
    assert st.table.encode(["non-targeting"]).sum() == 1
    assert st.table.encode(["g2+g7", "g2+non-targeting"]).sum(dim=1).tolist() == [2, 1]
    assert not st.table.has_features


def test_drugs_are_found_inside_their_names(run: Path) -> None:
    codes = torch.load(run / "pert_onehot_map.pt", weights_only=False)
    names = [
        "non-targeting",
        *[f"[('{d}', {x}, 'uM')]" for d in ("Dabrafenib", "Trametinib") for x in (0.05, 0.5, 5.0)],
    ]
    names += ["[('Bortezomib', 0.5, 'uM')]", *[f"[('Drug{i}', 5.0, 'uM')]" for i in range(13)]]
    torch.save(dict(zip(names, codes.values(), strict=True)), run / "pert_onehot_map.pt")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    st = ST.from_arc(run)
    assert st.perturbation_name(drug="dabrafenib", dose=0.5) == "[('Dabrafenib', 0.5, 'uM')]"
    assert st.perturbation_name(drug="Bortezomib") == "[('Bortezomib', 0.5, 'uM')]"
    with pytest.raises(KeyError, match=r"dose=None is unknown.*'0.05', '0.5', '5.0'.*doses of Dabrafenib"):
        st.perturbation_name(drug="Dabrafenib")
    with pytest.raises(KeyError, match=r"drug='Dabrafenip' is unknown. Did you mean 'Dabrafenib'"):
        st.perturbation_name(drug="Dabrafenip", dose=5)
    for wrong in ("dabrafenip", "[('Dabrafenip', 5.0, 'uM')]"):
        with pytest.raises(KeyError, match=r"\('Dabrafenib', 0.05, 'uM'\).*perturbation_name\(drug=..., dose=...\)"):
            st.check_perturbation(wrong)
    with pytest.raises(KeyError, match=r"Of that drug it has (\"\[\('Dabrafenib', [0-9.]+, 'uM'\)\]\",? ?){3}\. Names"):
        st.check_perturbation("[('Dabrafenib', 1.0, 'uM')]")
    adata = some_cells(st.genes)
    predicted = vc.tl.predict_perturbation(adata, drug="dabrafenib", dose=0.5, model=st, **HERE)
    named = vc.tl.predict_perturbation(adata, "[('Dabrafenib', 0.5, 'uM')]", model=st, **HERE)
    assert (predicted.X != named.X).nnz == 0
    with pytest.raises(ValueError, match="drug='Dabrafenib' were both given"):
        vc.tl.predict_perturbation(adata, "g2", drug="Dabrafenib", model=st, **HERE)


def test_control_of_tahoe_is_a_drug_at_no_dose(run: Path, golden: Path) -> None:
    """The configuration of the published model says "DMSO_TF", its map "[('DMSO_TF', 0.0, 'uM')]"."""
    codes = torch.load(run / "pert_onehot_map.pt", weights_only=False)
    vehicle = "[('DMSO_TF', 0.0, 'uM')]"
    torch.save({vehicle if k == "non-targeting" else k: v for k, v in codes.items()}, run / "pert_onehot_map.pt")
    change_checkpoint(
        run / "checkpoints" / "final.ckpt", lambda c: c["hyper_parameters"].update(control_pert="DMSO_TF")
    )
    st = ST.from_arc(run)
    assert st.control == st.design.control == vehicle
    assert vehicle not in st.perturbations
    expected = load_file(golden / "st_run" / "expected.safetensors")
    found = st.predict_embedding(expected["control"].numpy(), vehicle)
    np.testing.assert_allclose(found, expected["predicted.non-targeting"], atol=TOLERANCE)


def test_unknown_perturbation(golden: Path) -> None:
    with pytest.raises(KeyError, match=r"perturbation='g22' is unknown. Did you mean 'g2'"):
        ST.from_arc(golden / "st_run").check_perturbation("g22")


# -- parameters and options --------------------------------------------------------------------------------------------


def test_every_parameter_that_does_not_fit_is_named(run: Path) -> None:
    def change(content: dict) -> None:
        state = content["state_dict"]
        del state["pert_encoder.9.bias"], state["transformer_backbone.norm.weight"]
        state["project_out.0.weight"] = torch.zeros(24, 23)
        state["lora_A.weight"] = torch.zeros(1)

    change_checkpoint(run / "checkpoints" / "final.ckpt", change)
    with pytest.raises(ValueError, match="does not fit the network") as error:
        ST.from_arc(run)
    assert "2 missing: pert_encoder.9.bias, transformer_backbone.norm.weight" in str(error.value)
    assert "1 unexpected: lora_A.weight" in str(error.value)
    assert "1 misshapen: project_out.0.weight (24, 23) for (24, 24)" in str(error.value)


def test_known_extras_and_compiled_names(run: Path, golden: Path) -> None:
    def change(content: dict) -> None:
        state = content["state_dict"]
        content["state_dict"] = {f"_orig_mod.{k}": v for k, v in state.items()}
        content["state_dict"]["batch_classifier.0.weight"] = torch.zeros(3)
        del content["hyper_parameters"]["transformer_backbone_kwargs"]["bidirectional_attention"]

    change_checkpoint(run / "checkpoints" / "final.ckpt", change)
    assert run_difference(ST.from_arc(run), golden) < TOLERANCE


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("hyper", "mask_attn", True),
        ("hyper", "use_effect_gating_token", True),
        ("hyper", "transformer_backbone_key", "GPT2"),
        ("backbone", "bidirectional_attention", False),
        ("backbone", "use_rotary_embeddings", True),
        ("backbone", "rms_norm_eps", 1e-5),
        ("backbone", "hidden_act", "gelu"),
    ],
)
def test_arithmetic_that_is_not_implemented_is_refused(run: Path, where: str, key: str, value: object) -> None:
    def change(content: dict) -> None:
        h = content["hyper_parameters"]
        (h if where == "hyper" else h["transformer_backbone_kwargs"])[key] = value

    change_checkpoint(run / "checkpoints" / "final.ckpt", change)
    with pytest.raises(ValueError, match=f"uses {key}={value!r}, which virtualcell does not implement"):
        ST.from_arc(run)


def test_malicious_side_file_is_refused(run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    (run / "var_dims.pkl").write_bytes(pickle.dumps({"input_dim": Evil()}))
    with pytest.raises(UnsafePickleError, match=r"var_dims.pkl asks for posix.system"):
        ST.from_arc(run)
    assert not (tmp_path / "ran").exists()


def test_messages_for_missing_files_and_models_that_do_not_fit_the_format(
    run: Path, golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint='best.ckpt' is not in .*checkpoints/final.ckpt"):
        ST.from_arc(run, checkpoint="best.ckpt")
    torch.save(dict(zip("abcd", torch.ones(4, 4).unbind(), strict=True)), run / "cell_type_onehot_map.torch")
    with pytest.raises(ValueError, match="is no one-hot map"):
        ST.from_arc(run)
    adata = ad.AnnData(np.random.default_rng(0).random((40, 6)).astype(np.float32), obs={"p": ["c", "x"] * 20})
    ST.setup_anndata(adata, perturbation_key="p", control="c")
    for options, message in (
        ({}, "transfer=True has no counterpart in Arc's format. Train with preset='published'"),
        ({"transfer": False}, "head='both' has no counterpart"),
        ({"head": "shift"}, "head='shift' has no counterpart"),
        ({"preset": "published", "n_networks": 2}, "n_networks: Arc's format holds one network"),
        ({"preset": "published", "relu": False}, "relu=False has no counterpart"),
    ):
        with pytest.raises(ValueError, match=message):
            ST(adata, **options).to_arc(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    st = ST(adata, preset="published")
    st.is_trained_ = True
    st.to_arc(tmp_path / "yes")
    again = ST.from_arc(tmp_path / "yes")
    pd.testing.assert_frame_equal(again.predict(adata, "x"), st.predict(adata, "x"), atol=1e-6)
    pd.testing.assert_frame_equal(again.predict(adata, "c"), st.predict(adata, "c"), atol=1e-6)


# -- on data -----------------------------------------------------------------------------------------------------------


def some_cells(genes: list[str], n: int = 24, seed: int = 0) -> ad.AnnData:
    """Counts of cells under other column names than the run's, with genes that it does not know."""
    rng = np.random.default_rng(seed)
    names = [*genes, "unknown1", "unknown2"]
    counts = sparse.csr_matrix(rng.poisson(0.7, (n, len(names))).astype(np.float32))
    obs = pd.DataFrame({"guide": "NT", "line": ["k562", "rpe1"] * (n // 2)}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=names))


HERE = {"perturbation_key": "guide", "control": "NT", "context_key": "line", "scale": "counts"}


def test_predict_on_any_data_with_the_genes(golden: Path) -> None:
    st = ST.from_arc(golden / "st_run")
    adata = some_cells(st.genes)
    out = vc.tl.predict_perturbation(adata, ["g2", "g7"], model=st, **HERE)
    assert out.shape == (48, 1000)
    assert out.obs["guide"].unique().tolist() == ["g2", "g7"]
    assert set(out.obs["line"]) == {"k562", "rpe1"}
    assert np.abs(out.X - out.layers["control"]).max() > 1e-3
    one = vc.tl.predict_perturbation(adata, "g2", model=st, context="rpe1", **HERE)
    assert set(one.obs["line"]) == {"rpe1"}
    # the numbers are those of the network on log1p CP10k of these genes
    control = one[np.argsort(one.obs["control_barcode"].astype(str))].layers["control"].toarray()
    counts = adata.to_df()
    logged = np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0))[st.genes]
    np.testing.assert_allclose(control, logged.loc[sorted(one.obs["control_barcode"])], atol=1e-5)
    # genes and cells in another order, on the other scale
    rng = np.random.default_rng(1)
    shuffled = adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()
    shuffled.X = sparse.csr_matrix(np.log1p(1e4 * shuffled.X.multiply(1 / shuffled.X.sum(axis=1))))
    again = vc.tl.predict_perturbation(shuffled, "g2", model=st, context="rpe1", **{**HERE, "scale": "log1p"})
    np.testing.assert_allclose(again[one.obs_names, one.var_names].X.toarray(), one.X.toarray(), atol=1e-5)


def test_gene_coverage(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    st = ST.from_arc(golden / "st_run")
    adata = some_cells(st.genes)
    part = adata[:, 100:].copy()
    with pytest.raises(
        KeyError, match=r"100 of 1000 genes are missing.*Coverage is 90.0%, below min_gene_coverage=1.0"
    ):
        vc.tl.predict_perturbation(part, "g2", model=st, **HERE)
    with pytest.raises(KeyError, match=r"below min_gene_coverage=0.95"):
        vc.tl.predict_perturbation(part, "g2", model=st, min_gene_coverage=0.95, **HERE)
    with pytest.raises(KeyError, match=r"none of the model's 1000 genes \(g0.*is among var_names"):
        vc.tl.predict_perturbation(adata[:, -2:].copy(), "g2", model=st, min_gene_coverage=0.1, **HERE)
    with pytest.raises(ValueError, match="min_gene_coverage=0 must be above 0"):
        vc.tl.predict_perturbation(part, "g2", model=st, min_gene_coverage=0, **HERE)
    with caplog.at_level("INFO"):
        out = vc.tl.predict_perturbation(part, "g2", model=st, min_gene_coverage=0.9, **HERE)
    assert "900 of the model's 1000 genes are in the data." in caplog.text
    assert "100 of the model's genes are filled with 0." in caplog.text
    assert list(out.var_names) == st.genes[100:]
    # as if those genes were there and silent
    silent = adata.copy()
    size = part.to_df().sum(axis=1)
    silent.X = sparse.csr_matrix(silent.to_df().assign(**dict.fromkeys(st.genes[:100], 0.0)).to_numpy())
    assert np.allclose(silent.to_df().sum(axis=1), size)
    full = vc.tl.predict_perturbation(silent, "g2", model=st, **HERE)
    np.testing.assert_allclose(full[out.obs_names, out.var_names].X.toarray(), out.X.toarray(), atol=1e-6)


def test_scale_is_checked(golden: Path) -> None:
    st = ST.from_arc(golden / "st_run")
    adata = some_cells(st.genes)
    here = {**HERE, "scale": None}
    with pytest.raises(ValueError, match=r"holds whole numbers only. Say scale='counts'"):
        vc.tl.predict_perturbation(adata, "g2", model=st, **here)
    adata.X = sparse.csr_matrix(np.log1p(5e4 * adata.X.multiply(1 / adata.X.sum(axis=1))))
    with pytest.raises(ValueError, match=r"normalised to 5e\+04 counts per cell \(median\) and not to 10000"):
        vc.tl.predict_perturbation(adata, "g2", model=st, **here)
    raw = some_cells(st.genes)
    raw.X = raw.X.log1p()
    with pytest.raises(ValueError, match="holds logarithms of whole numbers: of raw counts"):
        vc.tl.predict_perturbation(raw, "g2", model=st, **here)
    # less is that of some of the genes, unless all cells have the same: then they were normalised to another total
    adata.X = sparse.csr_matrix(np.log1p(np.expm1(adata.X.toarray()) / 20))
    with pytest.raises(ValueError, match=r"normalised to 2500 counts per cell \(median\) and not to 10000"):
        vc.tl.predict_perturbation(adata, "g2", model=st, **here)
    vc.tl.predict_perturbation(adata[:, :1000].copy(), "g2", model=st, **here)
    more = adata[:, :1000].copy()
    more.X = sparse.csr_matrix(np.log1p(np.expm1(more.X.toarray()) * 5))
    with pytest.raises(ValueError, match=r"normalised to 1.2\d+e\+04 counts per cell \(median\) and not to 10000"):
        vc.tl.predict_perturbation(more, "g2", model=st, **here)


def test_columns_must_be_named_and_known(golden: Path) -> None:
    st = ST.from_arc(golden / "st_run")
    adata = some_cells(st.genes)
    with pytest.raises(KeyError, match="perturbation_key='gene' is unknown"):
        vc.tl.predict_perturbation(adata, "g2", model=st, scale="counts", context_key="line")
    with pytest.raises(KeyError, match="context_key='cell_type' is unknown"):
        vc.tl.predict_perturbation(adata, "g2", model=st, scale="counts", perturbation_key="guide")
    with pytest.raises(ValueError, match="batch_key='line' was given, but the model was set up without batch_key"):
        vc.tl.predict_perturbation(adata, "g2", model=st, batch_key="line", **HERE)


def test_model_with_batches_takes_them_from_the_data(golden: Path) -> None:
    st = bare(golden / "st_genes_batch")
    adata = some_cells(st.genes)
    adata.obs["lane"] = "0"
    here = {"perturbation_key": "guide", "control": "NT", "batch_key": "lane", "scale": "counts"}
    out = vc.tl.predict_perturbation(adata, "p1", model=st, emit="mean", **here)
    adata.obs["lane"] = "1"
    other = vc.tl.predict_perturbation(adata, "p1", model=st, emit="mean", **here)
    assert np.abs(out.X - other.X).max() > 1e-3
    adata.obs["lane"] = "3"
    with pytest.raises(KeyError, match=r"batch='3' is unknown.*knows only the batches it was trained on"):
        vc.tl.predict_perturbation(adata, "p1", model=st, **here)


def test_embedding_model_takes_embeddings_and_gives_genes(golden: Path) -> None:
    st = bare(golden / "st_embedding")
    assert st.design.use_rep == "X_state"
    adata = some_cells(st.genes)
    here = {"perturbation_key": "guide", "control": "NT", "scale": "counts"}
    with pytest.raises(KeyError, match=r"works on obsm\['X_state'\], which this data does not have. Run `vc.tl.embed"):
        vc.tl.predict_perturbation(adata, "p1", model=st, **here)
    adata.obsm["X_state"] = np.random.default_rng(0).normal(size=(24, 20)).astype(np.float32)
    assert vc.tl.predict_perturbation(adata, "p1", model=st, **here).X.min() >= 0
    here["emit"] = "mean"  # cells have the library sizes of the genes at hand
    out = vc.tl.predict_perturbation(adata, "p1", model=st, **here)
    assert list(out.var_names) == st.genes
    # genes are no input of such a model: the data may lack some, which are then left out of the result
    fewer = adata[:, 12:].copy()
    part = vc.tl.predict_perturbation(fewer, "p1", model=st, **here)
    assert list(part.var_names) == st.genes[12:]
    np.testing.assert_allclose(part.X.toarray(), out.X[:, 12:].toarray(), atol=1e-5)
    adata.obsm["X_state"] += 1
    assert np.abs(out.X - vc.tl.predict_perturbation(adata, "p1", model=st, **here).X).max() > 1e-3
    adata.obsm["X_state"] = adata.obsm["X_state"][:, :19]
    with pytest.raises(ValueError, match="has 19 columns, this model 20"):
        vc.tl.predict_perturbation(adata, "p1", model=st, **here)
