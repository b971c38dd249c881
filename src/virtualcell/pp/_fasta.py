"""Protein sequences of genes, from a FASTA file or a mapping."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from virtualcell._reading import lines_of
from virtualcell.pp._genes import ENSEMBL_VERSION

logger = logging.getLogger(__name__)

# Ensembl's symbol, UniProt's, then Ensembl's gene id; whatever a description says stands behind them.
_GENE_NAME = (re.compile(r"\sgene_symbol:(\S+)"), re.compile(r"\sGN=(\S+)"), re.compile(r"\sgene:(\S+)"))
# The 20 amino acids, U and O, the ambiguous B and Z, and X: every residue that ESM-2 has a token for.
_RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWYUOBZX")
_NO_TOKEN = str.maketrans("*J", "XX")
_PIECES = 10_000


def isoforms_of_genes(sequences: str | Path | Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """Return the distinct isoforms of each gene, checked and in upper case."""
    records: Iterator[tuple[str, str]]
    if isinstance(sequences, Mapping):
        records = (
            (str(gene), sequence)
            for gene, given in sequences.items()
            for sequence in ([given] if isinstance(given, str) else given)
        )
    else:
        records = _named_records(Path(sequences))
    isoforms: dict[str, dict[str, None]] = {}
    replaced = 0
    for gene, sequence in records:
        cleaned = sequence.upper().removesuffix("*")
        replaced += sum(cleaned.count(residue) for residue in "*J")
        cleaned = cleaned.translate(_NO_TOKEN)
        wrong = sorted(set(cleaned) - _RESIDUES)
        if wrong or not cleaned:
            what = f"holds {wrong}, which are no amino acids" if wrong else "is empty"
            raise ValueError(
                f"A sequence of gene {gene!r} {what}. Allowed are {''.join(sorted(_RESIDUES))}, a stop codon '*' and J."
            )
        isoforms.setdefault(gene, {})[cleaned] = None
    if not isoforms:
        raise ValueError("sequences holds no gene.")
    if replaced:
        logger.warning(
            "%d residues '*' or 'J' inside sequences are read as X (unknown): ESM-2 has none such.", replaced
        )
    return {gene: list(distinct) for gene, distinct in isoforms.items()}


def _named_records(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (gene, sequence) of every record of a FASTA file whose header names a gene."""
    if not path.exists():
        raise FileNotFoundError(f"sequences={str(path)!r} does not exist.")
    nameless = []
    named = 0
    for header, sequence in _records(path):
        gene = next((found[1] for pattern in _GENE_NAME if (found := pattern.search(header))), None)
        if gene is None:
            nameless.append(header)
            continue
        named += 1
        yield re.sub(ENSEMBL_VERSION, r"\1", gene), sequence
    if not named:
        shown = f"the first is {'>' + nameless[0]!r}" if nameless else "there is no line that begins with '>'"
        raise ValueError(
            f"No header of {path.name} names a gene ({shown}). Known are gene_symbol: and gene: (Ensembl) and GN= "
            "(UniProt); or give a mapping {gene: sequence}."
        )
    if nameless:
        logger.warning(
            "%s: %d of %d records name no gene and are left out.", path.name, len(nameless), len(nameless) + named
        )


def _records(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (header, sequence) of every record."""
    header, lines = None, []
    for _, line in lines_of(path, "FASTA file"):
        if line.startswith(">"):
            if header is not None:
                yield header, "".join(lines)
            header, lines = line[1:].strip(), []
        elif line := line.strip():
            lines.append(line)
            if len(lines) > _PIECES:  # of a file with few letters a line, which would take more memory than the letters
                lines = ["".join(lines)]
    if header is not None:
        yield header, "".join(lines)
