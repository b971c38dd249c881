from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import virtualcell as vc
from virtualcell.data._sentence_batches import SentenceBatches
from virtualcell.models import ST
from virtualcell.models._set_batches import SetBatches

ASKED = {"n_top_genes": 60, "validate": "contexts", "batch_key": "batch", "se": {"max_steps": 12, "batch_size": 16}}
TRAINING = {"max_steps": 24, "validate_every": 5, "batch_size": 4}
NETWORK = {"dropout": 0.2}


def fitted(fit, screen: ad.AnnData, folder: Path | None = None, **given: object) -> tuple[ad.AnnData, ST]:
    adata = screen.copy()
    given = {**ASKED, "training": TRAINING, "network": NETWORK, **given}
    return adata, fit(adata, **given, checkpoint_dir=folder)


@pytest.fixture(scope="module")
def whole(session_screen, fit) -> tuple[ad.AnnData, ST]:
    return fitted(fit, session_screen)


def check_equal(found: tuple[ad.AnnData, ST], whole: tuple[ad.AnnData, ST]) -> None:
    """Bit for bit: weights of ST and SE, how predictions are combined, the verdict, the embedding, predictions."""
    (adata, st), (other, their) = found, whole
    for ours, theirs in ((st, their), (st.se, their.se)):
        for name, tensor in theirs.module.state_dict().items():
            assert torch.equal(ours.module.state_dict()[name], tensor), name
        assert set(ours.history) == set(theirs.history)
        for name, table in theirs.history.items():
            pd.testing.assert_frame_equal(ours.history[name], table, check_exact=True)
    assert st.mixture == their.mixture
    assert st.verdict == their.verdict
    pd.testing.assert_frame_equal(st.validation, their.validation, check_exact=True)
    np.testing.assert_array_equal(adata.obsm["X_state"], other.obsm["X_state"])
    assert adata.uns["virtualcell"].keys() == other.uns["virtualcell"].keys()
    predicted = [vc.tl.predict_perturbation(a, st.names[0], context="type_1").X for a in (adata, other)]
    assert abs(predicted[0] - predicted[1]).max() == 0


@pytest.fixture
def ends(monkeypatch):
    """Return a function by which step `at` of the training number `which` of a fit tells the process to end."""

    def ends(which: int, at: int, how: signal.Signals = signal.SIGTERM) -> None:
        seen = []
        for kind in (SetBatches, SentenceBatches):
            step = kind.step

            def ending(self, i, *rest, step=step):
                if self.n_steps is None and not any(self is batches for batches in seen):
                    seen.append(self)
                if len(seen) == which and self is seen[-1] and i == at and self.n_steps is None:
                    seen.append(None)
                    os.kill(os.getpid(), how)
                return step(self, i, *rest)

            monkeypatch.setattr(kind, "step", ending)

    return ends


# trainings: ST, one without each of three contexts, SE
@pytest.mark.parametrize(("which", "at"), [(1, 9), (2, 3), (4, 7), (5, 6)])
def test_a_fit_that_goes_on_is_the_uninterrupted_one(
    session_screen, fit, whole, ends, tmp_path, monkeypatch, which, at
):
    with monkeypatch.context():
        ends(which, at)
        with pytest.raises(SystemExit):
            fitted(fit, session_screen, tmp_path)
    steps = []
    for kind in (SetBatches, SentenceBatches):
        monkeypatch.setattr(kind, "step", noting(kind.step, steps))
    check_equal(fitted(fit, session_screen, tmp_path, resume=True), whole)
    # what was finished is not trained again; of the interrupted one the steps that were lacking
    n_steps = [24, 24, 24, 24, 12]  # the folds as many as ST, fewer than 50
    weighing = 4 * 24  # of the parts of ST and of that of each fold
    assert len(steps) == sum(n_steps[which - 1 :]) - (at + 1) + weighing


def noting(step, steps: list):
    def noting(self, i, *rest):
        if self.n_steps is None:  # no validation
            steps.append(i)
        return step(self, i, *rest)

    return noting


