"""The file from which a training goes on as if it had never stopped, and when it is written."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from virtualcell._interrupted import tell
from virtualcell._state import State, read_file, write_state
from virtualcell.train._options import TrainOptions
from virtualcell.train._plan import LOOK_EVERY, TrainingPlan

logger = logging.getLogger(__name__)

SUFFIX = ".training.safetensors"
# what a training may go on with another value of: where it runs, what is shown, where and when it is kept
_FREE = ("accelerator", "devices", "strategy", "progress_bar", "checkpoint_dir", "checkpoint_every", "resume")
_CLOSE = 1e-4  # as near as numbers are that computers round in their own ways
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

Described = Mapping[str, object]  # names to what JSON can hold; of lists of numbers it is enough to be close


def refuse_used(folder: str | os.PathLike, *, resume: bool) -> None:
    """Raise for a folder with checkpoints, unless it is to be gone on from."""
    used = sorted(Path(folder).rglob(f"*{SUFFIX}"))
    if used and not resume:
        raise FileExistsError(_in_use(used[0]))


def _in_use(path: Path) -> str:
    return (
        f"{path} is the checkpoint of a training. Say resume=True to go on from it, give another checkpoint_dir, or "
        "delete it to begin anew."
    )


class TrainingFile:
    """The checkpoint of one training, and what it belongs to: options, a network as it starts, and data.

    Parameters
    ----------
    folder, name
        Where it is kept, and the name of what is trained.
    options
        Complete options of the training.
    network
        The network before its first step.
    data
        Describes what is learned from.
    """

    def __init__(
        self, folder: str | os.PathLike, name: str, options: TrainOptions, network: nn.Module, data: Described
    ) -> None:
        self.path, self.name = Path(folder) / f"{name}{SUFFIX}", name
        self.options = {k: v for k, v in options.stated.items() if k not in _FREE}
        self.data = {**_described(network), **data}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing the same file, and find out now whether it can be written."""
        lock = filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RuntimeError(
                f"another process trains {self.name} in checkpoint_dir={str(self.path.parent)!r}. Wait until it ends, "
                "or give another folder."
            ) from error
        except OSError as error:
            said = (
                f"checkpoint_dir={str(self.path.parent)!r} cannot be written into: {error.strerror or error}. Name a "
                "folder that can"
            )
            raise OSError(error.errno, said) from error
        try:
            yield
        finally:
            lock.release()

    def read(self, *, resume: bool) -> State | None:
        """Return what was kept, or `None` where nothing was.

        Raises
        ------
        FileExistsError
            For a checkpoint that is not to be gone on from.
        ValueError
            For one of another training, or a file that is damaged.
        """
        if not self.path.exists():
            return None
        if not resume:
            raise FileExistsError(_in_use(self.path))
        try:
            state = read_file(self.path)
        except ValueError as error:
            raise ValueError(f"{error} Delete this file to begin the training of {self.name} anew.") from error
        differs = [*_options_that_differ(state.meta["options"], self.options)]
        differs += [f"other {name}" for name in _that_differ(state.meta["data"], self.data)]
        if differs:
            raise ValueError(
                f"{self.path} is the checkpoint of another training: {', '.join(differs)}. Repeat the call that it was "
                "made by, give another checkpoint_dir, or delete it to begin anew."
            )
        return state

    def write(self, state: State) -> None:
        """Put a state in place of the one before; a training that cannot be kept goes on all the same."""
        state.meta |= {"options": self.options, "data": self.data}
        try:
            write_state(state, self.path)
        except OSError as error:
            logger.warning("%s: no checkpoint after step %d. %s.", self.name, state.meta["steps_done"], error)


def _described(network: nn.Module) -> Described:
    tensors = network.state_dict()
    learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layers = [f"{name} {list(tensor.shape)}{'' if name in learned else ', fixed'}" for name, tensor in tensors.items()]
    return {"network": layers, "first weights": [float(t.double().norm()) for t in tensors.values()]}


def _that_differ(there: Described, here: Described) -> list[str]:
    return [name for name in {**there, **here} if not _equal(there.get(name), here.get(name))]


def _equal(there: object, here: object) -> bool:
    if _are_numbers(there) and _are_numbers(here) and len(there) == len(here):
        return bool(np.allclose(there, here, rtol=_CLOSE, atol=_CLOSE * max(map(abs, there), default=0)))
    return there == here


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, float) for one in value)


def _options_that_differ(there: Described, here: Described) -> Iterator[str]:
    for name in _that_differ(there, here):
        yield f"{name}={there.get(name)!r} there and {here.get(name)!r} here"


class Checkpoints(pl.Callback):
    """Keep a training every now and then, and when it is told to end by SIGTERM or Ctrl-C, between two of its steps.

    Parameters
    ----------
    file
        What to keep it in; `None` keeps nothing, and then Ctrl-C is not waited with until the step is done.
    every
        Seconds between two times.
    """

    def __init__(self, file: TrainingFile | None, every: float) -> None:
        self.file, self.every = file, every
        self.told: signal.Signals | None = None
        self._kept_at = math.inf
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, plan: TrainingPlan) -> None:
        """Wait for signals from now on."""
        self._kept_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # nothing else may
            for number in _SIGNALS if self.file is not None else (signal.SIGTERM,):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.told is not None:
            raise KeyboardInterrupt  # somebody is in a hurry
        self.told = signal.Signals(number)

    def on_train_batch_start(self, trainer: pl.Trainer, plan: TrainingPlan, *_: object) -> None:
        """Keep the training as it is before this step, and end it, where that is due in any of the processes."""
        told = 0 if self.told is None else int(self.told)
        due = time.monotonic() - self._kept_at >= self.every
        if trainer.world_size > 1:
            if plan.steps_done % LOOK_EVERY:
                return
            wanted = torch.tensor([float(due), float(told)], device=plan.device)
            wanted = trainer.strategy.reduce(wanted, reduce_op="max")
            due, told = bool(wanted[0]), int(wanted[1])
        if self.file is not None and (due or told):
            state = plan.state()
            if trainer.is_global_zero:
                self.file.write(state)
            self._kept_at = time.monotonic()
        if told:
            self.stop(signal.Signals(told), plan)

    def stop(self, told: signal.Signals, plan: TrainingPlan) -> None:
        """End the program as the signal would have ended it."""
        if plan.global_rank == 0:
            at = f"{plan.name}: training was ended by {_SIGNALS[told]} after {plan.steps_done} steps of"
            remedy = (
                "Nothing of it is kept: with checkpoint_dir= it could go on."
                if self.file is None
                else f"The same call with resume=True goes on from {self.file.path}."
            )
            tell(f"{at} {plan.options.max_steps}. {remedy}", unless_inside=self.file is None)
        if told == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + told)

    def on_train_end(self, trainer: pl.Trainer, plan: TrainingPlan) -> None:
        """Leave signals to whom they belong."""
        while self._before:
            signal.signal(*self._before.popitem())

    def on_exception(self, trainer: pl.Trainer, plan: TrainingPlan, exception: BaseException) -> None:
        """Do the same."""
        self.on_train_end(trainer, plan)
