"""From AnnData rows to tensors: the expression matrix, matched sets of cells, cell sentences."""
