"""One training plan for SE and ST: AdamW, linear warm-up, cosine decay; what to minimise comes from the model."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable

import lightning.pytorch as pl
import torch
from scvi.train import TrainRunner
from torch import Tensor, nn
from torch.utils.data import DataLoader

# A function of the network and a batch: the loss (a scalar) first, then whatever else is to be logged.
Loss = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]

logger = logging.getLogger(__name__)


class TrainingPlan(pl.LightningModule):
    """Minimise `loss(network, batch)["loss"]`.

    Parameters
    ----------
    network, loss
        What to train and on what.
    n_steps
        Length of the schedule.
    lr, weight_decay
        Of AdamW.
    warmup, final_lr
        Share of the steps with rising rate; rate at the end as a share of `lr`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        n_steps: int,
        lr: float,
        weight_decay: float = 0.01,
        warmup: float = 0.03,
        final_lr: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.n_steps, self.lr, self.weight_decay = n_steps, lr, weight_decay
        self.warmup, self.final_lr = warmup, final_lr

    def _log(self, losses: dict[str, Tensor], stage: str, n: int) -> Tensor:
        for name, value in losses.items():
            self.log(
                f"{stage}_{name}",
                value.detach(),
                on_epoch=True,
                on_step=False,
                batch_size=n,
                prog_bar=name == "loss",
                sync_dist=True,
            )
        return losses["loss"]

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        return self._log(self.loss(self.network, batch), "train", len(next(iter(batch.values()))))

    def validation_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Return the loss of a batch; logged as `validation_loss`, which early stopping watches."""
        return self._log(self.loss(self.network, batch), "validation", len(next(iter(batch.values()))))

    def rate(self, step: int) -> float:
        """Learning rate at a step, as a share of `lr`: up from a third of it, then down along a cosine."""
        n_up = max(1, round(self.warmup * self.n_steps))
        if step < n_up:
            return (1 + 2 * (step + 1) / n_up) / 3
        done = min(1.0, (step - n_up) / max(1, self.n_steps - n_up))
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2

    def configure_optimizers(self) -> dict:
        """Build AdamW with a rate that changes every step."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Loaders(pl.LightningDataModule):
    """The loaders as they are; `scvi` asks the data module for them."""

    def __init__(self, train: DataLoader, validation: DataLoader | None) -> None:
        super().__init__()
        self._train, self._validation = train, validation

    def train_dataloader(self) -> DataLoader:
        return self._train

    def val_dataloader(self) -> DataLoader | list:
        return self._validation if self._validation is not None else []


def run_training(
    model: object,
    loss: Loss,
    train: Iterable,
    validation: Iterable | None,
    *,
    max_epochs: int | None,
    max_steps: int | None,
    default_steps: int,
    lr: float,
    weight_decay: float,
    gradient_clip: float,
    early_stopping: bool,
    early_stopping_patience: int,
    accelerator: str,
    devices: int | list[int] | str,
    precision: str,
    seed: int,
    plan_kwargs: dict | None = None,
    **trainer_kwargs: object,
) -> None:
    """Train `model.module` through scvi's runner, which sets `history`, `is_trained` and the device.

    The length is `max_epochs` or `max_steps`, whichever ends first; `default_steps` where neither is given. `train` and
    `validation` are loaders whose items are batches.
    """
    if early_stopping and validation is None:
        raise ValueError("early_stopping=True needs validation cells: give val_fraction > 0 or a split with 'val'.")
    if str(precision).endswith("-true") and precision != "32-true":
        mixed = "bf16-mixed" if str(precision).startswith("bf16") else "16-mixed"
        raise ValueError(f"precision={precision!r} is not for these models: weights stay in float32. Use {mixed!r}.")
    if not len(train):
        raise ValueError("there is nothing to train on: no perturbed training cells with matching controls.")
    if max_epochs is None and max_steps is None:
        max_steps = default_steps
    steps = min(
        max_steps if max_steps is not None else math.inf,
        max_epochs * len(train) if max_epochs is not None else math.inf,
    )
    if steps < 1:
        raise ValueError(f"max_epochs={max_epochs!r}, max_steps={max_steps!r}: at least one step is needed.")
    if early_stopping and steps < len(train):
        raise ValueError(
            f"early_stopping=True judges at the end of an epoch, which has {len(train)} steps, but training ends after "
            f"{steps}. Give more max_steps, or early_stopping=False."
        )
    n_epochs = math.ceil(steps / len(train))
    if validation is not None:
        # at most some twenty looks at the validation sets, unless every epoch counts
        trainer_kwargs.setdefault("check_val_every_n_epoch", 1 if early_stopping else max(1, n_epochs // 20))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        torch.manual_seed(seed)
        model.module.train()  # scvi leaves a trained one in evaluation mode: training on would go without dropout
        # loaders read from memory here: worker processes would only copy the matrix
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        TrainRunner(
            model,
            training_plan=TrainingPlan(
                model.module, loss, n_steps=steps, lr=lr, weight_decay=weight_decay, **(plan_kwargs or {})
            ),
            data_splitter=_Loaders(train, validation),
            max_epochs=n_epochs,
            max_steps=steps,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            gradient_clip_val=gradient_clip,
            early_stopping=early_stopping,
            early_stopping_monitor="validation_loss",
            early_stopping_patience=early_stopping_patience,
            use_distributed_sampler=False,  # our sampler shards by rank itself
            **trainer_kwargs,
        )()
