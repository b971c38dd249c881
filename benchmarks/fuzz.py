"""Fuzz the readers of files that others made, one after another, and note what came of it: benchmarks/fuzz.py.

    python benchmarks/fuzz.py --output fuzz.json --keep found --seconds 600 gmt gtf

Each runs in a process of its own, under atheris where that is installed, and again after one that died until the
processor has worked on it for so long. tests/untrusted/readers.py makes the files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

MOST_WAITING = 5  # times as long on the clock, on a machine that has other work
HARNESS = Path(__file__).parents[1] / "tests" / "untrusted" / "readers.py"


def load_harness() -> ModuleType:
    """Import the readers once; each is fuzzed in a copy of this process."""
    spec = importlib.util.spec_from_file_location("readers", HARNESS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["readers"] = module
    spec.loader.exec_module(module)
    module.quiet()
    return module


def fuzz(harness: ModuleType, name: str, seconds: float, keep: Path, *, led: bool) -> dict[str, object]:
    """Fuzz one reader; return how many files gave what."""
    total: Counter = Counter()
    kinds: dict[str, str] = {}
    most, seed, report = 0.0, 0, keep / f"{name.replace(' ', '_')}.json"
    end = time.monotonic() + MOST_WAITING * seconds
    keep.mkdir(parents=True, exist_ok=True)
    while (left := seconds - total["cpu_seconds"]) > 1 and time.monotonic() < end:
        report.unlink(missing_ok=True)
        if not (pid := os.fork()):
            harness.fuzz(name, left, seed, keep=keep, report=report, led=led)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = json.loads(report.read_text()) if report.exists() else {}
        kinds |= found.pop("kinds", {})
        most = max(most, found.pop("most_memory_mb", 0.0))
        total.update(found)
        if status:
            total["died"] += 1
            kinds[f"process {status}"] = f"seed {seed}"
        seed += 1
    counts = {key: total[key] for key in ("read", "refused", "failed", "slow", "greedy", "died")}
    inputs = total["read"] + total["refused"] + total["failed"]
    rest = {"kinds": kinds, "most_memory_mb": most, "cpu_seconds": round(total["cpu_seconds"], 1)}
    return {"seconds": seconds, "atheris": led, "inputs": inputs, **counts, **rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+")
    parser.add_argument("--seconds", type=float, default=600, help="time of the processor for each")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True, help="folder for files that make a reader fail")
    options = parser.parse_args()
    harness, led = load_harness(), importlib.util.find_spec("atheris") is not None
    if led:
        harness.instrument()
    for name in options.readers:
        result = fuzz(harness, name, options.seconds, options.keep, led=led)
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps(known | {name: result}, indent=1) + "\n")
        print(name, result, flush=True)


if __name__ == "__main__":
    main()
