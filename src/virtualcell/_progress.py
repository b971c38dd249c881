"""Bars that say what they are about."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that a notebook without ipywidgets gets bars of text is no concern of its user
    from tqdm.auto import tqdm

from virtualcell._settings import settings

_FORMAT = "{desc} |{bar}| {elapsed}"


class Bar:
    """One bar: what is done, how far it is, and for how long.

    Parameters
    ----------
    title
        What is done: "SE: cell embedding".
    total
        Number of steps.
    unit
        What a step is called.
    done
        Number of steps that were done before.
    shown
        Whether it is drawn; as `vc.settings.progress` says where it is `None`.
    """

    def __init__(self, title: str, total: int, *, unit: str = "", done: int = 0, shown: bool | None = None) -> None:
        self.title, self.unit, self.total = title, f"{unit} " if unit else "", total
        disable = not (settings.progress if shown is None else shown)
        self._bar = tqdm(
            total=total, initial=done, desc=self._text(done), bar_format=_FORMAT, disable=disable, leave=True
        )
        self.done = done

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, done: int, note: str = "") -> None:
        """Move the bar to a number of steps done, with a note behind it."""
        self._bar.set_description_str(self._text(done, note), refresh=False)
        self._bar.update(done - self.done)
        if done in (self.done, self.total):  # which may have come too soon after the last time that it was drawn
            self._bar.refresh()
        self.done = done

    def step(self, note: str = "") -> None:
        """Move the bar by one step."""
        self.show(self.done + 1, note)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _text(self, done: int, note: str = "") -> str:
        return f"{self.title}, {self.unit}{done} of {self.total}" + (f", {note}" if note else "")
