from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell._keys import ALL
from virtualcell.io._save import read_state
from virtualcell.models import SE, ST, Additive, NoChange

# runs in a process that has nothing but the folders and some control cells, and in which nothing can be unpickled
ELSEWHERE = """
import pickle, sys
def refuse(*_, **__):
    raise RuntimeError("unpickling")
import anndata, numpy as np, torch
import virtualcell as vc
vc.models.ST, vc.models.Additive  # imported before nothing may be unpickled
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
folder, perturbation = sys.argv[1:]
controls = anndata.read_h5ad(f"{folder}/controls.h5ad")
counts = anndata.read_h5ad(f"{folder}/counts.h5ad")
st = vc.models.ST.load(f"{folder}/st")
additive = vc.models.Additive.load(f"{folder}/additive")
features = vc.models.ST.load(f"{folder}/features")
np.savez(
    f"{folder}/elsewhere.npz",
    st=st.predict(controls, perturbation, n_cells=40),
    both=st.predict(controls, "+".join(st.perturbations[:2])),
    additive=additive.predict(controls, perturbation),
    features=features.predict(controls, "UNSEEN"),
    embedding=st.se.get_latent_representation(counts),
    history=st.history["train_loss"]["train_loss"].to_numpy(float),
)
print(repr(st))
"""


@pytest.fixture(scope="module")
def models(session_screen, learned, small_se, fit, design, targets) -> dict:
    data = session_screen.copy()
    Additive.setup_anndata(data, **design)
    additive = Additive(data)
    additive.train()
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(7, 3)), index=[*targets, "UNSEEN"])
    features = fit(session_screen.copy(), table, preset="published", setup={"batch_key": "batch"})
    return {"st": learned, "additive": additive, "features": features}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, models, small_se, session_screen, session_counts):
    folder = tmp_path_factory.mktemp("saved")
    models["st"].se = small_se
    for name, model in models.items():
        model.save(folder / name)
    models["st"].se = None
    is_control = (session_screen.obs["target_gene"] == "non-targeting").to_numpy()
    session_screen[is_control].copy().write_h5ad(folder / "controls.h5ad")
    session_counts[:50].copy().write_h5ad(folder / "counts.h5ad")
    return folder


def test_a_new_process_without_the_data_predicts_the_same_bits(
    folder, models, small_se, session_screen, session_counts, targets
):
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), targets[0]], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == repr(models["st"])
    got = np.load(folder / "elsewhere.npz")
    st = models["st"]
    np.testing.assert_array_equal(got["st"], st.predict(session_screen, targets[0], n_cells=40))
    np.testing.assert_array_equal(got["both"], st.predict(session_screen, "+".join(targets[:2])))
    np.testing.assert_array_equal(got["additive"], models["additive"].predict(session_screen, targets[0]))
    np.testing.assert_array_equal(got["features"], models["features"].predict(session_screen, "UNSEEN"))
    np.testing.assert_array_equal(got["embedding"], small_se.get_latent_representation(session_counts[:50].copy()))
    np.testing.assert_array_equal(got["history"], st.history["train_loss"]["train_loss"].to_numpy(float))


def test_a_folder_holds_one_file_with_all_that_a_model_carries(folder, session_screen):
    assert [p.name for p in (folder / "st").iterdir()] == ["model.safetensors"]
    state = read_state(folder / "st")
    assert state.kind == "ST"
    assert state.meta["virtualcell_version"] == vc.__version__
    assert state.meta["registry"]["setup_args"]["control"] == "non-targeting"
    # one-hot vectors follow from the names, features are held
    assert "perturbations" not in state.tensors
    np.testing.assert_array_equal(ST.load(folder / "st").table.vectors, np.eye(6))
    assert read_state(folder / "features").tensors["perturbations"].shape == (7, 4)
    assert {name: part.kind for name, part in state.parts.items()} == {"se": "SE"}
    # a cell is not in there, by name or by value
    content = (folder / "st" / "model.safetensors").read_bytes()
    for name in session_screen.obs_names[:2]:
        assert name.encode() not in content
    row = np.ascontiguousarray(session_screen.X[0], np.float32)
    assert row.tobytes() not in content


def test_loaded_models_are_the_same(folder, models, weights, session_screen, targets):
    for name, kind in (("st", ST), ("additive", Additive), ("features", ST)):
        model, loaded = models[name], kind.load(folder / name)
        np.testing.assert_array_equal(weights(model), weights(loaded))
        assert repr(model) == repr(loaded)
        assert model.design == loaded.design
        assert model.modality == loaded.modality
        assert (model.genes, model.contexts, model.batches) == (loaded.genes, loaded.contexts, loaded.batches)
        assert loaded.is_trained
    assert ST.load(folder / "features").table.has_features
    assert ST.load(folder / "features").se is None
    assert ST.load(folder / "st").set_size == 16
    with_data = ST.load(folder / "st", session_screen)
    assert with_data.predict(perturbation=targets[0]).equals(models["st"].predict(session_screen, targets[0]))


