from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import virtualcell as vc
from virtualcell._settings import say
from virtualcell.models import SE
from virtualcell.tl import FitOptions


def test_what_is_set_is_what_is_there_and_what_was_before_afterwards() -> None:
    before = repr(vc.settings)
    with vc.settings.override(verbosity="info", progress=False, seed=7, cache_dir="~/cells", n_threads=2):
        assert (vc.settings.verbosity, vc.settings.progress, vc.settings.seed) == (2, False, 7)
        assert vc.settings.n_threads == 2
        assert vc.settings.cache_dir == Path.home() / "cells"
        assert repr(vc.settings).startswith("verbosity = 'info'\nprogress = False\nseed = 7\ncache_dir = '")
    assert repr(vc.settings) == before
    with pytest.raises(ValueError, match=r"^seed=-1"), vc.settings.override(progress=False, seed=-1):
        pass
    assert repr(vc.settings) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("verbosity", "loud", r"^verbosity='loud' is unknown\. Valid: 'error' \(0\), 'warning' \(1\), 'info' \(2\)"),
        ("verbosity", 9, r"^verbosity=9 is unknown"),
        ("verbosity", True, r"^verbosity=True is unknown"),
        ("progress", 1, r"^progress=1 is neither True nor False"),
        ("seed", None, r"^seed=None is not a whole number of at least 0"),
        ("seed", 1.5, r"^seed=1\.5 is not a whole number"),
        ("cache_dir", "", r"^cache_dir='' must be the path of a folder"),
        ("cache_dir", None, r"^cache_dir=None must be the path of a folder"),
        ("max_cache", 0, r"^max_cache=0 must be a number of gigabytes above 0\. Say None for no bound"),
        ("max_memory", None, r"^max_memory=None must be a number of gigabytes above 0\.$"),
        ("n_threads", 0, r"^n_threads=0 is not a whole number of at least 1\. Say None for as many as torch was told"),
    ],
)
def test_wrong_values_are_refused(name: str, value: object, message: str) -> None:
    before = getattr(vc.settings, name)
    with pytest.raises(ValueError, match=message):
        setattr(vc.settings, name, value)
    assert getattr(vc.settings, name) == before


def test_a_misspelt_setting_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"^vc\.settings has no 'progres'\. There are verbosity, progress, seed"):
        vc.settings.progres = False


def test_a_misspelt_setting_is_none_to_override_or_to_read() -> None:
    with (
        pytest.raises(AttributeError, match=r"no 'threads'\. There are verbosity"),
        vc.settings.override(threads=1),
    ):
        pass
    with pytest.raises(AttributeError, match="no 'threads'"):
        vc.settings.threads  # noqa: B018


def test_calls_take_the_seed_of_the_settings_unless_they_state_one() -> None:
    few = {"n_genes": 20, "n_perturbations": 2, "n_cells_per_group": 5, "n_control_cells": 10}
    first, second = (vc.datasets.synthetic(seed=seed, **few).X.toarray() for seed in (0, 3))
    assert not np.array_equal(first, second)
    assert np.array_equal(vc.datasets.synthetic(**few).X.toarray(), first)
    with vc.settings.override(seed=3):
        assert np.array_equal(vc.datasets.synthetic(**few).X.toarray(), second)
        assert np.array_equal(vc.datasets.synthetic(seed=0, **few).X.toarray(), first)
        assert FitOptions.from_().seed == FitOptions.from_(None, seed=None).seed == SE.train_options().seed == 3
        assert FitOptions.from_({"seed": 1}, seed=2).seed == 1
        assert FitOptions.from_(None, seed=2).seed == 2
        adata = vc.datasets.synthetic(**few)
        keys = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
        vc.pp.split(adata, **keys, holdout={"contexts": 1})
        assert adata.uns["virtualcell"]["split_manifest"]["split"]["seed"] == 3


def test_calls_take_bars_from_the_settings_unless_they_state_it() -> None:
    assert FitOptions.from_().progress_bar
    with vc.settings.override(progress=False):
        assert not FitOptions.from_().progress_bar
        assert FitOptions.from_({"progress_bar": True}).progress_bar


def test_results_are_printed_unless_only_errors_are_wanted(capsys, monkeypatch) -> None:
    say("one")
    with vc.settings.override(verbosity="error"):
        say("two")
    monkeypatch.setenv("LOCAL_RANK", "1")  # of two processes that run a script the second one is silent
    say("three")
    assert capsys.readouterr().out == "one\n"


def test_verbosity_decides_what_the_log_shows_and_each_line_is_shown_once() -> None:
    code = """
import logging, virtualcell as vc
log = logging.getLogger("virtualcell.tl")
def lines(): log.info("told"), log.warning("warned"), log.error("failed")
for verbosity in ("warning", "info", "error", "warning"):
    vc.settings.verbosity = verbosity
    lines()
vc.settings.verbosity = "info"
logging.basicConfig(format="mine: %(message)s")
lines()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = ["warned", "failed", "told", "warned", "failed", "failed", "warned", "failed"]
    assert done.stderr.split("\n") == [*shown, "mine: told", "mine: warned", "mine: failed", ""]
    assert done.stdout == ""


def test_a_log_that_the_user_configured_stays_as_it_is(caplog) -> None:
    with caplog.at_level(logging.INFO):  # of the root
        logging.getLogger("virtualcell.tl").info("told")
    assert caplog.messages == ["told"]
