"""Seconds that 20 training steps take with one thread of torch and with two, beside busy processes and without.

python benchmarks/threads.py [--repeats 3] [--json]

Every fit runs in a process of its own. "numba first" normalises with scanpy before the fit, whose numba gives torch all
cores where it was told to take one (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "threads.json"
PROGRAM = """
import time, warnings
warnings.filterwarnings("ignore")
import scanpy as sc, torch, virtualcell as vc
adata = vc.datasets.synthetic(n_genes=300, n_perturbations=10, seed=0)
if {numba}:
    sc.pp.normalize_total(adata.copy(), target_sum=1e4)
keys = dict(perturbation_key="target_gene", control="non-targeting", context_key="cell_type")
vc.settings.progress, vc.settings.n_threads = False, {n_threads}
fit = dict(se=False, validate=False, training={{"max_steps": 20}})
start = time.perf_counter()
vc.tl.fit_state(adata, **keys, **fit)
print(time.perf_counter() - start)
"""
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with whoever started it
# settings.n_threads, whether numba ran before, and the environment
CASES = {
    "1 thread": (1, False, {}),
    "2 threads": (2, False, {}),
    "2 threads, OMP_WAIT_POLICY=PASSIVE": (2, False, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "OMP_NUM_THREADS=1, numba first": (None, True, {"OMP_NUM_THREADS": "1"}),
}


def seconds(n_threads: int | None, numba: bool, environment: dict[str, str], repeats: int) -> float:
    """Return the median time of a fit."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    found = []
    for _ in range(repeats):
        program = PROGRAM.format(n_threads=n_threads, numba=numba)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**kept, **environment}
        )
        found.append(float(done.stdout))
    return round(sorted(found)[len(found) // 2], 2)


def beside(n_busy: int, repeats: int) -> dict[str, float]:
    """Return times of all cases beside some processes that do nothing but work."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n_busy)]
    try:
        return {name: seconds(*case, repeats) for name, case in CASES.items()}
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    found: dict[str, object] = {
        "load_before": round(os.getloadavg()[0], 1),  # more than 0: others were busy too
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for n_busy in (0, os.cpu_count() or 1):
        found[f"beside {n_busy} busy processes"] = times = beside(n_busy, args.repeats)
        for name, value in times.items():
            print(f"{n_busy} busy processes  {name:36} {value:6.1f} s", flush=True)
    if args.json:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
