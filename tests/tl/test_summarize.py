from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import virtualcell as vc


def scores(rows: dict, suite="vcc2025") -> pd.DataFrame:
    """Rows `(source, context, metric): values of the perturbations a, b, ...`."""
    out = [
        {"source": s, "context": c, "perturbation": p, "metric": m, "value": v}
        for (s, c, m), values in rows.items()
        for p, v in zip("abcd", values, strict=False)
    ]
    table = pd.DataFrame(out)
    table.attrs = {"suite": suite}
    return table


@pytest.fixture
def two_contexts() -> pd.DataFrame:
    return scores(
        {
            ("model", "x", "pdisc_norm_l1"): [0.8, 0.4],
            ("model", "x", "de_overlap"): [0.5, 0.1],
            ("model", "x", "mae"): [0.3, 0.5],
            ("baseline", "x", "pdisc_norm_l1"): [0.2, 0.0],
            ("baseline", "x", "de_overlap"): [0.2, 0.2],
            ("baseline", "x", "mae"): [0.2, 0.2],
            ("ceiling", "x", "mae"): [0.1, 0.1],
            ("corrected ceiling", "x", "mae"): [0.04, 0.06],
            ("model", "y", "pdisc_norm_l1"): [1.0],
            ("model", "y", "de_overlap"): [0.2],
            ("model", "y", "mae"): [0.1],
            ("baseline", "y", "pdisc_norm_l1"): [0.0],
            ("baseline", "y", "de_overlap"): [0.2],
            ("baseline", "y", "mae"): [0.2],
        }
    )


def test_challenge_score_by_hand(two_contexts):
    table = vc.tl.summarize(two_contexts).set_index(["context", "metric"])
    assert table.loc[("x", "pdisc_norm_l1"), "value"] == pytest.approx(0.6)
    assert table.loc[("x", "pdisc_norm_l1"), "n"] == 2
    assert table.loc[("x", "pdisc_norm_l1"), "score"] == pytest.approx((0.6 - 0.1) / (1 - 0.1))
    assert table.loc[("x", "de_overlap"), "score"] == pytest.approx((0.3 - 0.2) / (1 - 0.2))
    # twice the baseline's error: minus one, which the challenge of 2025 takes for 0
    assert table.loc[("x", "mae"), "unclipped"] == pytest.approx(1 - 0.4 / 0.2)
    assert table.loc[("x", "mae"), "score"] == 0
    assert table.loc[("x", "mae"), "ceiling"] == pytest.approx(0.1)
    assert table.loc[("x", "mae"), "ceiling_corrected"] == pytest.approx(0.05)
    assert np.isnan(table.loc[("x", "de_overlap"), "ceiling_corrected"])
    x = (0.5 / 0.9 + 0.1 / 0.8 + 0) / 3
    assert table.loc[("x", "challenge_score"), "score"] == pytest.approx(x)
    assert table.loc[("x", "challenge_score"), "unclipped"] == pytest.approx((0.5 / 0.9 + 0.1 / 0.8 - 1) / 3)
    y = (1 + 0 + 0.5) / 3
    assert table.loc[("(all)", "challenge_score"), "score"] == pytest.approx((x + y) / 2)
    # contexts weigh the same, whatever their number of perturbations
    assert table.loc[("(all)", "mae"), "value"] == pytest.approx((0.4 + 0.1) / 2)
    assert table.loc[("(all)", "mae"), "n"] == 3


def test_the_scale_of_discrimination_does_not_matter():
    """cell-eval scores 1 - PDisc, the challenge 1 - 2 PDisc: against a baseline they come out the same."""
    one = {("model", "x", "pdisc_norm_l1"): [0.6], ("baseline", "x", "pdisc_norm_l1"): [0.1]}
    other = {("model", "x", "discrimination_l1"): [0.8], ("baseline", "x", "discrimination_l1"): [0.55]}
    a, b = (vc.tl.summarize(scores(r, "full"))["score"].iloc[0] for r in (one, other))
    assert a == pytest.approx(b)


def test_several_predictions_in_one_table_are_not_averaged(two_contexts):
    both = pd.concat([two_contexts.assign(model="a"), two_contexts.assign(model="b")])
    with pytest.raises(ValueError, match=r"more than once: it holds several models, splits or seeds"):
        vc.tl.summarize(both)
    one = vc.tl.summarize(both[both["model"] == "a"])
    pd.testing.assert_frame_equal(one, vc.tl.summarize(two_contexts))


