"""Run the tutorial notebooks, to renew their outputs or to find out whether they still hold.

    python scripts/tutorials.py                  # run all; an error in a cell and outputs of other code end in 1
    python scripts/tutorials.py --write          # put the outputs into the notebooks
    python scripts/tutorials.py 01 06            # some, by the beginning of their names

Files that the tutorials download are taken from a folder that holds them, `--originals` or VIRTUALCELL_ORIGINALS, and
otherwise from the internet.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[1] / "tutorials"
BESIDE = FOLDER.parents[1] / "shared" / "data" / "originals"  # where tests find real data too
CACHED = ("scgen_valid.h5ad", "perturbench_devel.h5ad")  # by the names that virtualcell.datasets gives them
# What differs between two runs of the same code on two machines: figures, and which side of a tie they fall on.
_VARIES = re.compile(
    r"against \S+ of \w+|`predict_perturbation\(\.\.\., fallback=\"best\"\)` uses the baseline\."
    r"|[-+]?\d[\d.,]*(e[-+]?\d+)?"
    r"|\b(neither|better|nor|worse|level|than|with|the best baseline|a tie)\b"
)
_BAR = re.compile(r"\|[\u2588-\u258f ]*\| \d\d:\d\d|(it/s|s/it)\]")  # of text: virtualcell's, and those of others
_NO_WIDGETS = re.compile(r".*TqdmWarning: IProgress not found.*\n.*\n")  # bars are text then, and left out


def code_of(notebook: nbformat.NotebookNode) -> str:
    """Checksum of the code of a notebook."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def words(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Kinds of output, and the words of those that are text, of each cell; without figures and in any order."""
    out = []
    for cell in notebook.cells:
        found = set()
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            found |= {kind for kind in data if kind.startswith("image/")}
            found |= set(_VARIES.sub(" ", "".join(data.get("text/plain", ""))).split())
        out.append(sorted(w for w in found if w.startswith("image/") or re.fullmatch(r"[A-Za-z_]{4,}", w)))
    return out


def run(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in an empty folder, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "code_that_ran": code_of(notebook),
        }
    )
    return notebook


def merged(outputs: list) -> list:
    """Join what was printed in one go, and leave out bars, which are of no use afterwards."""
    out = []
    for output in outputs:
        if output.output_type == "stream":
            output.text = "".join(line.split("\r")[-1] for line in output.text.splitlines(keepends=True))
            output.text = _NO_WIDGETS.sub("", output.text)
            output.text = "".join(line for line in output.text.splitlines(keepends=True) if not _BAR.search(line))
            if not output.text.strip():
                continue
            if out and out[-1].output_type == "stream" and out[-1].name == output.name:
                out[-1].text += output.text
                continue
        out.append(output)
    return out


def stale(path: Path, ran: nbformat.NotebookNode) -> str | None:
    """Tell what of the outputs in a notebook is not what its code gives now."""
    there = nbformat.read(path, as_version=4)
    if there.metadata.get("code_that_ran") != code_of(there):
        return "its code was changed after it ran"
    for i, (before, now) in enumerate(zip(words(there), words(ran), strict=True)):
        if before != now:
            return f"cell {i} gives something else: {sorted(set(before) ^ set(now))[:8]}"
    return None


def main() -> int:
    """Run what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true")
    here = os.environ.get("VIRTUALCELL_ORIGINALS", BESIDE if BESIDE.exists() else None)
    parser.add_argument("--originals", type=Path, default=here, help="default: %(default)s")
    args = parser.parse_args()
    paths = [p for p in sorted(FOLDER.glob("[0-9]*.ipynb")) if not args.names or p.name.startswith(tuple(args.names))]
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        if args.originals is not None:
            os.environ["XDG_CACHE_HOME"] = cache
            (Path(cache) / "virtualcell").mkdir()
            for name in CACHED:
                shutil.copy(args.originals / name, Path(cache) / "virtualcell" / name)
        for path in paths:
            start = time.perf_counter()
            try:
                ran = run(path)
                problem = None if args.write else stale(path, ran)
            except CellExecutionError as error:
                problem = str(error)
            if args.write and problem is None:
                nbformat.write(ran, path)
            print(f"{path.name}: {problem or 'ok'} ({time.perf_counter() - start:.0f} s)", flush=True)
            failed += [path.name] if problem else []
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
