"""The ST of `fit_state`: built, trained, and asked how well it answers what it is for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from virtualcell.data._screen import Screen
from virtualcell.models import SE, ST
from virtualcell.models._effects import Effects
from virtualcell.models._finetune import continue_st
from virtualcell.models._partly import partly_trained
from virtualcell.tl._fit_options import FitOptions, NetworkOptions
from virtualcell.tl._questions import Asked, Fold, folds
from virtualcell.tl._verdict import Verdict, judge, trained_baseline
from virtualcell.train._quiet import quiet

logger = logging.getLogger(__name__)

_SHARE_OF_STEPS, _FEWEST_STEPS = 0.4, 50  # of a fit that leaves cells out


def build_st(
    screen: Screen,
    *,
    features: pd.DataFrame | None,
    init_from: ST | SE | None,
    size: str,
    network: NetworkOptions,
    options: FitOptions,
) -> ST:
    """Build an ST on the cells and genes of a screen, new or from a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if isinstance(init_from, ST):
            return continue_st(screen, init_from, features, **network.options)
        return ST(screen, features, size=size, **network.options)


def train_st(
    st: ST,
    *,
    build: Callable[[Screen], ST],
    options: FitOptions,
    effects: Effects | None = None,
    asked: Asked | None = None,
    init_from: ST | SE | None = None,
) -> Verdict | None:
    """Train an ST on its screen, find out how well it answers what is asked, and let go of the data.

    Parameters
    ----------
    st, build
        The model, and what builds another like it on other cells.
    options
        Options of its training.
    effects
        Measured effects of the training cells, where these are known already.
    asked
        What predictions will be wanted for; `None` to leave the question out.
    init_from
        What the model goes on from: an ST that has learned from the same pairs could not be asked about them.

    Returns
    -------
    The verdict, where it was asked for and could be given.
    """
    screen, verdict = st.screen, None
    if effects is None and (st.transfer or asked is not None):
        effects = Effects.measure(screen, screen.is_known)
    partly = isinstance(init_from, ST)
    _train(st, options, effects, partly=partly)
    if asked is not None and not _has_learned(init_from, effects):
        verdict = _ask(st, build, options, effects, asked, partly=partly)
    st.forget_data()
    return verdict


def _has_learned(init_from: ST | SE | None, effects: Effects) -> bool:
    """Whether a model was trained on pairs of context and perturbation that are to be left out."""
    if not isinstance(init_from, ST) or init_from.transferred is None:
        return False
    both = set(init_from.transferred.pairs()) & set(effects.pairs())
    if not both:
        return False
    logger.warning(
        "init_from has learned from %d of the pairs of context and perturbation of this data, so that leaving them out "
        "would tell nothing: weights are the defaults, and there is no verdict.",
        len(both),
    )
    return True


def _train(st: ST, options: FitOptions, effects: Effects | None, *, partly: bool) -> None:
    partial_options = {"freeze": options.freeze or (), "lora": options.lora, "seed": options.seed} if partly else {}
    with partly_trained(st.module, **partial_options):
        st.train(options.of_training(), effects=effects)


def _ask(
    st: ST,
    build: Callable[[Screen], ST],
    options: FitOptions,
    effects: Effects,
    asked: Asked,
    *,
    partly: bool,
) -> Verdict | None:
    """Give an ST the weights, the verdict and the fallback that leaving training cells out comes to."""
    left_out = folds(st.screen, effects, asked, seed=options.seed)
    if not left_out:
        logger.warning(
            "The data does not allow to ask how well %s are predicted: too few can be left out. Weights are the "
            'defaults, and there is no verdict. Ask another question, such as validate="cells".',
            asked.question,
        )
        return None
    # five folds together cost twice the fit: a shorter one shows less of what a network can do
    n_steps = max(_FEWEST_STEPS, round(_SHARE_OF_STEPS * st.n_steps))
    short = dataclasses.replace(
        options,
        max_steps=min(n_steps, st.n_steps),
        early_stopping=None,
        val_fraction=0.0,
        progress_bar=False,
    )

    def train(fold: Fold) -> ST:
        model, of_fold = build(fold.screen), short
        if options.checkpoint_dir is not None:
            folder = Path(options.checkpoint_dir) / f"without_{asked.question}_{left_out.index(fold) + 1}"
            of_fold = dataclasses.replace(short, checkpoint_dir=folder)
        _train(model, of_fold, fold.effects, partly=partly)
        return model

    with quiet("virtualcell.models", "virtualcell.train"):
        features = st.table.frame() if st.table.has_features else None
        found = judge(train, left_out, asked, features, seed=options.seed, progress_bar=options.progress_bar)
    st.validation, st.verdict = found.scores, found.sentence
    if found.weight is not None:
        st.mixture = st.mixture.with_networks(asked.question, found.weight)
        logger.info(st.mixture.describe(asked.question))
    if found.outcome == "worse":
        st.fallback = trained_baseline(found.best, st.screen, effects, features)
        st.fallback.fitted_on = st.fitted_on  # the same cells, whose effects are known
    return found
