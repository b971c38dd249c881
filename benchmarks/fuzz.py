"""Fuzz the readers of files that others made, one after another, and note what came of it: benchmarks/fuzz.py.

    python benchmarks/fuzz.py --output fuzz.json --keep found --seconds 600 gmt gtf

Each runs in a process of its own, under atheris where that is installed, and again after one that died until its time
is over. tests/untrusted/readers.py makes the files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HARNESS = Path(__file__).parents[1] / "tests" / "untrusted" / "readers.py"


def fuzz(name: str, seconds: float, keep: Path) -> dict[str, object]:
    """Fuzz one reader; return how many files gave what."""
    led = importlib.util.find_spec("atheris") is not None
    total: Counter = Counter()
    kinds: dict[str, str] = {}
    most, seed, start, report = 0.0, 0, time.monotonic(), keep / f"{name.replace(' ', '_')}.json"
    keep.mkdir(parents=True, exist_ok=True)
    while (left := seconds - (time.monotonic() - start)) > 1:
        report.unlink(missing_ok=True)
        command = [sys.executable, str(HARNESS), name, "--seconds", str(left), "--seed", str(seed), "--keep", str(keep)]
        done = subprocess.run([*command, "--report", str(report), *["--atheris"] * led], check=False)
        found = json.loads(report.read_text()) if report.exists() else {}
        kinds |= found.pop("kinds", {})
        most = max(most, found.pop("most_memory_mb", 0.0))
        total.update(found)
        if done.returncode:
            total["died"] += 1
            kinds[f"process {done.returncode}"] = f"seed {seed}"
        seed += 1
    counts = {key: total[key] for key in ("read", "refused", "failed", "slow", "greedy", "died")}
    inputs = total["read"] + total["refused"] + total["failed"]
    rest = {"kinds": kinds, "most_memory_mb": most, "cpu_seconds": round(total["cpu_seconds"], 1)}
    return {"seconds": seconds, "atheris": led, "inputs": inputs, **counts, **rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="+")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True, help="folder for files that make a reader fail")
    options = parser.parse_args()
    for name in options.readers:
        result = fuzz(name, options.seconds, options.keep)
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps(known | {name: result}, indent=1) + "\n")
        print(name, result, flush=True)


if __name__ == "__main__":
    main()
