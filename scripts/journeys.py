"""Run what a newcomer pastes: the code of the landing page, and that of a screen from a file of one's own.

python scripts/journeys.py [quickstart | screen]

Each runs in an empty folder and in a process of its own, and has to end within three minutes with a verdict and a
figure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 180  # seconds, on two cores

# a screen whose columns and labels have other names than any example, as other people's files have
FILE = """
import virtualcell as vc
adata = vc.datasets.synthetic(n_contexts=3, n_perturbations=30, n_genes=300, seed=1)
adata.obs = adata.obs.rename(columns={"target_gene": "guide_identity", "cell_type": "line", "batch": "lane"})
adata.obs["guide_identity"] = adata.obs["guide_identity"].cat.rename_categories({"non-targeting": "NTC"})
adata.obs["line"] = adata.obs["line"].cat.rename_categories({"type_3": "Jurkat"})
adata.write_h5ad("screen.h5ad")
"""
CHECK = """
import matplotlib.pyplot as plt
assert st.verdict, "no verdict"
assert plt.get_fignums(), "no figure"
plt.savefig("figure.png")
"""
PAGES = {"quickstart": ("docs/index.md", 0, ""), "screen": ("docs/howto/screen.md", 0, FILE)}


def code(name: str) -> str:
    """Return the block of Python that a page shows."""
    page, number, _ = PAGES[name]
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)[number]


def n_lines(block: str) -> int:
    """Count the lines that are no blank ones and no comments."""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in block.splitlines())


def run(name: str) -> float:
    """Run one journey, and return the seconds that it took."""
    block, before = code(name), PAGES[name][2]
    with tempfile.TemporaryDirectory() as folder:
        if before:
            subprocess.run([sys.executable, "-c", before], cwd=folder, check=True)
        start = time.perf_counter()
        headless = 'import matplotlib\nmatplotlib.use("agg")\n'
        subprocess.run([sys.executable, "-c", headless + block + CHECK], cwd=folder, check=True)
        seconds = time.perf_counter() - start
        if not (Path(folder) / "figure.png").stat().st_size:
            raise RuntimeError(f"{name}: the figure is empty")
    return seconds


def main() -> None:
    """Run the journeys that are named, or all."""
    for name in sys.argv[1:] or PAGES:
        seconds = run(name)
        print(f"{name}: {n_lines(code(name))} lines, {seconds:.0f} s, of at most {LIMIT}")
        if seconds > LIMIT:
            sys.exit(f"{name} takes more than {LIMIT} s")


if __name__ == "__main__":
    main()
