"""One training, from a network, a loss and numbered batches to a trained network and its history."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Protocol

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from virtualcell._progress import Bar
from virtualcell._threads import own_threads
from virtualcell.train._checkpoint import Checkpoints, Described, TrainingFile
from virtualcell.train._options import TrainOptions
from virtualcell.train._plan import TrainingPlan
from virtualcell.train._quiet import random_state_kept, silenced

__all__ = ["Batches", "Loss", "TrainOptions", "fit"]

logger = logging.getLogger(__name__)

# A function of the network and a batch: the loss, a scalar called "loss", and whatever else the history is to show.
Loss = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]

DEVICES = {"cpu": "CPU", "cuda": "GPU", "mps": "Apple GPU"}


class Batches(Protocol):
    """Where batches come from: a numbered sequence that every process can compute by itself."""

    n_steps: int | None  # number of batches of one validation; None for training, which has no end

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the share of step `i` (from 0) that belongs to process `rank` of `world_size`, on `device`.

        It is a function of these four alone: nothing else is state. The shares of a training step are of one size;
        those of a validation batch hold at least one item each and are weighted by the length of the first tensor.
        """
        ...

    def is_fetched(self, device: torch.device) -> bool:
        """Tell whether a device gets what was put together on the CPU, since what it is made of does not fit there.

        Steps, with the CPU as their device, are then asked for by a thread, each while the one before is worked on.
        """
        ...

    def describe(self, i: int) -> str:
        """Say in a few words what step `i` shows ("contexts A, B"), for error messages."""
        ...


