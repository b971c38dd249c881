from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import virtualcell as vc
from virtualcell import _threads
from virtualcell._threads import own_threads
from virtualcell.data._threads import in_threads


@pytest.fixture
def n_threads():
    """Torch is told to take three threads, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def run(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**kept, **environment}
    )
    return done.stdout


@pytest.mark.parametrize("told", ["", "torch.set_num_threads(1)"])
def test_numba_does_not_change_the_number_of_threads_of_our_calls(told: str) -> None:
    """scanpy's normalisation starts numba, which gives torch all cores of a machine (at least two here)."""
    code = f"""
import numba, numpy as np, torch
torch.get_num_threads()
{told}
numba.set_num_threads(2)
@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(len(x)):
        s += x[i]
    return s
total(np.ones(100))
before = torch.get_num_threads()
from virtualcell._threads import own_threads
from virtualcell.data._threads import in_threads
with own_threads():
    print(before, torch.get_num_threads(), end=" ")
print(torch.get_num_threads())
"""
    environment = {"NUMBA_NUM_THREADS": "2"} if told else {"NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}
    assert run(code, **environment) == "2 1 1\n"  # numba has told torch to take two, which nobody asked for


def test_the_settings_hold_while_a_call_runs(n_threads: int) -> None:
    with vc.settings.override(n_threads=1):
        with own_threads():
            assert torch.get_num_threads() == 1
            with own_threads():  # one call in another
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == n_threads
    with own_threads():
        assert torch.get_num_threads() == n_threads


def test_a_thread_that_shares_has_fewer_and_the_others_have_what_they_had(n_threads: int) -> None:
    found = []

    def work() -> None:
        _threads.share_threads(1)
        with own_threads():
            found.append(torch.get_num_threads())

    for target in (work, lambda: found.append(torch.get_num_threads())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert found == [1, n_threads]
    assert torch.get_num_threads() == n_threads


def test_the_number_comes_back_after_an_error(n_threads: int) -> None:
    with vc.settings.override(n_threads=1), pytest.raises(ZeroDivisionError), own_threads():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == n_threads


def test_a_system_that_does_not_tell_its_load_is_no_error(n_threads: int, monkeypatch) -> None:
    def unknown() -> None:
        raise OSError("load average is unobtainable")

    monkeypatch.setattr(_threads._Own, "was_said", False)
    monkeypatch.setattr(os, "getloadavg", unknown)
    with vc.settings.override(n_threads=2), own_threads():
        assert torch.get_num_threads() == 2
    assert (torch.get_num_threads(), _threads._Own.n_calls) == (n_threads, 0)


def test_overlapping_calls_leave_the_number_as_it_was(n_threads: int) -> None:
    inside, go_on, found = threading.Event(), threading.Event(), []

    def call() -> None:
        with own_threads():
            inside.set()
            go_on.wait(10)
            found.append(torch.get_num_threads())

    with vc.settings.override(n_threads=2):
        thread = threading.Thread(target=call)
        with own_threads():
            thread.start()
            assert inside.wait(10)
        go_on.set()
        thread.join()
    assert found == [2]
    assert torch.get_num_threads() == n_threads
    with own_threads():
        assert torch.get_num_threads() == n_threads


def test_a_busy_machine_is_noted_once_with_what_helps(n_threads: int, caplog, monkeypatch) -> None:
    monkeypatch.setattr(_threads._Own, "was_said", False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    caplog.set_level("INFO", "virtualcell")
    with own_threads():
        assert caplog.messages == []  # nobody else is there
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    with vc.settings.override(n_threads=1), own_threads():
        assert caplog.messages == []  # one thread waits for none
    for _ in range(2):
        with own_threads():
            pass
    (line,) = caplog.messages
    assert "of 4 cores busy, and torch's 3 threads" in line
    assert "`vc.settings.n_threads = 1`, or OMP_WAIT_POLICY=PASSIVE" in line


def test_what_waits_is_not_begun_after_an_error_or_when_nobody_asks_for_more() -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        time.sleep(0.05)
        if i == 3:
            raise ValueError(i)
        return i

    with vc.settings.override(n_threads=2):
        with pytest.raises(ValueError, match="3"):
            list(in_threads(work, range(100)))
        assert len(begun) <= 7  # without those that were handed out already
        begun.clear()
        results = in_threads(work, range(10, 100))
        assert next(results) == 10
        results.close()
        assert len(begun) <= 4
