"""Kill processes by SIGKILL at random moments of a fit, an embedding and a save, and look at what that leaves.

python benchmarks/kills.py [--kills 40] [--json]

The works, and what must hold after each kill, are those of the test of the same name (tests/killed.py): every file is
whole, what was kept is never lost, and the result of what goes on is that of what nobody killed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import killed

RESULT = Path(__file__).parent / "results" / "kills.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of each work")
    parser.add_argument("--json", action="store_true", help=f"write {RESULT}")
    given = parser.parse_args()
    fit = killed.fit, killed.steps_on_disk, killed.result_of_fit
    embed = killed.embed, killed.cells_on_disk, killed.result_of_embedding
    cases: dict[str, tuple[Callable, tuple]] = {
        "fit": (killed.kill_goers_on, fit),
        "embed": (killed.kill_goers_on, embed),
        "save": (killed.kill_writers, (killed.save_again, killed.which_is_saved)),
        "write h5ad": (killed.kill_writers, (killed.write_again, killed.which_is_written)),
    }
    found = {}
    for seed, (name, (kill, work)) in enumerate(cases.items()):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = kill(*work, Path(folder), given.kills, seed=seed)
        print(name, found[name], flush=True)
    if given.json:
        machine = f"{platform.machine()}, Python {platform.python_version()}"
        RESULT.write_text(json.dumps({"machine": machine, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
