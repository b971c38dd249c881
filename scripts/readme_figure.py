"""Draw the figure of the README from real cells: IFN-beta in B cells, whose stimulated cells the model has not seen.

python scripts/readme_figure.py ../shared/data/kang2018_pbmc_ifnb.h5ad docs/_static/readme.png
"""

from __future__ import annotations

import sys

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt

import virtualcell as vc

mpl.use("agg")
data, figure = sys.argv[1:]
adata = ad.read_h5ad(data)
design = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}
vc.pp.split(adata, **design, holdout={"contexts": ["B"]})
vc.tl.fit_state(adata, **design, split_key="split", se=False)
predicted = vc.tl.predict_perturbation(adata, "IFN-beta", context="B")

fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
vc.pl.perturbation_shift(predicted, adata, context="B", ax=left)
vc.pl.de_agreement(predicted, adata, context="B", ax=right)
fig.suptitle("IFN-β in B cells of Kang et al. 2018; no stimulated B cell was seen in training")
fig.savefig(figure, dpi=110)