class _Steps:
    """The numbers of steps: all that Lightning is told of batches (a `range` does not survive its way to a process)."""

    def __init__(self, first: int, end: int) -> None:
        self.numbers = range(first, end)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class _ShowSteps(pl.Callback):
    """One line that shows steps and loss."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Bar | None = None

    def on_train_start(self, trainer: pl.Trainer, plan: TrainingPlan) -> None:
        if trainer.is_global_zero:
            self.bar = Bar(self.title, plan.options.max_steps, unit="step", done=plan.steps_done, shown=True)

    def on_train_batch_end(self, trainer: pl.Trainer, plan: TrainingPlan, *_: object) -> None:
        if self.bar is not None:  # the plan counts the step after this
            self.bar.step(self._loss(plan))

    @staticmethod
    def _loss(plan: TrainingPlan) -> str:
        return "" if math.isnan(plan.shown_loss) else f"loss {plan.shown_loss:.3g}"

    def on_train_end(self, trainer: pl.Trainer, plan: TrainingPlan) -> None:
        if self.bar is not None:
            self.bar.show(plan.steps_done, self._loss(plan))
            self.bar.close()
            self.bar = None

    def on_exception(self, trainer: pl.Trainer, plan: TrainingPlan, exception: BaseException) -> None:
        self.on_train_end(trainer, plan)


def fit(
    network: nn.Module,
    loss: Loss,
    batches: Batches,
    options: TrainOptions,
    *,
    validation: Batches | None = None,
    name: str = "ST",
    title: str | None = None,
    data: Described | None = None,
) -> dict[str, pd.DataFrame]:
    """Train a network, which afterwards holds the trained weights, is in evaluation mode and on the device it was on.

    The number of steps, their learning rates and, for a loss that is a mean over its batch, the losses are the same
    whatever the number of processes. With the strategies "ddp" and "fsdp" every process is a run of the caller's script
    and each has the trained network in the end; "ddp_spawn" and "ddp_notebook" train in processes of their own, and
    weights and history are copied back to the caller's. "ddp_spawn" needs a `loss` and `batches` that can be pickled.

    Parameters
    ----------
    network
        Network to train, from the weights that it has.
    loss
        Function of the network and a batch that returns the loss as "loss", and further values to be recorded.
    batches
        Where the batches of training come from.
    options
        Options that state at least `max_steps`, `lr` and `batch_size`.
    validation
        Where the batches of a validation come from; no validation where it is `None`.
    name
        Name of the model in log lines and in errors.
    title
        What is trained, for the progress bar, such as "SE: cell embedding"; by default the name.
    data
        Describes the data, so that a checkpoint of a training on other data is refused.

    Returns
    -------
    Tables of one column, indexed by the number of steps done: "train_loss" (the mean since the entry before),
    "validation_loss" and those of the other values of `loss`.

    Raises
    ------
    FloatingPointError
        If a loss is not finite; the network then holds its last weights with finite losses.
    FileExistsError
        For a checkpoint in `options.checkpoint_dir`, without `resume`.
    """
    options = _checked(options, validation)
    plan = TrainingPlan(network, loss, batches, options, validation=validation, name=name)
    folder = options.checkpoint_dir
    file = None if folder is None else TrainingFile(folder, name, options, network, data or {})
    keeps = Checkpoints(file, options.checkpoint_every)
    with silenced(), own_threads():
        trainer, strategy = _trainer(plan, [keeps, *([_ShowSteps(title or name)] if options.progress_bar else [])])
        _check_processes(options, trainer)
        # of several processes that run one script the first one keeps the training
        with file.held() if file is not None and trainer.is_global_zero else nullcontext():
            if not _was_finished(plan, file):
                _train(plan, trainer, strategy)
                if file is not None and trainer.is_global_zero and not plan.failure:
                    file.write(plan.state(is_finished=True))
                if keeps.told is not None:  # after the last step
                    keeps.stop(keeps.told, plan)
    network.eval()
    if plan.failure:
        raise FloatingPointError(plan.failure)
    return {
        key: pd.DataFrame({key: list(values.values())}, index=pd.Index(list(values), name="step"))
        for key, values in plan.history.items()
    }


def _checked(options: TrainOptions, validation: Batches | None) -> TrainOptions:
    options = type(options).from_(options)  # a model's own options have further fields
    for argument in ("max_steps", "lr", "batch_size"):
        if getattr(options, argument) is None:
            raise ValueError(f"{argument}=None: a training needs it. State it in TrainOptions.")
    if validation is not None and not validation.n_steps:
        raise ValueError(
            f"validation has n_steps={validation.n_steps!r}: at least one batch is needed, or no validation."
        )
    if options.early_stopping and validation is None:
        raise ValueError(
            "early_stopping=True needs validation cells: give val_fraction > 0 or a split with 'val', or use "
            "early_stopping=False."
        )
    if options.strategy == "fsdp" and options.precision == "16-mixed":
        raise ValueError("precision='16-mixed' and strategy='fsdp' do not go together. Use '32-true' or 'bf16-mixed'.")
    return options


def _trainer(plan: TrainingPlan, callbacks: list[pl.Callback]) -> tuple[pl.Trainer, str]:
    """Build Lightning's trainer; the strategy's name is "auto" for one device."""
    options = plan.options

    def build(strategy: str) -> pl.Trainer:
        return pl.Trainer(
            accelerator=options.accelerator,
            devices=1 if options.devices == "auto" else options.devices,
            strategy=_of_lightning(strategy),
            precision=options.precision,
            max_epochs=1,
            val_check_interval=plan.validate_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # a batch knows its process
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    try:
        trainer, strategy = build(options.strategy), options.strategy
        if strategy == "auto" and isinstance(trainer.strategy, DDPStrategy):
            strategy = "ddp_notebook" if trainer.strategy.launcher.is_interactive_compatible else "ddp"
            trainer = build(strategy)
    except (MisconfigurationException, RuntimeError) as error:
        raise ValueError(
            f"accelerator={options.accelerator!r}, devices={options.devices!r}, strategy={options.strategy!r} cannot "
            f"be used here: {error} Leave them out to train on the device that there is."
        ) from error
    return trainer, strategy


def _of_lightning(strategy: str) -> str | Strategy:
    if strategy == "fsdp":
        return ModelParallelStrategy()  # which leaves it to the plan how a network is divided
    # parts of a network may take no part in a step (a dataset token with one data set)
    return strategy if strategy == "auto" else f"{strategy}_find_unused_parameters_true"


def _check_processes(options: TrainOptions, trainer: pl.Trainer) -> None:
    n = trainer.world_size
    if options.strategy == "fsdp" and n == 1:
        raise ValueError(
            f"strategy='fsdp' divides a network among several devices, and devices={options.devices!r} is one. Say "
            "devices=2 or more, or leave strategy out."
        )
    if options.batch_size % n:
        raise ValueError(
            f"batch_size={options.batch_size} does not divide by {n} processes. Use batch_size="
            f"{-(-options.batch_size // n) * n}, or another number of devices."
        )
    if options.precision == "16-mixed" and trainer.strategy.root_device.type == "cpu":
        raise ValueError("precision='16-mixed' is for GPUs. Use '32-true' or 'bf16-mixed' on the CPU.")


def _was_finished(plan: TrainingPlan, file: TrainingFile | None) -> bool:
    """Take over what was kept of a training, and tell whether that is all of it."""
    kept = None if file is None else file.read(resume=plan.options.resume)
    if kept is None:
        return False
    plan.take(kept)
    if kept.meta["is_finished"]:
        logger.info("%s was trained before, as %s says.", plan.name, file.path)
    else:
        logger.info("%s goes on after step %d of %d.", plan.name, plan.steps_done, plan.options.max_steps)
    return kept.meta["is_finished"]


def _train(plan: TrainingPlan, trainer: pl.Trainer, strategy: str) -> None:
    network, home = plan.network, next(plan.network.parameters()).device
    _log_start(plan, trainer)
    started = time.perf_counter()
    # forked and spawned processes have generators of their own; a GPU must not be opened before a fork
    here = strategy in ("auto", "ddp", "fsdp")
    try:
        with random_state_kept(trainer.strategy.root_device if here else torch.device("cpu")):
            _run(plan, trainer)
    finally:
        network.to(home).eval()
    if trainer.is_global_zero and not plan.failure:
        _log_end(plan, time.perf_counter() - started)


def _run(plan: TrainingPlan, trainer: pl.Trainer) -> None:
    plan.network.train()
    validation = None if plan.validation is None else _Steps(0, plan.validation.n_steps)
    try:
        # one epoch holds the whole training
        trainer.fit(plan, _Steps(plan.steps_done, plan.options.max_steps), validation)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into the end of the program
            raise KeyboardInterrupt from None
        raise
    finally:
        plan.close()


def _log_start(plan: TrainingPlan, trainer: pl.Trainer) -> None:
    if not trainer.is_global_zero:
        return
    device, n = DEVICES.get(trainer.strategy.root_device.type, "device"), trainer.world_size
    where = f"one {device}" if n == 1 else f"{n} processes, each on a {device}"
    if plan.options.precision != "32-true":
        where += f", in {plan.options.precision}"
    checks = "without validation" if plan.validation is None else f"with a validation every {plan.validate_every}"
    logger.info(
        "%s is trained for %d steps of %d, %s, on %s.",
        plan.name,
        plan.options.max_steps,
        plan.options.batch_size,
        checks,
        where,
    )


def _log_end(plan: TrainingPlan, seconds: float) -> None:
    ended = f"after {plan.steps_done} steps"
    if plan.steps_done < plan.options.max_steps:
        ended += (
            f" of {plan.options.max_steps}, since the validation loss had not fallen for {plan.options.patience} "
            "validations"
        )
    losses = [
        f"{stage} loss {list(plan.history[key].values())[-1]:.4g}"
        for stage, key in (("training", "train_loss"), ("validation", "validation_loss"))
        if key in plan.history
    ]
    logger.info("%s: training ended %s (%.0f s); %s.", plan.name, ended, seconds, ", ".join(losses))
