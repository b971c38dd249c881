"""Write the stored models anew, in a folder of their own where the format has a new number: python tests/stored/make.py

Tests load what stands here with every later version, and compare the predictions with the stored ones. What is there
is not replaced: a file that no longer loads is a fault of the version, not of the file.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import virtualcell as vc
from virtualcell._state import FORMAT

HERE = Path(__file__).parent
DESIGN = {"perturbation_key": "pert", "control": "NT", "context_key": "ctx"}
GENES = [f"G{i:02}" for i in range(24)]


def cells(folder: Path) -> ad.AnnData:
    """The cells that the stored models were fitted on."""
    with np.load(folder / "cells.npz") as arrays:
        obs = pd.DataFrame({"pert": arrays["pert"], "ctx": arrays["ctx"]}, index=[f"c{i}" for i in range(96)])
        return ad.AnnData(
            sparse.csr_matrix(arrays["counts"].astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES)
        )


def features() -> pd.DataFrame:
    return pd.DataFrame([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 2.0]], index=["A", "B", "C", "D"])


def predictions(name: str, folder: Path, data: ad.AnnData) -> dict[str, np.ndarray]:
    """What a stored model says of the cells: mean profiles, and embeddings of an SE."""
    model = vc.io.load(folder / name, accelerator="cpu")
    if isinstance(model, vc.models.SE):
        return {"embedding": model.get_latent_representation(data)}
    of = {}
    for perturbation in ("A", "A+B", "D") if model.featured_names else ("A", "A+B"):
        predicted = vc.tl.predict_perturbation(data, perturbation, model=model, context="x", emit="mean", seed=0)
        of[perturbation] = predicted.X.toarray() if sparse.issparse(predicted.X) else predicted.X
    if getattr(model, "se", None) is not None:
        of["embedding"] = model.se.get_latent_representation(data)
    return of


def main() -> None:
    logging.disable(logging.CRITICAL)
    folder = HERE / f"format_{FORMAT}"
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = [(p, c) for c in "xy" for p in ("NT", "A", "B", "C") for _ in range(12)]
    level = rng.gamma(1, 4, 24) + 0.5
    fold = {"NT": 0, "A": 1, "B": 2, "C": 3}
    counts = np.stack([rng.poisson(level * np.where(np.arange(24) // 6 == fold[p] - 1, 3, 1)) for p, _ in labels])
    pert, ctx = (np.array(column) for column in zip(*labels, strict=True))
    np.savez_compressed(folder / "cells.npz", counts=counts.astype(np.uint8), pert=pert, ctx=ctx)
    data = cells(folder)
    network = {
        "n_hidden": 16,
        "n_feedforward": 16,
        "n_layers": 1,
        "n_heads": 2,
        "head_dim": 8,
        "set_size": 8,
        "n_encoder_layers": 1,
    }
    training = {"max_steps": 20, "accelerator": "cpu", "progress_bar": False, "min_cells": 5}
    vc.models.SE.setup_anndata(data)
    vectors = pd.DataFrame(rng.normal(size=(24, 6)).astype(np.float32), index=GENES)
    sizes = {"n_hidden": 16, "n_feedforward": 16, "n_layers": 1, "n_heads": 2, "n_output": 8, "length": 12}
    se = vc.models.SE(data, vectors, n_targets=(6, 3, 3), **sizes)
    se.train(max_steps=5, accelerator="cpu", progress_bar=False)
    se.save(folder / "se")
    common = {"n_top_genes": None, "network": network, "training": training}
    st = vc.tl.fit_state(data, **DESIGN, se=se, validate="contexts", **common)
    st.save(folder / "st")
    vc.tl.fit_state(data, **DESIGN, se=False, validate=False, perturbation_features=features(), **common).save(
        folder / "st_features"
    )
    for name in ("Additive", "ContextMean", "NearestContext"):
        vc.tl.fit_baseline(data, name, **DESIGN, scale="counts").save(folder / name.lower())
    vc.tl.fit_baseline(data, "Ridge", **DESIGN, scale="counts", perturbation_features=features()).save(folder / "ridge")
    arrays = {
        f"{name}/{what}": values
        for name in sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
        for what, values in predictions(name, folder, cells(folder)).items()
    }
    np.savez_compressed(folder / "predictions.npz", **arrays)
    (folder / "versions.json").write_text(json.dumps({"virtualcell": vc.__version__}) + "\n")


if __name__ == "__main__":
    main()