def test_history_comes_back(folder, models):
    loaded = ST.load(folder / "st")
    assert set(loaded.history) == set(models["st"].history)
    for name, frame in models["st"].history.items():
        pd.testing.assert_frame_equal(loaded.history[name], frame)


@pytest.mark.parametrize("name", ["st", "features", "additive"])
def test_saving_again_is_the_same_file(folder, name, tmp_path):
    kind = Additive if name == "additive" else ST
    kind.load(folder / name).save(tmp_path / "again")
    again, first = (path / "model.safetensors" for path in (tmp_path / "again", folder / name))
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("name", "kind", "right"), [("st", Additive, "ST"), ("st", SE, "ST"), ("additive", NoChange, "Additive")]
)
def test_wrong_class(folder, name, kind, right):
    with pytest.raises(ValueError, match=rf"this is a saved {right}: load it with `vc\.models\.{right}\.load`"):
        kind.load(folder / name)


def test_not_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors: it is not a folder written by"):
        ST.load(tmp_path)


def test_overwriting_must_be_asked_for(models, small_se, tmp_path, weights):
    models["additive"].save(tmp_path / "m")
    with pytest.raises(FileExistsError, match=r"holds a model already\. Pass overwrite=True to replace it"):
        models["additive"].save(tmp_path / "m")
    models["st"].save(tmp_path / "m", overwrite=True)
    np.testing.assert_array_equal(weights(ST.load(tmp_path / "m")), weights(models["st"]))


def test_overwriting_leaves_nothing_of_another_model(models, small_se, tmp_path):
    st = models["st"]
    st.se, st.fallback = small_se, models["additive"]
    st.save(tmp_path / "m")
    st.se = st.fallback = None
    st.save(tmp_path / "m", overwrite=True)
    loaded = ST.load(tmp_path / "m")
    assert (loaded.se, loaded.fallback) == (None, None)
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["model.safetensors"]


def test_the_baseline_that_was_better_comes_along(models, session_screen, targets, tmp_path):
    st, additive = models["st"], models["additive"]
    st.fallback = additive
    st.validation = pd.DataFrame({"mae": [0.1, 0.2]}, index=pd.Index(["Additive", "ST"], name="model"))
    st.save(tmp_path / "m")
    loaded = ST.load(tmp_path / "m")
    pd.testing.assert_frame_equal(loaded.validation, st.validation)
    expected = additive.predict(session_screen, targets[0])
    assert loaded.fallback.predict(session_screen, targets[0]).equals(expected)
    st.fallback = st.validation = None


def test_a_model_that_knows_no_contexts_and_was_not_trained_is_saved_too(screen, build, tmp_path):
    st = build(screen, setup={"context_key": None}, n_networks=2, transfer=False)
    st.save(tmp_path / "m")
    loaded = ST.load(tmp_path / "m")
    assert repr(loaded) == repr(st)
    assert not loaded.is_trained
    assert loaded.contexts == []
    assert st.screen.context_names == [ALL]


def test_without_data_there_is_no_training_and_no_default(folder, targets):
    st, additive = ST.load(folder / "st"), Additive.load(folder / "additive")
    se = st.se
    for model, options in ((st, {"max_steps": 1}), (se, {"max_steps": 1}), (additive, {})):
        with pytest.raises(ValueError, match=r"holds no data to train on: it was loaded without.*`load` as adata="):
            model.train(**options)
    with pytest.raises(ValueError, match="adata=None, but this model was loaded without data: give the cells to start"):
        st.predict(perturbation=targets[0])
    with pytest.raises(ValueError, match="adata=None, but this model was loaded without data: give the cells to embed"):
        se.get_latent_representation()


def test_training_goes_on_where_data_is_given(folder, session_screen, session_counts, targets, weights, tmp_path):
    ST.load(folder / "st").se.save(tmp_path / "se")
    for model in (ST.load(folder / "st", session_screen), SE.load(tmp_path / "se", session_counts)):
        before = weights(model)
        model.train(max_steps=2, progress_bar=False)
        after = weights(model)
        assert np.isfinite(after).all()
        assert not np.array_equal(before, after)
    additive = Additive.load(folder / "additive", session_screen)
    before = additive.predict(perturbation=targets[0])
    additive.train()
    assert additive.predict(perturbation=targets[0]).equals(before)
