"""What happens in each step of a training: learning rate, loss, history, and what stops it."""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from virtualcell._state import State
from virtualcell.train._ahead import Ahead, ahead
from virtualcell.train._quiet import random_state_kept, random_states, set_random_states, set_seed, silence
from virtualcell.train._sharded import Sharded, divided_like, part, whole
from virtualcell.train._step import Step

if TYPE_CHECKING:
    from virtualcell.train._options import TrainOptions
    from virtualcell.train._run import Batches, Loss

logger = logging.getLogger(__name__)

LOOK_EVERY = 20  # steps between two looks at whether losses were finite: each waits for the GPU
NEVER = torch.iinfo(torch.int64).max
RECORDED_ON = ("cuda",)  # devices on which steps are recorded


def keep_memory() -> None:
    """Let the C library keep what steps give back, which is else returned to the system and fetched in every step.

    That is a twentieth of the time of a small network. glibc keeps twice the largest block that was ever given back,
    at most 64 MiB; other libraries take no notice.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class Means:
    """Sums of losses, and the first batch where something was not finite; both stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0
        self.first_bad = torch.full((), NEVER, device=device)

    def add(self, losses: dict[str, Tensor], i: int, *, weight: int = 1) -> None:
        """Add the losses of batch `i`."""
        for name, loss in losses.items():
            value = loss.detach().float() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.weight += weight
        self.watch(losses["loss"], i)

    def watch(self, value: Tensor, i: int) -> None:
        """Remember batch `i` if `value` is not finite, unless an earlier one is remembered."""
        bad = torch.where(torch.isfinite(value.detach()), NEVER, i)
        self.first_bad = torch.minimum(self.first_bad, bad)


