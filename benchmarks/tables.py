"""Print the tables of a results file as Markdown, or put those of `st.py` into the page of the documentation.

    python benchmarks/tables.py benchmarks/results/st.json
    python benchmarks/tables.py benchmarks/results/st.json --page docs/benchmarks.md

In the page a table stands below a line such as `<!-- st: kang: mean over 6 cell types -->`; what was there up to an
empty line is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

NAMES = {
    "pearson_delta": "Pearson delta",
    "mae": "MAE",
    "energy_distance": "energy distance",
    "top50_overlap": "overlap of top 50",
    "discrimination_cosine": "discrimination (cosine)",
    "de_overlap": "DE overlap",
    "de_precision": "DE precision",
    "variance_ratio": "variance ratio",
}
OF_MERIT = ("pearson_delta", "mae", "energy_distance", "top50_overlap", "discrimination_cosine")
DIGITS = {"mae": 4}
_PLACE = re.compile(r"^<!-- st: (.+?) -->\n(?:.+\n)*", flags=re.M)


def table(result: dict) -> str:
    """Return one table: a row for each model, the spread over seeds where there is one."""
    mean, spread = result["mean"], result["spread"]
    metrics = list(next(iter(mean.values())))
    lines = [header(["predictor", *(NAMES.get(m, m) for m in metrics)])]
    for model, values in mean.items():
        cells = []
        for metric in metrics:
            digits = DIGITS.get(metric, 3)
            value, sd = values.get(metric), spread.get(model, {}).get(metric)
            text = "" if value is None else f"{value:.{digits}f}"
            cells.append(text + (f" ± {sd:.{digits}f}" if sd else ""))
        lines.append(row(["**ST**" if model == "ST" else model, *cells]))
    return "\n".join(lines)


def header(cells: list[str]) -> str:
    """Head of a table."""
    return row(cells) + "\n" + "|---" * len(cells) + "|"


def row(cells: list[str]) -> str:
    """Row of a table."""
    return "| " + " | ".join(cells) + " |"


def merit(results: dict) -> str:
    """Error of ST over that of the best baseline, for every data set, with the mean."""
    lines, found = [header(["data set", *(NAMES[m] for m in OF_MERIT)])], {m: [] for m in OF_MERIT}
    for name, result in results.items():
        ratios = next(iter(result["tables"].values()))["merit"]
        lines.append(row([name.replace("_", ", "), *(f"{ratios[m]:.3f}" if m in ratios else "" for m in OF_MERIT)]))
        for metric, ratio in ratios.items():
            found[metric].append(ratio)
    return "\n".join([*lines, row(["**mean**", *(f"{sum(v) / len(v):.3f}" for v in found.values())])])


def verdicts(results: dict) -> str:
    """Put what the fits said of themselves beside what the test cells say."""

    def listed(outcomes: list[str]) -> str:
        return ", ".join(f"{outcome} {n}" for outcome, n in sorted(Counter(outcomes).items()))

    lines, agree, n = [header(["data set", "fits", "verdict", "on the test cells", "agree", "weights"])], 0, 0
    worse = 0
    for name, result in results.items():
        said = result["agreement"]["verdicts"]
        same = sum(v["outcome"] == v["test_outcome"] for v in said)
        agree, n = agree + same, n + len(said)
        worse += result["agreement"]["better_for_worse"]
        weights = ", ".join(f"{w:.2g}" for w in sorted({v["weight"] for v in said}))
        lines.append(
            row(
                [
                    name.replace("_", ", "),
                    str(len(said)),
                    listed([v["outcome"] for v in said]),
                    listed([v["test_outcome"] for v in said]),
                    str(same),
                    weights,
                ]
            )
        )
    share = f"{agree} of {n} ({agree / n:.0%})"
    return "\n".join([*lines, row(["**all**", str(n), "", "", share, f"better for worse: {worse}"])])


def block(results: dict, what: str) -> str:
    """Return what belongs below a line of the page."""
    if what == "merit":
        return merit(results)
    if what == "verdicts":
        return verdicts(results)
    name, title = what.split(": ", 1)
    seeds = len(results[name]["settings"]["seeds"])
    return f"{table(results[name]['tables'][title])}\n| *{seeds} {'seed' if seeds == 1 else 'seeds'}* |"


def main() -> None:
    """Print, or fill the page in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    results = {k: v for k, v in json.loads(args.results.read_text()).items() if k != "mean_rank"}
    if args.page is None:
        for name, result in results.items():
            for title, part in result.get("tables", {"all": result}).items():
                print(f"\n### {name}: {title}\n\n{table(part)}")
        return
    text = args.page.read_text()
    args.page.write_text(_PLACE.sub(lambda m: f"<!-- st: {m[1]} -->\n{block(results, m[1])}\n", text))


if __name__ == "__main__":
    main()
