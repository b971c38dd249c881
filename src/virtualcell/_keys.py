"""Every key that virtualcell writes to an AnnData, and every name with a meaning of its own, once."""

from __future__ import annotations

# parts of a split, in obs[split_key]
SPLITS = ("train", "val", "test")

# Stands for the context where a design has none, and in tables for "over all contexts" or "over all perturbations".
ALL = "(all)"

# Text that files have where a label is missing.
MISSING = {"", "nan", "NaN", "NAN", "NA", "N/A", "n/a", "<NA>", "None", "NULL", "null", "NaT"}

# obs
SPLIT = "split"
KNOCKDOWN = "knockdown"  # residual expression of the cell's own target
RESPONDED = "knockdown_responded"
AGREEMENT = "agreement"  # of a prediction: how far experiments agree on the perturbation
EXTRAPOLATION = "extrapolation"  # of a prediction: how far its control cells lie outside of the training contexts
EXPECTED_ERROR = "expected_error"  # of a prediction: mean absolute error of the mean that its standard errors suggest
CONTROL_BARCODE = "control_barcode"  # of a predicted cell: the control cell it started from
LIBRARY_SIZE = "library_size"  # of a predicted cell, where the design names no column of its own

# obsm
X_STATE = "X_state"
SENTENCE = "cell_sentence"
SENTENCE_EXPRESSION = "cell_sentence_expression"

# var
GENE_TOKEN = "gene_token"

# layers of a prediction
COUNTS_LAYER = "counts"
CONTROL_LAYER = "control"

# varm of a prediction, genes x groups
CHANGE = "change"  # of each gene's mean from the control cells
STANDARD_ERROR = "standard_error"  # of that change

# uns
UNS = "virtualcell"
GROUPS = "groups"  # of a prediction, uns["virtualcell"]["groups"]: perturbation and context of the columns of varm
SPLIT_MANIFEST = "split_manifest"  # uns["virtualcell"]["split_manifest"][key of obs]
