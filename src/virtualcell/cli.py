"""The command `virtualcell`: the calls of the package on files, for batch jobs.

Only options that were given are passed on, under the names of the arguments they stand for, so that defaults are those
of the functions. Nothing that takes time to import is imported before a command runs.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import virtualcell as vc
from virtualcell import _files

if TYPE_CHECKING:
    from virtualcell.models import SE, ST

# What a wrong call, a wrong file or an optional package that is missing raises; anything else is a fault of ours, whose
# traceback is shown.
_EXPECTED = (KeyError, ValueError, TypeError, OSError, ImportError, FloatingPointError)
_OWN_DATA = ("kang2018", "norman2019_mcfaline2024", "synthetic")  # beside those of `vc.datasets.load`
_SCALES = ("counts", "log1p")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        What was typed after `virtualcell`; by default what the process was started with.

    Returns
    -------
    Exit status: 0, or 2 where the call, a file or a column of it was wrong, which is said in one sentence on stderr.

    Raises
    ------
    SystemExit
        Of the parser, with status 2 for an unknown option, and 0 after `--help` and `--version`.
    """
    given = vars(parser().parse_args(arguments))
    run, debug = given.pop("run"), given.pop("debug")
    try:
        # a log says what was done; a bar in a file of a batch system is thousands of lines
        with vc.settings.override(verbosity="info", progress=sys.stderr.isatty()):
            run(given)
    except _EXPECTED as error:
        if debug:
            raise
        sys.stderr.write(f"virtualcell: error: {_sentence(error)}\n")
        return 2
    return 0


def _sentence(error: BaseException) -> str:
    """Return what an error says, and, where it is not one of ours, who raised it."""
    message = str(error.args[0] if type(error) is KeyError and error.args else error)  # its own text is in quotes
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    where = frame.f_globals.get("__name__", "").partition(".")[0]
    return message if where == "virtualcell" else f"{message} (raised by {where}; --debug shows where)"


# -- options ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(prog="virtualcell", description="Predict what perturbations do to single cells.")
    top.add_argument("--version", action="version", version=f"virtualcell {vc.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, describe, text) in COMMANDS.items():
        one = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS, allow_abbrev=False
        )
        describe(one)
        one.add_argument("--overwrite", action="store_true", default=False, help="replace output that is there")
        one.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        one.set_defaults(run=run)
    return top