class TrainingPlan(pl.LightningModule):
    """Minimise `loss(network, batch)["loss"]` over the numbered steps of `batches`; Lightning's batch is the number.

    The schedule depends on the number of the step alone, and history and failure are part of the state
    (`get_extra_state`), so they come back from spawned processes; a checkpoint of this module and its optimiser is all
    that going on from a step needs.

    Parameters
    ----------
    network, loss, batches, options, validation, name
        See :func:`virtualcell.train.fit`; `options` are complete.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        batches: Batches,
        options: TrainOptions,
        *,
        validation: Batches | None = None,
        name: str = "the network",
    ) -> None:
        super().__init__()
        self.network, self.loss, self.batches, self.validation = network, loss, batches, validation
        self.options, self.name = options, name
        self.validate_every = options.validate_every or max(1, round(options.max_steps / 20))
        self.history: dict[str, dict[int, float]] = {}  # name -> number of steps done -> value
        self.failure = ""  # why training had to stop
        self.steps_done = 0
        self._step: Step | None = None
        self._sharded: Sharded | None = None
        self._read: dict[str, Ahead | Batches] = {}
        self.shown_loss = math.nan  # mean since the last entry of the history, for the progress bar
        self._goes_on_from: State | None = None

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        silence()  # a spawned process, which is where plans are unpickled, has loggers of its own

    def get_extra_state(self) -> dict:
        """Return what is not a tensor."""
        return {"history": self.history, "failure": self.failure, "steps_done": self.steps_done}

    def set_extra_state(self, state: dict) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        self.history, self.failure, self.steps_done = state["history"], state["failure"], state["steps_done"]

    def configure_model(self) -> None:
        """Divide the network among the processes, where that is the strategy."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self._sharded is None:
            self._sharded = Sharded(self.network, self.loss, self.trainer.strategy.root_device)
            self.network, self.loss = self._sharded.network, self._sharded.loss

    # -- optimiser ----------------------------------------------------------------------------------------------------

    def rate(self, i: int) -> float:
        """Learning rate of step `i` as a share of `lr`: up from a third of it, then down along a cosine."""
        n_steps, final = self.options.max_steps, self.options.final_lr
        n_up = max(1, round(self.options.warmup * n_steps))
        if i < n_up:
            return (1 + 2 * (i + 1) / n_up) / 3
        done = min(1.0, (i - n_up) / max(1, n_steps - n_up))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    @property
    def is_recorded(self) -> bool:
        """Whether steps are made by :class:`Step`, and not by Lightning, which knows several processes and scaling."""
        one = self.trainer.world_size == 1 and self.options.precision != "16-mixed"
        return one and self.device.type in RECORDED_ON

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build AdamW."""
        # one kernel for all weights; under 16-mixed the gradients must be unscaled before they are clipped
        on_gpu = self.device.type == "cuda"
        recorded = on_gpu and self.is_recorded
        return torch.optim.AdamW(
            self.network.parameters(),
            # a recording reads the rate from where it is
            lr=torch.tensor(self.options.lr, device=self.device) if recorded else self.options.lr,
            weight_decay=self.options.weight_decay,
            eps=1e-8,
            fused=(self.device.type in ("cpu", "cuda") and self.options.precision != "16-mixed") or None,
            capturable=recorded,
        )

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> None:
        """Clip the gradient's norm, and watch it: a finite loss may have a gradient that is not."""
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), self.options.gradient_clip or math.inf))
        if self.options.precision != "16-mixed":  # where overflows are expected, and such steps left out
            self._training.watch(norm, self.steps_done)

    # -- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Seed this process, and keep the weights that it starts from."""
        keep_memory()
        set_seed(self.options.seed + self.global_rank, self.device)
        self._training = Means(self.device)
        self.automatic_optimization = not self.is_recorded
        if self.is_recorded:
            options = {"clip": self.options.gradient_clip, "name": self.name}
            self._step = Step(self.network, self.loss, self.trainer.optimizers[0], **options)
        self._finite_steps = self.steps_done
        self._finite_weights = [tensor.detach().clone() for tensor in self._weights()]
        self._read = {"training": ahead(self.batches, self.options.max_steps, self.device)}
        if self.validation is not None:
            self._read["validation"] = ahead(self.validation, self.validation.n_steps, self.device)

    def on_train_start(self) -> None:
        """Go on from what was kept."""
        if self._goes_on_from is not None:
            self._take_rest(self._goes_on_from)
            self._goes_on_from = None

    def on_train_batch_start(self, i: int, _: int) -> None:
        """Set the learning rate."""
        rate = self.options.lr * self.rate(i)
        for group in self.trainer.optimizers[0].param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def training_step(self, i: int, _: int) -> Tensor | None:
        """Return the loss of this process's share of step `i`; or make the step, where Lightning does not."""
        batch = self._batch("training", i)
        if self.automatic_optimization:
            losses = self.loss(self.network, batch)
            self._training.add(losses, i)
            return losses["loss"]
        losses, norm = self._step(batch)
        self._training.add(losses, i)
        self._training.watch(norm, i)
        return None

    def on_train_batch_end(self, _: object, i: int, __: int) -> None:
        """Look at the losses every now and then, and end after the last step."""
        self.steps_done = i + 1
        last = self.steps_done == self.options.max_steps
        entry = last or self.steps_done % self.validate_every == 0
        if entry or self.steps_done % LOOK_EVERY == 0:
            self._look()
        if entry and not self.failure:
            self._enter("train", self._training)
            self._training = Means(self.device)
        if last or self.failure:
            self.trainer.should_stop = True  # after which Lightning validates once more, whatever the step

    def on_train_end(self) -> None:
        """Free the copy of the weights, and the recording; put together what was divided."""
        self._step = None
        if self._sharded is not None:
            self.network, self.loss = self._sharded.put_together()
            self._sharded = None
        del self._training, self._finite_weights
        self.close()

    def close(self) -> None:
        """End the threads that put batches together, also where the training did not come to its end."""
        for batches in self._read.values():
            if isinstance(batches, Ahead):
                batches.close()
        self._read = {}

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Draw the same random numbers in each validation, and none of training's."""
        self._kept = ExitStack()
        self._kept.enter_context(random_state_kept(self.device))
        set_seed(self.options.seed + self.global_rank, self.device)
        self._validating = Means(self.device)

    def validation_step(self, i: int, _: int) -> None:
        """Add the loss of this process's share of batch `i`, weighted by its size."""
        if not self.failure:
            batch = self._batch("validation", i)
            self._validating.add(self.loss(self.network, batch), i, weight=len(next(iter(batch.values()))))

    def on_validation_end(self) -> None:
        """Enter the losses into the history, and stop where they are not finite or no longer fall."""
        self._kept.close()
        if self._sharded is not None:
            self._sharded.put_apart()
        if self.failure:
            return
        bad = self._first_bad(self._validating)
        if bad != NEVER:
            self._fail(f"The validation loss of {self.name} is not finite ({self.validation.describe(bad)})")
        else:
            self._enter("validation", self._validating)
        if self.failure or self.stops_early:
            self.trainer.should_stop = True

    @property
    def stops_early(self) -> bool:
        """Whether the validation loss has not fallen for as long as early stopping waits."""
        losses = list(self.history.get("validation_loss", {}).values())
        if not self.options.early_stopping or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.options.patience

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state(self, *, is_finished: bool = False) -> State:
        """Return all that going on from here needs, or, of a training that is finished, all that came of it.

        Where it is not, every process calls this at the same step, before it begins.
        """
        history = {name: list(values.items()) for name, values in self.history.items()}
        meta: dict = {"steps_done": self.steps_done, "is_finished": is_finished, "history": history}
        tensors = {f"network.{name}": self._on_first(tensor) for name, tensor in self.network.state_dict().items()}
        if not is_finished:
            meta["scaling"] = self.trainer.precision_plugin.state_dict()
            of_optimizer = self.trainer.optimizers[0].state_dict()["state"]
            tensors |= {
                f"optimizer.{i}.{k}": self._on_first(t) for i, one in of_optimizer.items() for k, t in one.items()
            }
            sums = {**self._training.sums, "weight": torch.tensor(float(self._training.weight))}
            tensors |= {f"sums.{name}": self._of_all(tensor) for name, tensor in sums.items()}
            tensors |= {f"random.{kind}": self._of_all(state) for kind, state in random_states(self.device).items()}
        return State("training", meta, tensors)

    def take(self, state: State) -> None:
        """Take over weights and history, and the rest when the training starts."""
        self.network.load_state_dict(_named("network.", state.tensors))
        history = {name: {int(i): value for i, value in values} for name, values in state.meta["history"].items()}
        self.set_extra_state({"history": history, "failure": "", "steps_done": state.meta["steps_done"]})
        self._goes_on_from = state

    def _take_rest(self, state: State) -> None:
        optimizer, of_optimizer = self.trainer.optimizers[0], {}
        parameters = list(self.network.parameters())
        for key, tensor in _named("optimizer.", state.tensors).items():
            i, name = key.split(".")
            of_optimizer.setdefault(int(i), {})[name] = divided_like(parameters[int(i)], tensor)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": of_optimizer})
        self.trainer.precision_plugin.load_state_dict(state.meta["scaling"])
        # by which Lightning finds the steps to validate after
        self.trainer.fit_loop.epoch_loop.batch_progress.total.ready = self.steps_done
        sums, states = _named("sums.", state.tensors), _named("random.", state.tensors)
        if len(sums["weight"]) != self.trainer.world_size or set(states) != set(random_states(self.device)):
            if self.global_rank == 0:
                logger.warning(
                    "%s goes on with other devices than before: the same steps, with other random numbers.", self.name
                )
            return
        set_random_states({kind: of_all[self.global_rank].clone() for kind, of_all in states.items()}, self.device)
        self._training.weight = int(sums.pop("weight")[self.global_rank])
        self._training.sums = {name: of_all[self.global_rank].to(self.device) for name, of_all in sums.items()}

    def _on_first(self, tensor: Tensor) -> Tensor:
        """Return a tensor as a whole, which, where it is divided, the first process alone keeps."""
        if self._sharded is None:
            return tensor
        tensor = whole(tensor)
        return tensor.cpu() if self.global_rank == 0 else tensor.new_empty(0)

    def _of_all(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes in one, (n_processes, ...), on the CPU."""
        if self.trainer.world_size == 1:
            return tensor[None].cpu()
        tensor = tensor.to(self.device)
        of_all = [torch.empty_like(tensor) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(of_all, tensor)
        return torch.stack(of_all).cpu()

    # -- over all processes -------------------------------------------------------------------------------------------

    def _batch(self, stage: str, i: int) -> dict[str, Tensor]:
        return self._read[stage].step(i, self.global_rank, self.trainer.world_size, self.device)

    def _first_bad(self, means: Means) -> int:
        return int(self.trainer.strategy.reduce(means.first_bad.clone(), reduce_op="min"))

    def _enter(self, stage: str, means: Means) -> None:
        totals = torch.stack([*means.sums.values(), torch.tensor(float(means.weight), device=self.device)])
        *sums, weight = self.trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        for name, total in zip(means.sums, sums, strict=True):
            self.history.setdefault(f"{stage}_{name}", {})[self.steps_done] = total / weight

    def _look(self) -> None:
        """Stop all processes if one had a loss that is not finite; otherwise keep these weights."""
        bad = self._first_bad(self._training)
        if bad != NEVER:
            self._fail(
                f"The training loss of {self.name}, or its gradient, is not finite in step {bad + 1} of "
                f"{self.options.max_steps} ({self.batches.describe(bad)})"
            )
            return
        self.shown_loss = float(self._training.sums["loss"]) / self._training.weight
        self._finite_steps = self.steps_done
        with torch.no_grad():
            torch._foreach_copy_(self._finite_weights, self._weights())

    def _fail(self, what: str) -> None:
        with torch.no_grad():
            for kept, tensor in zip(self._finite_weights, self._weights(), strict=True):
                tensor.copy_(kept)
        held = (
            f"those after step {self._finite_steps}, the last" if self._finite_steps else "those of the start, the last"
        )
        self.failure = (
            f"{what}. The network holds {held} whose losses were finite. Use a lower learning rate (lr="
            f"{self.options.lr:g} here), and look for extreme or missing values in the data."
        )

    def _weights(self) -> list[Tensor]:
        """Return what this process holds of the network."""
        return [part(tensor) for tensor in (*self.network.parameters(), *self.network.buffers())]


def _named(beginning: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(beginning): tensor for name, tensor in tensors.items() if name.startswith(beginning)}
