"""Optimiser, schedule and the run of a training."""

from virtualcell.train._plan import TrainingPlan, run_training

__all__ = ["TrainingPlan", "run_training"]