def _pair(text: str) -> tuple[str, object]:
    """Read KEY=VALUE, where the value is a number, True, False, None, a list or a dictionary of Python, or text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE, such as max_steps=500")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _suite(text: str) -> str | list[str]:
    return text.split(",") if "," in text else text


_Option = tuple[str, dict[str, Any]]
_COLUMN: dict[str, Any] = {"metavar": "COLUMN"}
_PAIRS: dict[str, Any] = {"metavar": "KEY=VALUE", "nargs": "+", "type": _pair}
_DESIGN: list[_Option] = [
    ("--perturbation-key", {**_COLUMN, "help": "column of obs with the perturbation"}),
    ("--control", {"metavar": "LABEL", "nargs": "+", "help": "label of control cells in that column, or several"}),
    ("--context-key", {**_COLUMN, "help": "column with the context: cell type, cell line"}),
]
_DOSE: list[_Option] = [("--dose-key", {**_COLUMN, "help": "column with the dose of the drug"})]
_LABELS: list[_Option] = [
    ("--combination-separator", {"metavar": "TEXT", "help": "between the parts of combinations, +; '' for never"}),
    *_DOSE,
]
_UNTREATED: list[_Option] = [
    ("--untreated", {"action": "store_true", "help": "all cells are control cells, whatever obs says"})
]
_BATCH: list[_Option] = [("--batch-key", {**_COLUMN, "help": "column with the experimental batch"})]
_MATRIX: list[_Option] = [
    ("--layer", {"help": "layer with the expression, X by default"}),
    ("--scale", {"choices": _SCALES, "help": "whether that is raw counts or log1p of counts per 10,000"}),
]
_LIBRARY: list[_Option] = [("--library-size-key", {**_COLUMN, "help": "column with the library size"})]
_GENES: list[_Option] = [("--gene-key", {**_COLUMN, "help": "column of var with the names of the genes"})]
_MODALITY: list[_Option] = [("--modality", {"help": "expression modality of an h5mu file, rna by default"})]
_SEED: list[_Option] = [("--seed", {"type": int, "help": "seed of everything random, 0 by default"})]


def _add(one: argparse.ArgumentParser, *options: _Option, required: Sequence[str] = ()) -> None:
    for flag, how in options:
        one.add_argument(flag, **{**how, "required": flag in required})


def _add_output(one: argparse.ArgumentParser, suffixes: Sequence[str], what: str) -> None:
    one.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help=f"{what}: {', '.join(suffixes)}")


def _describe_fit(one: argparse.ArgumentParser) -> None:
    one.add_argument("data", type=Path, help="cells: .h5ad, .h5mu or .zarr")
    _add(one, *_DESIGN, *_BATCH, *_LABELS, required=("--perturbation-key", "--control"))
    _add(one, ("--split-key", {**_COLUMN, "help": "column with train, val and test"}))
    _add(one, *_MATRIX, *_LIBRARY, *_GENES, *_MODALITY)
    one.add_argument("--n-top-genes", type=_count_or_all, metavar="N", help="variable genes to model, or all")
    one.add_argument("--perturbation-features", type=Path, metavar="FILE", help="table: perturbations x features")
    se = one.add_mutually_exclusive_group()
    se.add_argument("--se", **_PAIRS, help="options of SE, such as gene_embeddings=esm2.parquet max_steps=500")
    se.add_argument("--no-se", dest="se", action="store_const", const=False, help="no cell embedding")
    one.add_argument("--init-from", type=Path, metavar="FOLDER", help="saved ST or SE to go on from")
    one.add_argument("--size", choices=("auto", "small", "medium", "large"), help="size of the networks")
    one.add_argument("--network", **_PAIRS, help="options of ST, such as preset=published n_networks=3")
    one.add_argument("--training", **_PAIRS, help="options of the training, such as max_steps=500 accelerator=gpu")
    validate = one.add_mutually_exclusive_group()
    validate.add_argument("--validate", choices=("contexts", "perturbations", "cells"), help="what is left out to ask")
    validate.add_argument("--no-validate", dest="validate", action="store_const", const=False, help="no verdict")
    _add(one, *_SEED)
    one.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="where the fitted model goes")
    one.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="the data with embedding, verdict and model: .h5ad, .h5mu"
    )


def _describe_predict(one: argparse.ArgumentParser) -> None:
    one.add_argument("data", type=Path, help="control cells: .h5ad, .h5mu or .zarr")
    one.add_argument(
        "--perturbation", nargs="+", metavar="NAME", help="perturbations, A+B for both; by default all learned from"
    )
    one.add_argument("--model", type=Path, metavar="FOLDER", help="fitted model; by default the one in the data")
    one.add_argument("--drug", help="in place of a name, with --dose")
    one.add_argument("--dose", type=float, help="dose of the drug")
    one.add_argument("--context", metavar="LABEL", help="context whose control cells to take; all by default")
    one.add_argument("--n-cells", type=int, metavar="N", help="cells per perturbation and context")
    one.add_argument("--n-samples", type=int, metavar="N", help="draws of control cells for standard errors")
    one.add_argument("--emit", choices=("cells", "mean"), help="single cells, or one mean profile each")
    one.add_argument("--fallback", choices=("best",), help="best: the best baseline where ST was found worse")
    _add(one, *_MATRIX, *_LIBRARY, *_DESIGN, *_BATCH, *_LABELS, *_UNTREATED)
    one.add_argument("--min-gene-coverage", type=float, metavar="SHARE", help="share of the model's genes needed")
    _add(one, *_SEED, *_MODALITY)
    _add_output(one, (".h5ad",), "predicted cells")


def _describe_screen(one: argparse.ArgumentParser) -> None:
    one.add_argument("data", type=Path, help="control cells: .h5ad, .h5mu or .zarr")
    one.add_argument(
        "--perturbations", nargs="+", metavar="NAME", help="all that the model knows by default; features: all of those"
    )
    one.add_argument("--model", type=Path, metavar="FOLDER", help="fitted model; by default the one in the data")
    one.add_argument("--context", metavar="LABEL", help="context whose control cells to take")
    one.add_argument("--objective", choices=("effect", "toward"), help="rank by strength, or by the way to a target")
    one.add_argument("--target", metavar="LABEL", help="where toward leads: a perturbation or a context")
    one.add_argument("--up", nargs="+", metavar="GENE", help="or genes that are to rise")
    one.add_argument("--down", nargs="+", metavar="GENE", help="and genes that are to fall")
    one.add_argument("--n-cells", type=int, metavar="N", help="control cells to start from")
    one.add_argument("--alpha", type=float, help="local false sign rate below which a gene counts as moved")
    _add(one, *_MATRIX, *_LIBRARY, *_DESIGN, *_BATCH, *_LABELS, *_UNTREATED)
    one.add_argument("--min-gene-coverage", type=float, metavar="SHARE", help="share of the model's genes needed")
    _add(one, *_SEED, *_MODALITY)
    _add_output(one, _files.TABLES, "a row per perturbation, the best first; ten are printed")


def _describe_embed(one: argparse.ArgumentParser) -> None:
    one.add_argument("data", type=Path, help="cells: .h5ad, .h5mu or .zarr")
    one.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="saved SE, or an ST that carries one")
    _add(one, *_MATRIX, *_GENES)
    one.add_argument("--key-added", metavar="KEY", help="key of obsm to write, X_state by default")
    one.add_argument("--batch-size", type=int, metavar="N", help="cells at a time")
    one.add_argument("--precision", choices=("auto", "float32", "bf16"), help="of the computation")
    _add(one, *_MODALITY)
    _add_output(one, (".h5ad", ".h5mu"), "the cells with their embedding")


def _describe_evaluate(one: argparse.ArgumentParser) -> None:
    one.add_argument("predicted", type=Path, help="predicted cells: .h5ad, .h5mu or .zarr")
    one.add_argument("observed", type=Path, help="real cells, perturbed and control")
    _add(one, *_DESIGN, *_LABELS, *_GENES)
    one.add_argument("--suite", type=_suite, metavar="NAME[,NAME]", help="standard, vcc2025, vcc2026, full, or metrics")
    _add(one, *_MATRIX, *_LIBRARY)
    one.add_argument("--predicted-scale", choices=_SCALES, help="scale of the predicted cells, log1p by default")
    one.add_argument("--genes", nargs="+", metavar="GENE", help="genes to score; by default both sides have the same")
    one.add_argument("--predicted-genes", action="store_true", help="score the genes that were predicted")
    one.add_argument("--predicted-control", action="store_true", help="predicted effects against predicted controls")
    one.add_argument("--ceiling", action="store_true", help="score halves of the data against each other too")
    one.add_argument("--baseline", metavar="FILE", help="predicted cells of a baseline, or generic")
    one.add_argument("--n-jobs", type=int, metavar="N", help="threads, -1 for all cores")
    _add(one, *_SEED, *_MODALITY)
    _add_output(one, _files.TABLES, "scores of every perturbation; their means are printed")


def _describe_gene_embeddings(one: argparse.ArgumentParser) -> None:
    one.add_argument("sequences", type=Path, help="FASTA file of proteins, may be gzipped")
    one.add_argument("--model", help="name of an ESM-2 model, or its weight file")
    one.add_argument("--max-length", type=int, metavar="N", help="residues in a window")
    one.add_argument("--residues-per-batch", type=int, metavar="N", help="residues at a time")
    one.add_argument("--cache", type=Path, metavar="FOLDER", help="keep vectors there, to go on after an interruption")
    one.add_argument("--device", help="auto, cpu, cuda, cuda:1")
    _add_output(one, _files.TABLES, "genes x dimensions")


def _describe_datasets(one: argparse.ArgumentParser) -> None:
    one.add_argument("name", nargs="?", help="data set; without a name they are listed")
    _add(one, *_DESIGN, *_BATCH, *_DOSE)
    one.add_argument("--layer", help="layer with raw counts, for a file that has them elsewhere")
    one.add_argument("--folder", type=Path, help="where to keep the download; the user's cache folder by default")
    one.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="tidied cells: .h5ad; without it they are fetched"
    )


# -- commands ---------------------------------------------------------------------------------------------------------


def _fit(given: dict[str, Any]) -> None:
    model, output, overwrite = given.pop("model"), given.pop("output", None), given.pop("overwrite")
    _files.require_free(model / "model.safetensors", overwrite=overwrite)
    if output is not None:
        _files.require_free(output, overwrite=overwrite, suffixes=_files.suffix_like(given["data"]))
    adata = _files.read_cells(given.pop("data"))
    for name in ("network", "training", "se"):
        if isinstance(given.get(name), list):
            given[name] = dict(given[name])
    if isinstance(given.get("se"), Mapping) and "gene_embeddings" in given["se"]:
        given["se"]["gene_embeddings"] = vc.pp.read_gene_embeddings(given["se"]["gene_embeddings"])
    if "perturbation_features" in given:
        given["perturbation_features"] = vc.pp.read_gene_embeddings(given["perturbation_features"])
    if "init_from" in given:
        given["init_from"] = vc.io.load(given["init_from"])
    st = vc.tl.fit_state(adata, **given)
    vc.io.save(st, model, overwrite=overwrite)
    if output is not None:
        _files.write_cells(adata, output)


def _predict(given: dict[str, Any]) -> None:
    output = given.pop("output")
    _files.require_free(output, overwrite=given.pop("overwrite"), suffixes=[".h5ad"])
    adata = _files.read_cells(given.pop("data"))
    if "model" in given:
        given["model"] = vc.io.load(given["model"])
    _files.write_cells(vc.tl.predict_perturbation(adata, **given), output)


def _screen(given: dict[str, Any]) -> None:
    output = given.pop("output")
    _files.require_free(output, overwrite=given.pop("overwrite"), suffixes=_files.TABLES)
    signature = {part: given.pop(part) for part in ("up", "down") if part in given}
    if signature and "target" in given:
        raise ValueError("--target and --up or --down say two targets: leave one of them out.")
    if signature:
        given["target"] = signature
    adata, names = _files.read_cells(given.pop("data")), given.pop("perturbations", None)
    if "model" in given:
        given["model"] = vc.io.load(given["model"])
    # the word that stands for all is one name, and no list
    table = vc.tl.screen(adata, names[0] if names == ["features"] else names, **given)
    _files.write_table(table.reset_index(), output)
    sys.stdout.write(table.head(10).to_string() + "\n")


def _embed(given: dict[str, Any]) -> None:
    output = given.pop("output")
    _files.require_free(output, overwrite=given.pop("overwrite"), suffixes=_files.suffix_like(given["data"]))
    adata, folder = _files.read_cells(given.pop("data")), given.pop("model")
    vc.tl.embed(adata, _se_in(vc.io.load(folder), folder), **given)
    _files.write_cells(adata, output)


def _se_in(model: SE | ST, folder: Path) -> SE:
    """Return a model that embeds: itself, or the SE that it carries."""
    se = model if isinstance(model, vc.models.SE) else getattr(model, "se", None)
    if se is None:
        raise ValueError(f"--model {folder} is a {type(model).__name__} without an SE. Fit it without --no-se.")
    return se


def _evaluate(given: dict[str, Any]) -> None:
    output = given.pop("output")
    _files.require_free(output, overwrite=given.pop("overwrite"), suffixes=_files.TABLES)
    predicted, observed = (_files.read_cells(given.pop(side)) for side in ("predicted", "observed"))
    if given.pop("predicted_genes", False):
        given["genes"] = list(predicted.var_names)
    if given.get("baseline", "generic") != "generic":
        given["baseline"] = _files.read_cells(Path(given["baseline"]))
    scores = vc.tl.evaluate(predicted, observed, **given)
    _files.write_table(scores, output)
    summary = vc.tl.summarize(scores)
    sys.stdout.write(summary.to_string(index=False) + "\n")
    if note := summary.attrs.get("note"):
        sys.stdout.write(f"\n{note}\n")


def _gene_embeddings(given: dict[str, Any]) -> None:
    output = given.pop("output")
    _files.require_free(output, overwrite=given.pop("overwrite"), suffixes=_files.TABLES)
    _files.write_table(vc.pp.gene_embeddings(given.pop("sequences"), **given).reset_index(), output)


def _datasets(given: dict[str, Any]) -> None:
    output, overwrite, name = given.pop("output", None), given.pop("overwrite"), given.pop("name", None)
    if name is None:
        own = {one: inspect.getdoc(getattr(vc.datasets, one)).partition("\n")[0] for one in _OWN_DATA}
        listed = {**own, **vc.datasets.available()["what"]}
        sys.stdout.writelines(f"{one:34}{what}\n" for one, what in listed.items())
        return
    if output is not None:
        _files.require_free(output, overwrite=overwrite, suffixes=[".h5ad"])
    adata = getattr(vc.datasets, name)(**given) if name in _OWN_DATA else vc.datasets.load(name, **given)
    if output is not None:
        _files.write_cells(adata, output)


COMMANDS: dict[str, tuple[Callable, Callable, str]] = {
    "fit": (_fit, _describe_fit, "Fit SE and ST on a screen, and save the model."),
    "predict": (_predict, _describe_predict, "Predict the cells that perturbations would make of control cells."),
    "screen": (_screen, _describe_screen, "Rank perturbations by what they are predicted to do."),
    "embed": (_embed, _describe_embed, "Embed cells with a trained SE."),
    "evaluate": (_evaluate, _describe_evaluate, "Score predicted cells against real ones."),
    "gene-embeddings": (_gene_embeddings, _describe_gene_embeddings, "Compute gene vectors of proteins by ESM-2."),
    "datasets": (_datasets, _describe_datasets, "List public screens, or fetch one of them."),
}
