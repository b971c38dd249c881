from __future__ import annotations

import numpy as np
import pytest

import virtualcell as vc
from virtualcell._arguments import require_number, require_whole


@pytest.mark.parametrize("value", ["3", 3.0, 2.5, True, None, 0, float("nan"), np.float32(3), [3]])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^n=.* is not a whole number of at least 1\.$"):
        require_whole("n", value)


@pytest.mark.parametrize("value", ["0.3", True, None, -0.1, 1.0, float("nan"), float("inf"), 1j, [0.3]])
def test_what_is_no_fraction(value):
    with pytest.raises(ValueError, match=r"^x=.* is not a number of at least 0 and less than 1\.$"):
        require_number("x", value, below=1)


def test_numbers_of_any_type():
    assert [require_whole("n", n) for n in (1, np.int64(3), np.uint8(7))] == [1, 3, 7]
    assert require_whole("n", 0, 0) == 0
    assert [require_number("x", x) for x in (0, 2.5, np.float32(0.5), np.int64(3))] == [0, 2.5, 0.5, 3]
    with pytest.raises(ValueError, match=r"^n=0 is not a whole number of at least 1\. Say 1\.$"):
        require_whole("n", 0, remedy="Say 1.")


def test_functions_of_pp_check_their_numbers(tmp_path):
    adata = vc.datasets.synthetic(n_perturbations=2, n_genes=60, n_cells_per_group=20)
    table = vc.pp.expression_gene_embeddings(adata, n_comps=4)
    (tmp_path / "sets.gmt").write_text(
        "".join(f"s{i}\tx\t{chr(9).join(f'G{j}' for j in range(i, i + 8))}\n" for i in range(9))
    )
    design = {"perturbation_key": "target_gene", "control": "non-targeting"}
    calls = {
        "n_comps": [
            lambda x: vc.pp.gene_features(tmp_path / "sets.gmt", n_comps=x),
            lambda x: vc.pp.expression_gene_embeddings(adata, n_comps=x),
        ],
        "length": [lambda x: vc.pp.cell_sentences(adata, table, length=x)],
        "min_cells": [lambda x: vc.pp.knockdown_efficiency(adata, **design, min_cells=x)],
        "max_length": [lambda x: vc.pp.gene_embeddings({"A": "MA"}, max_length=x)],
        "residues_per_batch": [lambda x: vc.pp.gene_embeddings({"A": "MA"}, residues_per_batch=x)],
    }
    for argument, functions in calls.items():
        for call in functions:
            for value in ("5", 5.0, True):
                with pytest.raises(ValueError, match=f"{argument}={value!r} is not a whole number"):
                    call(value)
    calls = {
        "min_genes": [lambda x: vc.pp.gene_features(tmp_path / "sets.gmt", min_genes=x)],
        "max_genes": [lambda x: vc.pp.gene_features(tmp_path / "sets.gmt", max_genes=x)],
        "min_score": [lambda x: vc.pp.gene_features(tmp_path / "sets.gmt", min_score=x)],
        "threshold": [lambda x: vc.pp.knockdown_efficiency(adata, **design, threshold=x)],
        "cell_threshold": [lambda x: vc.pp.knockdown_efficiency(adata, **design, cell_threshold=x)],
        "val_fraction": [lambda x: vc.pp.split(adata, **design, holdout={"fraction": 0.2}, val_fraction=x)],
    }
    for argument, functions in calls.items():
        for call in functions:
            for value in ("0.3", -1, float("nan"), True):
                with pytest.raises(ValueError, match=f"{argument}={value!r} is not a number of at least 0"):
                    call(value)
    everything = vc.pp.gene_features(tmp_path / "sets.gmt", n_comps=2, min_genes=0, max_genes=float("inf"))
    assert len(everything) == 16
