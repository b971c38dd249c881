from __future__ import annotations

import virtualcell as vc
from virtualcell._progress import Bar


def test_a_bar_says_what_is_done_and_how_far_it_is(capfd) -> None:
    with Bar("verdict", 3, unit="fold", shown=True) as bar:
        bar.step()
        bar.show(3, "loss 0.1")
    lines = capfd.readouterr().err.split("\r")
    assert lines[1].startswith("verdict, fold 0 of 3 |          | 00:00")  # also before the first step
    assert lines[-1].startswith("verdict, fold 3 of 3, loss 0.1 |██████████| 00:0")


def test_the_settings_decide_about_bars_unless_a_call_does(capfd) -> None:
    with vc.settings.override(progress=False):
        with Bar("verdict", 1) as bar:
            bar.step()
        assert capfd.readouterr().err == ""
        with Bar("verdict", 1, shown=True) as bar:
            bar.step()
        assert "verdict, 1 of 1" in capfd.readouterr().err
