"""Print the tables of a results file as Markdown, as they stand in the documentation.

python benchmarks/tables.py benchmarks/results/st.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = {
    "pearson_delta": "Pearson delta",
    "mae": "MAE",
    "energy_distance": "energy distance",
    "top50_overlap": "overlap of top 50",
    "discrimination_cosine": "discrimination (cosine)",
}
DIGITS = {"mae": 4}


def table(result: dict) -> str:
    """Return one table: a row for each model, the spread over seeds where there is one."""
    mean, spread = result["mean"], result["spread"]
    metrics = list(next(iter(mean.values())))
    lines = ["| predictor | " + " | ".join(NAMES.get(m, m) for m in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for model, values in mean.items():
        cells = []
        for metric in metrics:
            digits = DIGITS.get(metric, 3)
            value, sd = values.get(metric), spread.get(model, {}).get(metric)
            text = "" if value is None else f"{value:.{digits}f}"
            cells.append(text + (f" ± {sd:.{digits}f}" if sd else ""))
        lines.append(f"| {'**ST**' if model == 'ST' else model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    for name, result in json.loads(Path(sys.argv[1]).read_text()).items():
        if name == "mean_rank":
            continue
        for title, part in result.get("tables", {"all": result}).items():
            print(f"\n### {name}: {title}\n\n{table(part)}")


if __name__ == "__main__":
    main()
