"""A synthetic Perturb-seq screen with a known truth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from virtualcell._settings import seed_of

# Standard deviations on the natural-log scale of a rate.
_GENE_SPREAD = 1.3  # of genes within a profile
_CONTEXT_SPREAD = 0.8  # of a gene between contexts, through the programmes
_CONTEXT_NOISE = 0.2  # of a gene between contexts, through nothing else
_CELL_SPREAD = 0.3  # of a gene between cells of one group, through the programmes
_BATCH_SPREAD = 0.1  # of a gene between batches
_LIBRARY_SPREAD = 0.4  # of library sizes


def synthetic(
    *,
    n_contexts: int = 4,
    n_perturbations: int = 20,
    n_genes: int = 500,
    n_cells_per_group: int = 50,
    n_control_cells: int = 200,
    n_batches: int = 2,
    n_programmes: int = 8,
    effect_size: float = 0.3,
    context_specificity: float = 1.0,
    residual_expression: float = 0.2,
    dispersion: float = 0.1,
    library_size: float = 2000,
    control: str = "non-targeting",
    seed: int | None = None,
) -> AnnData:
    r"""Draw a CRISPRi screen in several cell types, with raw counts and a known truth.

    Gene g has weights :math:`W_g` (unit length) on a few programmes. Context c has programme activities
    :math:`a_c \sim N(0, 1)` and the log profile :math:`\mu_{cg} = \mu_g + 0.8\, W_g a_c + \text{noise}`. Knocking down
    gene p pushes the programmes by :math:`v_p = M W_p` (M random), each gated by its activity in the context:

    .. math:: \Delta_{cpg} = \sum_k W_{gk}\, v_{pk}\, (1 + s \tanh a_{ck}), \qquad \Delta_{cpp} = \log r

    so the context-specific part of an effect can be told from the control cells, and the effect of an unseen target
    from the programmes it belongs to. Cells scatter along the programmes, batches shift the genes by about 10 %, and
    counts are negative binomial: variance :math:`m + \text{dispersion}\; m^2` around the cell's mean m.

    Parameters
    ----------
    n_contexts
        Number of cell types.
    n_perturbations
        Number of targets.
    n_genes
        Number of genes, among them the targets.
    n_batches
        Number of batches.
    n_programmes
        Number of programmes that genes belong to.
    n_cells_per_group
        Number of cells of each perturbation in each context.
    n_control_cells
        Number of control cells in each context.
    effect_size
        Root mean square over genes of the natural-log shift of a middling perturbation, before gating; perturbations
        range from half of it to one and a half times. 0 leaves only the knockdown of the target itself.
    context_specificity
        The s above, from 0 (the same effect in every context) to 1 (a programme may be shut off).
    residual_expression
        The r above: what is left of the target in its own cells.
    dispersion
        Overdispersion of the counts.
    library_size
        Median counts per cell; log-normal with a spread of 0.4.
    control
        Label of the control cells.
    seed
        Seed of everything drawn; by default `vc.settings.seed`.

    Returns
    -------
    Cells x genes in random order, `X` raw counts (float32 CSR). `obs`: `target_gene`, `cell_type`, `batch`. The truth,
    free of noise and batch: `varm["truth_control"]` (genes x contexts), the share of each gene in the controls' RNA;
    `varm["truth_<cell type>"]` (genes x perturbations), the natural-log fold change of that share;
    `varm["programmes"]` (W); `uns["truth"]` with `programme_activity` (a) and `programme_effect` (v). `uns["design"]`
    holds the names of the columns and the control label: `vc.tl.fit_state(adata, **adata.uns["design"])`.

    Raises
    ------
    ValueError
        More than half of the genes would be targets, or a number is out of its range.

    Examples
    --------
    >>> adata = vc.datasets.synthetic(n_contexts=2, n_perturbations=5, n_genes=50, n_cells_per_group=10, seed=0)
    >>> adata.n_obs, adata.n_vars
    (500, 50)
    >>> truth = adata.varm["truth_type_1"]  # log fold changes, genes x perturbations
    >>> bool((truth.loc[truth.columns].to_numpy().diagonal() < 0).all())  # every target is knocked down
    True
    """
    _check(n_perturbations, n_genes, context_specificity)
    for argument, value in (
        ("residual_expression", residual_expression),
        ("dispersion", dispersion),
        ("library_size", library_size),
    ):
        if value <= 0:
            raise ValueError(f"{argument}={value} must be more than 0.")
    rng = np.random.default_rng(seed_of(seed))
    truth = _draw_truth(
        rng, (n_contexts, n_perturbations, n_genes, n_programmes), effect_size, context_specificity, residual_expression
    )
    per_context = np.append(
        np.repeat(np.arange(n_perturbations), n_cells_per_group), [n_perturbations] * n_control_cells
    )
    perturbation = np.tile(per_context, n_contexts)
    context = np.repeat(np.arange(n_contexts), len(per_context))
    order = rng.permutation(len(context))
    context, perturbation = context[order], perturbation[order]
    batch = rng.integers(n_batches, size=len(order))

    # the control is perturbation number n_perturbations, with no shift
    shift = np.concatenate([truth.shift, np.zeros((n_contexts, 1, n_genes))], axis=1)
    log_rate = truth.profile[context] + shift[context, perturbation]
    log_rate += rng.normal(scale=_BATCH_SPREAD, size=(n_batches, n_genes))[batch]
    log_rate += rng.normal(scale=_CELL_SPREAD, size=(len(order), n_programmes)) @ truth.weights.T
    total = library_size * rng.lognormal(sigma=_LIBRARY_SPREAD, size=(len(order), 1))
    mean = _share(log_rate) * total
    counts = rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, size=mean.shape))

    genes = _numbered("GENE", n_genes, width=max(3, len(str(n_genes))))
    contexts, batches = _numbered("type_", n_contexts), _numbered("batch_", n_batches)
    names = np.append(np.array(genes)[truth.targets], control)
    obs = {
        "target_gene": pd.Categorical(names[perturbation]),
        "cell_type": pd.Categorical(np.array(contexts)[context]),
        "batch": pd.Categorical(np.array(batches)[batch]),
    }
    adata = AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(obs, index=pd.Index(_numbered("cell_", len(order), width=6))),
        var=pd.DataFrame(index=pd.Index(genes)),
    )
    _note_truth(adata, truth, contexts, names[:-1])
    adata.uns["design"] = {
        "perturbation_key": "target_gene",
        "control": control,
        "context_key": "cell_type",
        "batch_key": "batch",
    }
    return adata


def _check(n_perturbations: int, n_genes: int, context_specificity: float) -> None:
    if not 0 < n_perturbations <= n_genes // 2:
        raise ValueError(
            f"n_perturbations={n_perturbations} must be from 1 to half of n_genes={n_genes}: targets are drawn from "
            "the better expressed half."
        )
    if not 0 <= context_specificity <= 1:
        raise ValueError(f"context_specificity={context_specificity} must lie between 0 and 1.")


class _Truth(NamedTuple):
    """What cells are drawn from: log profiles, their shifts, the genes that are targets, and the programmes."""

    profile: np.ndarray  # (n_contexts, n_genes)
    shift: np.ndarray  # (n_contexts, n_perturbations, n_genes)
    targets: np.ndarray  # (n_perturbations,)
    weights: np.ndarray  # (n_genes, n_programmes)
    activity: np.ndarray  # (n_contexts, n_programmes)
    push: np.ndarray  # (n_perturbations, n_programmes)


def _draw_truth(
    rng: np.random.Generator,
    sizes: tuple[int, int, int, int],
    effect_size: float,
    context_specificity: float,
    residual_expression: float,
) -> _Truth:
    n_contexts, n_perturbations, n_genes, n_programmes = sizes
    weights = rng.normal(size=(n_genes, n_programmes)) * (rng.random((n_genes, n_programmes)) < 0.25)
    weights[np.arange(n_genes), rng.integers(n_programmes, size=n_genes)] += 1
    # Unit length makes the scatter of cells multiply the mean of every gene alike, so it leaves the truth as it is.
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    activity = rng.normal(size=(n_contexts, n_programmes))
    base = rng.normal(scale=_GENE_SPREAD, size=n_genes)
    profile = base + _CONTEXT_SPREAD * activity @ weights.T
    profile += rng.normal(scale=_CONTEXT_NOISE, size=profile.shape)

    targets = np.sort(rng.choice(np.argsort(base)[n_genes // 2 :], size=n_perturbations, replace=False))
    push = weights[targets] @ rng.normal(size=(n_programmes, n_programmes))
    strength = effect_size * rng.uniform(0.5, 1.5, size=n_perturbations)
    push *= (strength / np.sqrt(np.mean((push @ weights.T) ** 2, axis=1)))[:, None]
    gate = 1 + context_specificity * np.tanh(activity)
    shift = np.einsum("gk,pk,ck->cpg", weights, push, gate)
    shift[:, np.arange(n_perturbations), targets] = np.log(residual_expression)
    return _Truth(profile, shift, targets, weights, activity, push)


def _note_truth(adata: AnnData, truth: _Truth, contexts: list[str], perturbations: np.ndarray) -> None:
    """Write the truth beside the cells that were drawn from it."""
    genes, programmes = list(adata.var_names), _numbered("programme_", truth.weights.shape[1])
    share = _share(truth.profile)
    log_fold_change = np.log(_share(truth.profile[:, None] + truth.shift) / share[:, None])
    adata.varm["programmes"] = pd.DataFrame(truth.weights, index=genes, columns=programmes)
    adata.varm["truth_control"] = pd.DataFrame(share.T, index=genes, columns=contexts)
    for name, effects in zip(contexts, log_fold_change, strict=True):
        adata.varm[f"truth_{name}"] = pd.DataFrame(effects.T, index=genes, columns=perturbations)
    adata.uns["truth"] = {
        "programme_activity": pd.DataFrame(truth.activity, index=contexts, columns=programmes),
        "programme_effect": pd.DataFrame(truth.push, index=perturbations, columns=programmes),
    }


def _share(log_rate: np.ndarray) -> np.ndarray:
    """Turn log rates into shares of the cell's RNA, which sum to one over genes (the last axis)."""
    rate = np.exp(log_rate)
    return rate / rate.sum(axis=-1, keepdims=True)


def _numbered(stem: str, number: int, width: int = 1) -> list[str]:
    """Name things by number, from 1."""
    return [f"{stem}{i + 1:0{width}d}" for i in range(number)]