def test_a_challenge_score_is_of_all_contexts_or_of_none(two_contexts):
    there = (two_contexts["context"] == "y") & (two_contexts["metric"] == "pdisc_norm_l1")
    two_contexts.loc[there, "value"] = np.nan  # as of one perturbation alone
    table = vc.tl.summarize(two_contexts).set_index(["context", "metric"])
    assert table.loc[("x", "challenge_score"), "score"] > 0
    assert np.isnan(table.loc[("y", "challenge_score"), "score"])
    assert np.isnan(table.loc[("(all)", "challenge_score"), "score"])
    assert table.loc[("(all)", "mae"), "score"] == pytest.approx(0.25)


def test_a_challenge_score_needs_all_its_metrics(two_contexts):
    some = two_contexts[two_contexts["metric"] != "de_overlap"]
    with pytest.raises(ValueError, match=r"scores lacks \['de_overlap'\], which the score of 'vcc2025' is made of"):
        vc.tl.summarize(some)
    for wrong in (None, two_contexts[:0], two_contexts.drop(columns="value")):
        with pytest.raises((TypeError, ValueError), match=r"`vc\.tl\.evaluate` returned"):
            vc.tl.summarize(wrong)


def test_without_a_baseline_there_are_means_alone():
    table = vc.tl.summarize(scores({("model", "x", "mae"): [0.3, 0.5]}))
    assert list(table["metric"]) == ["mae"]
    assert list(table) == ["context", "metric", "value", "n"]  # no column that holds nothing
    assert "note" not in table.attrs


def test_what_is_not_defined_is_left_out_of_means_and_counts():
    table = vc.tl.summarize(scores({("model", "x", "de_recall"): [0.5, np.nan, 1.0]}, "full"))
    assert table["value"].tolist() == [0.75]
    assert table["n"].tolist() == [2]


def test_a_perfect_baseline_leaves_no_score():
    rows = {("model", "x", "mae"): [0.3], ("baseline", "x", "mae"): [0.0]}
    assert list(vc.tl.summarize(scores(rows, "full"))) == ["context", "metric", "value", "n", "baseline"]


def test_what_is_better_than_a_ceiling_is_explained():
    rows = {}
    for metric, (value, halves, corrected) in {
        "mae": (0.2, 0.3, 0.15),  # an error between the two
        "mse": (0.1, 0.3, 0.15),
        "mae_delta": (0.4, 0.3, 0.15),
        "pearson_delta": (0.8, 0.7, 0.9),
        "discrimination_l1": (0.95, 0.7, 0.9),
        "top50_overlap": (0.6, 0.7, np.nan),
        "de_n_predicted": (9, 3, np.nan),  # neither more nor less is better
        "discrimination_cosine": (np.nan, np.nan, np.nan),
    }.items():
        for source, x in (("model", value), ("ceiling", halves), ("corrected ceiling", corrected)):
            rows[source, "x", metric] = [x]
    table = vc.tl.summarize(scores(rows, "full"))
    notes = table.set_index("metric")["note"]
    halves, estimate = "better than halves, which are noisier", "better than the corrected ceiling, an estimate"
    assert notes.to_dict() == {
        "mae": halves,
        "mse": estimate,
        "mae_delta": "",
        "pearson_delta": halves,
        "discrimination_l1": estimate,
        "top50_overlap": "",
        "de_n_predicted": "",
        "discrimination_cosine": "not defined",
    }
    for told in ("half of the real cells against the other", "corrected ceiling is an estimate", "not defined where"):
        assert told in table.attrs["note"]
    html = table._repr_html_()
    assert all(note in html for note in set(notes))  # a notebook shows them in full


def test_other_tables_are_refused():
    with pytest.raises(ValueError, match=r"scores has the columns \['a'\]"):
        vc.tl.summarize(pd.DataFrame({"a": [1]}))


def test_contexts_of_a_benchmark_count_the_same_as_in_its_picture():
    keys = {"split": "new", "seed": 0, "source": "model", "model": "Additive", "metric": "mae"}
    rows = [("one", "A", 1.0), ("one", "B", 1.0), ("one", "C", 1.0), ("two", "A", 3.0)]
    scores = pd.DataFrame([keys | {"context": c, "perturbation": p, "value": v} for c, p, v in rows])
    assert vc.tl.summarize(scores)["mae"].tolist() == [2.0]
    drawn = vc.pl.benchmark(scores).collections[0].get_offsets()
    assert drawn[0, 0] == 2.0
