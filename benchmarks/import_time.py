"""Seconds that importing the package takes, and that the first touch of its functions takes, in fresh processes.

python benchmarks/import_time.py [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "import_time.json"
CASES = {
    "import": "",
    "subpackages": "vc.pp; vc.tl; vc.pl; vc.models; vc.metrics; vc.io; vc.datasets",
    "pp.split": "vc.pp.split",
    "pl.split": "vc.pl.split",
    "tl.evaluate": "vc.tl.evaluate",
    "tl.fit_state": "vc.tl.fit_state",
}
HEAVY = ["anndata", "torch", "scanpy", "lightning", "scvi"]
PROGRAM = """
import sys, time
start = time.perf_counter()
import virtualcell as vc
{code}
print(time.perf_counter() - start, *[name for name in {heavy} if name in sys.modules])
"""


def measure(code: str, repeats: int) -> dict[str, object]:
    """Best of several fresh processes, after one that fills the cache of files."""
    seconds = []
    for _ in range(repeats + 1):
        program = PROGRAM.format(code=code, heavy=HEAVY)
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        taken, *loaded = said.split()
        seconds.append(float(taken))
    return {"seconds": round(min(seconds[1:]), 2), "loaded": loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    found: dict[str, object] = {name: measure(code, args.repeats) for name, code in CASES.items()}
    for name, one in found.items():
        print(f"{name:12} {one['seconds']:5.2f} s  {' '.join(one['loaded'])}")
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    if args.json:
        RESULT.write_text(json.dumps({**found, **machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