def test_a_fit_with_features_and_several_networks_goes_on(session_screen, fit, targets, ends, tmp_path, monkeypatch):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(len(targets), 3)), index=targets)
    given = {"perturbation_features": features, "se": False, "validate": False, "network": {**NETWORK, "n_networks": 2}}
    whole = fitted(fit, session_screen, **given)
    with monkeypatch.context():
        ends(1, 11, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            fitted(fit, session_screen, tmp_path, **given)
    with pytest.raises(ValueError, match=r"checkpoint of another training: other perturbation vectors\. Repeat"):
        fitted(fit, session_screen, tmp_path, resume=True, **{**given, "perturbation_features": features**2})
    _, st = fitted(fit, session_screen, tmp_path, resume=True, **given)
    for name, tensor in whole[1].module.state_dict().items():
        assert torch.equal(st.module.state_dict()[name], tensor), name
    assert st.mixture == whole[1].mixture


def test_the_folder_holds_the_model_in_the_end_and_is_gone_on_from_only_when_told(session_screen, fit, tmp_path, whole):
    adata, st = fitted(fit, session_screen, tmp_path)
    check_equal((adata, st), whole)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    folds = {f"without_contexts_{k}/ST.training.safetensors" for k in (1, 2, 3)}
    assert names == {"model.safetensors", "ST.training.safetensors", "SE.training.safetensors", *folds}
    loaded = vc.models.ST.load(tmp_path)
    check_equal((adata, loaded), whole)
    with pytest.raises(FileExistsError, match=r"is the checkpoint of a training\. Say resume=True to go on from it"):
        fitted(fit, session_screen, tmp_path)
    check_equal(fitted(fit, session_screen, tmp_path, resume=True), whole)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda a: {"training": {**TRAINING, "lr": 0.01}}, r"lr=0\.001 there and 0\.01 here"),
        (lambda a: {"seed": 1}, r"seed=0 there and 1 here, .*other first weights"),
        (lambda a: {"n_top_genes": 50}, r"other network, .*other genes, other expression"),
        (lambda a: {"network": {**NETWORK, "n_hidden": 40}}, "other network"),
        (lambda a: {"network": {**NETWORK, "set_size": 8}}, "other set_size"),
        (lambda a: {"context_key": None}, "other contexts"),
        (lambda a: exchange(a, "target_gene"), "other perturbations"),
        (lambda a: exchange(a, "batch"), r"other batches\."),
        (lambda a: raise_one_count(a), "other .*library sizes"),
        (lambda a: {"se": {"max_steps": 13, "batch_size": 16}}, r"max_steps=12 there and 13 here"),
    ],
)
def test_another_fit_in_the_same_folder_is_refused_with_what_differs(
    session_screen, fit, finished, change, differs
) -> None:
    adata = session_screen.copy()
    given = change(adata)
    with pytest.raises(ValueError, match=f"is the checkpoint of another training: .*{differs}"):
        fitted(fit, adata, finished, resume=True, **given)


@pytest.fixture(scope="module")
def finished(session_screen, fit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fitted(fit, session_screen, folder)
    return folder


def exchange(adata: ad.AnnData, column: str) -> dict:
    labels = adata.obs[column].to_numpy(dtype=str)
    labels[labels == labels[0]] = "new"
    adata.obs[column] = labels
    return {}


def raise_one_count(adata: ad.AnnData) -> dict:
    adata.X[7, adata.X[7].indices[0]] += 1
    return {}


def test_the_order_of_the_file_is_none_of_its_data(session_screen, fit, finished, whole):
    order = np.random.default_rng(0).permutation(session_screen.n_obs)
    _, st = fitted(fit, session_screen[order], finished, resume=True)
    assert st.verdict == whole[1].verdict


def test_another_question_keeps_the_model_and_asks_anew(session_screen, fit, finished, caplog):
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        _, st = fitted(fit, session_screen, finished, resume=True, validate="cells")
    assert "ST was trained before" in caplog.text
    assert st.verdict.startswith("On left-out cells of measured pairs")


def test_models_go_on_by_themselves(session_screen, tmp_path, ends, monkeypatch):
    def se() -> vc.models.SE:
        adata = session_screen.copy()
        vc.models.SE.setup_anndata(adata)
        table = vc.pp.expression_gene_embeddings(adata, n_comps=8)
        torch.manual_seed(0)
        return vc.models.SE(adata, table, dropout=0.2)

    options = {"max_steps": 12, "batch_size": 8, "progress_bar": False, "accelerator": "cpu"}
    whole = se()
    whole.train(**options)
    with monkeypatch.context():
        ends(1, 5)
        with pytest.raises(SystemExit):
            se().train(**options, checkpoint_dir=tmp_path)
    model = se()
    model.train(**options, checkpoint_dir=tmp_path, resume=True)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor), name
