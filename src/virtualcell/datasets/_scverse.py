"""The example data of scverse: what is where in each file, and one function that loads them all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anndata import AnnData

from virtualcell._errors import unknown_name
from virtualcell._files import read_cells
from virtualcell._numbers import as_numbers
from virtualcell.datasets._fetch import retrieve_unpinned
from virtualcell.datasets._tidy import (
    BATCH,
    CONTEXT,
    DOSE,
    PERTURBATION,
    check_control,
    counts_of,
    design_of,
    expression_of,
    labels_of,
)

logger = logging.getLogger(__name__)

EXAMPLE_DATA = "https://exampledata.scverse.org/pertpy"
_SCPERTURB = "CC BY 4.0, as part of scPerturb (Peidli et al. 2024, https://doi.org/10.1038/s41592-023-02144-y)"


@dataclass(frozen=True)
class ExampleData:
    """What a file of the example data holds, and where.

    Parameters
    ----------
    file
        Name of the file.
    what
        Kind of perturbation and cells.
    citation, licence
        Whom to cite, and what the data may be used for.
    perturbation_key, control
        Column of `obs` with the perturbation, and its label of unperturbed cells; `None` where these are not known for
        certain, and must be stated.
    context_key, context
        Column of `obs` with the context, or else the one context of all cells.
    batch_key
        Column of `obs` with the batch; `None` where there is none.
    dose_key
        Column of `obs` with the dose of a drug.
    layer
        Layer with raw counts; `None` for `X`.
    left_out
        Labels of the perturbation that are none, such as cells with several guides.
    """

    file: str
    what: str
    citation: str
    licence: str
    perturbation_key: str | None = "perturbation"
    control: str | None = "control"
    context_key: str | None = None
    context: str | None = None
    batch_key: str | None = None
    dose_key: str | None = None
    layer: str | None = None
    left_out: tuple[str, ...] = ()


EXAMPLES = {
    "adamson_2016_upr_perturb_seq": ExampleData(
        file="adamson_2016_upr_perturb_seq.h5ad",
        what="CRISPRi, K562",
        citation="Adamson et al. 2016, Cell 167, 1867, https://doi.org/10.1016/j.cell.2016.11.048",
        licence=_SCPERTURB,
        control=None,  # guides go by names of plasmids here
        context="K562",
    ),
    "dixit_2016": ExampleData(
        file="dixit_2016.h5ad",
        what="CRISPR knockout, K562 and mouse dendritic cells",
        citation="Dixit et al. 2016, Cell 167, 1853, https://doi.org/10.1016/j.cell.2016.11.038",
        licence="none stated; the measurements are public as GSE90063",
        perturbation_key="perturbation_name",
        context_key="cell_line",
    ),
    "frangieh_2021_rna": ExampleData(
        file="frangieh_2021_rna.h5ad",
        what="CRISPR knockout, melanoma cells in three conditions",
        citation="Frangieh et al. 2021, Nature Genetics 53, 332, https://doi.org/10.1038/s41588-021-00779-1",
        licence=_SCPERTURB,
        context_key="perturbation_2",
    ),
    "kang_2018": ExampleData(
        file="kang_2018.h5ad",
        what="interferon beta, blood cells of eight donors",
        citation="Kang et al. 2018, Nature Biotechnology 36, 89, https://doi.org/10.1038/nbt.4042",
        licence="none stated; the measurements are public as GSE96583",
        perturbation_key="label",
        control="ctrl",
        context_key="cell_type",
        batch_key="replicate",
    ),
    "mcfarland_2020": ExampleData(
        file="mcfarland_2020.h5ad",
        what="drugs and CRISPR knockout, cancer cell lines",
        citation="McFarland et al. 2020, Nature Communications 11, 4296, https://doi.org/10.1038/s41467-020-17440-w",
        licence=_SCPERTURB,
        context_key="cell_line",
        batch_key="channel",
        dose_key="dose_value",
    ),
    "norman_2019": ExampleData(
        file="norman_2019.h5ad",
        what="CRISPRa of genes and pairs, K562",
        citation="Norman et al. 2019, Science 365, 786, https://doi.org/10.1126/science.aax4438",
        licence="none stated; the measurements are public as GSE133344",
        perturbation_key="perturbation_name",
        context="K562",
        batch_key="gemgroup",
        layer="counts",
    ),
    "papalexi_2021": ExampleData(
        file="papalexi_2021.h5mu",
        what="CRISPR knockout, THP-1 with interferon gamma",
        citation="Papalexi et al. 2021, Nature Genetics 53, 322, https://doi.org/10.1038/s41588-021-00778-2",
        licence="none stated; the measurements are public as GSE153056",
        perturbation_key="gene_target",
        control="NT",
        context="THP-1",
        batch_key="replicate",
    ),
    "replogle_2022_k562_essential": ExampleData(
        file="replogle_2022_k562_essential.h5ad",
        what="CRISPRi of essential genes, K562",
        citation="Replogle et al. 2022, Cell 185, 2559, https://doi.org/10.1016/j.cell.2022.05.013",
        licence=_SCPERTURB,
        perturbation_key=None,  # users report labels that are no genes: https://github.com/scverse/pertpy/issues/916
        control=None,
        context="K562",
    ),
    "replogle_2022_rpe1": ExampleData(
        file="replogle_2022_rpe1.h5ad",
        what="CRISPRi of essential genes, RPE1",
        citation="Replogle et al. 2022, Cell 185, 2559, https://doi.org/10.1016/j.cell.2022.05.013",
        licence=_SCPERTURB,
        perturbation_key=None,  # see above
        control=None,
        context="RPE1",
    ),
    "schraivogel_2020_tap_screen_chr8": ExampleData(
        file="schraivogel_2020_tap_screen_chr8.h5ad",
        what="CRISPRi of enhancers, K562, a panel of genes",
        citation="Schraivogel et al. 2020, Nature Methods 17, 629, https://doi.org/10.1038/s41592-020-0837-5",
        licence=_SCPERTURB,
        context="K562",
        batch_key="replicate",
        left_out=("multiplet",),
    ),
    "srivatsan_2020_sciplex3": ExampleData(
        file="srivatsan_2020_sciplex3.h5ad",
        what="188 drugs at four doses, A549, K562 and MCF7",
        citation="Srivatsan et al. 2020, Science 367, 45, https://doi.org/10.1126/science.aax6234",
        licence=_SCPERTURB,
        context_key="cell_line",
        batch_key="replicate",
        dose_key="dose_value",
    ),
    "tian_2021_crispri": ExampleData(
        file="tian_2021_crispri.h5ad",
        what="CRISPRi, neurons from iPSC",
        citation="Tian et al. 2021, Nature Neuroscience 24, 1020, https://doi.org/10.1038/s41593-021-00862-0",
        licence=_SCPERTURB,
        context="iPSC-derived neurons",
        batch_key="batch",
    ),
}


def load(
    name: str,
    *,
    perturbation_key: str | None = None,
    control: str | Sequence[str] | None = None,
    context_key: str | None = None,
    batch_key: str | None = None,
    dose_key: str | None = None,
    layer: str | None = None,
    folder: str | Path | None = None,
) -> AnnData:
    """Load one of the example data sets of scverse, tidied.

    The files are at https://exampledata.scverse.org/pertpy, up to gigabytes in size. The checksum of the first download
    is kept beside the file and compared at every later call.

    ==================================  ============================================  =======================
    `name`                              what                                          please cite
    ==================================  ============================================  =======================
    "adamson_2016_upr_perturb_seq"      CRISPRi, K562                                 Adamson et al. 2016
    "dixit_2016"                        CRISPR knockout, K562 and mouse cells         Dixit et al. 2016
    "frangieh_2021_rna"                 CRISPR knockout, melanoma, three conditions   Frangieh et al. 2021
    "kang_2018"                         interferon beta, blood cells, eight donors    Kang et al. 2018
    "mcfarland_2020"                    drugs and CRISPR knockout, cancer cell lines  McFarland et al. 2020
    "norman_2019"                       CRISPRa of genes and pairs, K562              Norman et al. 2019
    "papalexi_2021"                     CRISPR knockout, THP-1 with interferon gamma  Papalexi et al. 2021
    "replogle_2022_k562_essential"      CRISPRi of essential genes, K562              Replogle et al. 2022
    "replogle_2022_rpe1"                CRISPRi of essential genes, RPE1              Replogle et al. 2022
    "schraivogel_2020_tap_screen_chr8"  CRISPRi of enhancers, K562, a panel of genes  Schraivogel et al. 2020
    "srivatsan_2020_sciplex3"           188 drugs at four doses, A549, K562, MCF7     Srivatsan et al. 2020
    "tian_2021_crispri"                 CRISPRi, neurons from iPSC                    Tian et al. 2021
    ==================================  ============================================  =======================

    Those of Adamson, Frangieh, McFarland, Replogle, Schraivogel, Srivatsan and Tian are from scPerturb, under CC BY
    4.0; for the others no licence is stated beyond the public deposits. :func:`available` has the full references.

    Parameters
    ----------
    name
        Name of the data set.
    perturbation_key
        Column of the file's `obs` with the perturbation, in place of the one noted here for the data set. For the two
        of Replogle it must be named.
    control
        Label of the control, or several, in place of the one noted. For "adamson_2016_upr_perturb_seq" and the two of
        Replogle it must be named.
    context_key
        Column of the file's `obs` with the context, in place of the one noted.
    batch_key
        Column of the file's `obs` with the batch, in place of the one noted.
    dose_key
        Column of the file's `obs` with the dose of a drug, in place of the one noted.
    layer
        Layer with raw counts, or "X", in place of the one noted for the data set.
    folder
        Where to keep the file; `vc.settings.cache_dir` by default.

    Returns
    -------
    Cells x genes, `X` raw counts (float32 CSR), of "papalexi_2021" the RNA alone. `obs`: `perturbation`, `context`,
    `batch` ("unknown" where the file has none) and, of drugs, `dose`, before all columns of the file; cells without a
    perturbation are left out. `uns["design"]` holds the arguments that name these columns:
    `vc.tl.fit_state(adata, **adata.uns["design"])`. It has no `dose_key` where some perturbed cells have no dose, as
    those of "mcfarland_2020" that no drug was given to: state it with the cells of drugs alone.

    Raises
    ------
    KeyError
        There is no data set of that name.
    ValueError
        A column, the control label or the counts are not where they should be: the message lists what the file has. Or
        the file has changed since it was downloaded first.
    ConnectionError
        The file cannot be downloaded. The message says where to put it by hand.

    Notes
    -----
    **None of these files was run with this version of virtualcell**: names of columns are as published by users of the
    data, and tested on small tables of the same form. Where a file differs, the call fails rather than guesses.

    Examples
    --------
    >>> adata = vc.datasets.load(
    ...     "replogle_2022_rpe1", perturbation_key="gene", control="non-targeting"
    ... )  # doctest: +SKIP
    """
    if name not in EXAMPLES:
        raise unknown_name("name", name, EXAMPLES, "`vc.datasets.available()` describes them.")
    noted = EXAMPLES[name]
    adata = expression_of(read_cells(retrieve_unpinned(f"{EXAMPLE_DATA}/{noted.file}", name=noted.file, folder=folder)))
    perturbation_key, control = perturbation_key or noted.perturbation_key, control or noted.control
    controls = [control] if isinstance(control, str) else None if control is None else list(control)
    context_key, batch_key = context_key or noted.context_key, batch_key or noted.batch_key
    layer, dose_key = layer or noted.layer, dose_key or noted.dose_key

    perturbation = labels_of(adata, name, "perturbation_key", perturbation_key)
    check_control(perturbation, name, perturbation_key, controls)
    one_context = context_key is None and noted.context is not None
    columns = {
        PERTURBATION: perturbation,
        CONTEXT: noted.context if one_context else labels_of(adata, name, "context_key", context_key),
        BATCH: "unknown" if batch_key is None else labels_of(adata, name, "batch_key", batch_key).fillna("unknown"),
    }
    obs = pd.DataFrame(columns, index=adata.obs_names).astype("category")
    if dose_key is not None:
        obs[DOSE] = as_numbers(labels_of(adata, name, "dose_key", dose_key))
    obs = obs.join(adata.obs.drop(columns=obs.columns, errors="ignore"))
    counts = counts_of(adata, name, None if layer == "X" else layer)
    labelled = (perturbation.notna() & ~perturbation.isin(noted.left_out) & obs[CONTEXT].notna()).to_numpy()
    if not labelled.all():
        logger.info("%s: %d of %d cells have no perturbation or context.", name, (~labelled).sum(), len(labelled))
    tidy = AnnData(counts[labelled], obs=obs[labelled].copy(), var=adata.var.copy())
    for key in columns:
        tidy.obs[key] = tidy.obs[key].cat.remove_unused_categories()
    tidy.var_names_make_unique()
    tidy.uns["design"] = design_of(controls[0] if len(controls) == 1 else controls)
    if dose_key is not None:
        without = int((~(tidy.obs[DOSE] > 0) & ~tidy.obs[PERTURBATION].isin(controls)).sum())
        if without:
            logger.warning("%s: %d perturbed cells have no dose; uns['design'] has no dose_key.", name, without)
        else:
            tidy.uns["design"]["dose_key"] = DOSE
    return tidy


def available() -> pd.DataFrame:
    """Return what :func:`load` can load: a table of data sets with what they are, whom to cite, and the licence.

    Besides these there are :func:`kang2018` and :func:`norman2019_mcfaline2024`, which are small, and
    :func:`synthetic`.

    Examples
    --------
    >>> vc.datasets.available().loc["norman_2019", "what"]
    'CRISPRa of genes and pairs, K562'
    """
    rows = {name: (data.what, data.citation, data.licence, data.file) for name, data in EXAMPLES.items()}
    columns = ["what", "citation", "licence", "file"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("name")
