"""Options, optimiser, schedule and the run of a training."""

from virtualcell.train._run import Batches, Loss, TrainOptions, fit

__all__ = ["Batches", "Loss", "TrainOptions", "fit"]
