"""What holds for every call that is not told otherwise: what is shown, the seed, the cache folder, the threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import NoReturn

import pooch

from virtualcell._arguments import require_whole

logger = logging.getLogger(__name__)


class Verbosity(IntEnum):
    """How much is said."""

    error = 0
    warning = 1
    info = 2
    debug = 3


# Warnings are what Python shows of a log that nobody configured, so that at "warning" the log is left alone.
_LEVELS = {
    Verbosity.error: logging.ERROR,
    Verbosity.warning: logging.NOTSET,
    Verbosity.info: logging.INFO,
    Verbosity.debug: logging.DEBUG,
}
# By these variables launchers of several processes tell each its number.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


class Settings:
    """Settings of virtualcell, `vc.settings`, in the manner of `scanpy.settings`.

    A call takes what its own arguments say, and from here what they leave open.

    Parameters
    ----------
    verbosity
        How much is said: "error" (0) for errors alone; "warning" (1), the default, for warnings and results such as the
        verdict of :func:`virtualcell.tl.fit_state` too; "info" (2) for what each step does too; "debug" (3).
    progress
        Whether bars show how far long calls are.
    seed
        Seed of everything random, a whole number of at least 0.
    cache_dir
        Folder in which downloaded data sets and copies of lazy matrices are kept, by default the user's cache folder.
    max_cache
        How much of the disk the copies in its folder `rows` take before those that were used least recently are
        removed, in GB; by default 100, and `None` for no bound. One that any process uses stays. Downloads do not count
        and stay too. On Windows nothing is removed.
    max_memory
        Memory for the cells that are read at a time from a matrix which is not in memory itself, in GB; by default 1.
    n_threads
        Number of threads of torch in the calls of virtualcell; `None` for as many as torch was told to take, by
        `torch.set_num_threads` or `OMP_NUM_THREADS`, by default one per core.

    Examples
    --------
    >>> vc.settings.verbosity = "info"
    >>> with vc.settings.override(progress=False, seed=1):
    ...     vc.tl.fit_state(adata, perturbation_key="target_gene", control="non-targeting")
    """

    verbosity: Verbosity
    progress: bool
    seed: int
    cache_dir: Path
    max_cache: float | None
    max_memory: float
    n_threads: int | None

    def __init__(self) -> None:
        self.verbosity, self.progress, self.seed, self.n_threads = Verbosity.warning, True, 0, None
        self.cache_dir, self.max_cache, self.max_memory = pooch.os_cache("virtualcell"), 100.0, 1.0

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _CHECKS:
            raise AttributeError(f"vc.settings has no {name!r}. There are {', '.join(_CHECKS)}.")
        super().__setattr__(name, _CHECKS[name](value))
        if name == "verbosity":
            _set_log(self.verbosity)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"vc.settings has no {name!r}. There are {', '.join(_CHECKS)}.")

    def __repr__(self) -> str:
        shown = {**vars(self), "verbosity": self.verbosity.name, "cache_dir": str(self.cache_dir)}
        return "\n".join(f"{name} = {shown[name]!r}" for name in _CHECKS)

    @contextmanager
    def override(self, **stated: object) -> Iterator[None]:
        """Change settings for as long as a `with` block runs.

        Parameters
        ----------
        **stated
            Settings by name.
        """
        before = {name: getattr(self, name) for name in stated}
        try:
            for name, value in stated.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def _verbosity(value: object) -> Verbosity:
    if isinstance(value, str) and value in Verbosity.__members__:
        return Verbosity[value]
    if isinstance(value, Integral) and not isinstance(value, bool) and value in list(Verbosity):
        return Verbosity(value)
    valid = ", ".join(f"{v.name!r} ({v.value})" for v in Verbosity)
    raise ValueError(f"verbosity={value!r} is unknown. Valid: {valid}.")


def _progress(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"progress={value!r} is neither True nor False.")
    return value


def _folder(value: object) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"cache_dir={value!r} must be the path of a folder, which is made where it is missing.")
    return Path(value).expanduser()


def _gigabytes(name: str, remedy: str = "") -> Callable[[object], float]:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r} must be a number of gigabytes above 0.{remedy}")
        return float(value)

    return check


def _whole(name: str, least: int, remedy: str = "") -> Callable[[object], int]:
    return partial(require_whole, name, least=least, remedy=remedy)


_seed = _whole("seed", 0)
_n_threads = _whole("n_threads", 1, "Say None for as many as torch was told to take.")
_max_cache = _gigabytes("max_cache", " Say None for no bound.")
_CHECKS: dict[str, Callable[[object], object]] = {
    "verbosity": _verbosity,
    "progress": _progress,
    "seed": _seed,
    "cache_dir": _folder,
    "max_cache": lambda value: None if value is None else _max_cache(value),
    "max_memory": _gigabytes("max_memory"),
    "n_threads": lambda value: None if value is None else _n_threads(value),
}

# Shows the log where nobody else does; who configures Python's logging gets every line once, as configured.
_shown = logging.StreamHandler()
_shown.setFormatter(logging.Formatter("%(message)s"))
_shown.addFilter(lambda _: not logging.getLogger().handlers)


def _set_log(verbosity: Verbosity) -> None:
    """Let the log of the package say as much."""
    log = logging.getLogger("virtualcell")
    log.setLevel(_LEVELS[verbosity])
    if verbosity >= Verbosity.info:
        log.addHandler(_shown)
    else:
        log.removeHandler(_shown)


settings = Settings()


def seed_of(seed: int | None) -> int:
    """Return the seed that a call was given, or that of the settings."""
    return settings.seed if seed is None else _seed(seed)


def say(text: str) -> None:
    """Print what a call has found out and its user is to read, unless verbosity is "error".

    Of several processes that run one script the first one prints.
    """
    if settings.verbosity >= Verbosity.warning and all(os.environ.get(name, "0") == "0" for name in _RANKS):
        print(text)  # noqa: T201  results are for the screen, where a log that nobody configured shows none
