"""Workers of a real cluster, one of which is killed in the middle: nothing is lost, and nothing is another result."""

from __future__ import annotations

import logging
import os
import signal
import sys
from concurrent.futures import CancelledError

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell import _tasks
from virtualcell.tl import _changes, _embed, _predicted

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills a process")


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def killed(cluster, monkeypatch) -> list[int]:
    """Kill a worker when some tasks are sent, which the cluster then replaces; return the tasks."""
    sent, in_tasks = [], _tasks.in_tasks

    def counted(client, function, shared, items):
        def noted():
            for item in items:
                sent.append(item)
                if len(sent) == 3:
                    os.kill(cluster.workers[0].process.pid, signal.SIGKILL)
                yield item

        yield from in_tasks(client, function, shared, noted())

    for module in (_embed, _changes, _predicted):
        monkeypatch.setattr(module, "in_tasks", counted)
    return sent


def test_cells_are_embedded_by_workers_of_which_one_dies(fitted, model, client, killed, tmp_path):
    expected = fitted.obsm["X_state"]
    cells = fitted.copy()
    vc.tl.embed(cells, model.se, key_added="by_workers", client=client)
    assert len(killed) >= 8
    np.testing.assert_allclose(cells.obsm["by_workers"], expected, atol=1e-5)
    vc.tl.embed(cells, model.se, to=tmp_path / "cells.zarr", client=client)
    by_file = ad.read_zarr(tmp_path / "cells.zarr")
    np.testing.assert_array_equal(by_file.obsm["X_state"], cells.obsm["by_workers"])
    assert list(by_file.obs_names) == list(cells.obs_names)


def test_perturbations_are_screened_by_workers_of_which_one_dies(fitted, client, killed, monkeypatch):
    monkeypatch.setattr(_changes, "_AT_ONCE", 1)
    expected = vc.tl.screen(fitted, context="type_3")
    found = vc.tl.screen(fitted, context="type_3", client=client)
    assert len(killed) == len(expected) == 5
    pd.testing.assert_frame_equal(found, expected)


def test_cells_are_predicted_by_workers_of_which_one_dies(fitted, client, killed, monkeypatch, tmp_path):
    monkeypatch.setattr(_predicted, "_TASK", 1)
    expected = vc.tl.predict_perturbation(fitted, n_cells=20, n_samples=2)
    found = vc.tl.predict_perturbation(fitted, n_cells=20, n_samples=2, client=client)
    assert len(killed) == 15  # perturbations x contexts
    for layer in (None, "counts", "control"):
        a, b = (one.X if layer is None else one.layers[layer] for one in (found, expected))
        assert (a != b).nnz == 0
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    np.testing.assert_array_equal(found.varm["standard_error"], expected.varm["standard_error"])
    path = tmp_path / "predicted.h5ad"
    on_disk = vc.tl.predict_perturbation(fitted, n_cells=20, n_samples=2, client=client, to=path)
    pd.testing.assert_frame_equal(on_disk.obs, expected.obs)
    assert (on_disk.X[:] != expected.X).nnz == 0


@pytest.fixture
def alone():
    """A cluster of one worker, with which all that was sent is lost, and its client."""
    options = {"processes": True, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield cluster, client


def test_what_all_tasks_need_is_sent_again_where_it_died_with_its_worker(alone):
    cluster, client = alone
    pids = set()

    def items():
        for item in range(8):
            if item in (3, 6):
                pids.add(cluster.workers[0].process.pid)
                os.kill(cluster.workers[0].process.pid, signal.SIGKILL)
            yield item

    found = list(_tasks.in_tasks(client, lambda shared, item: (shared, item), ("shared", [1]), items()))
    assert found == [(("shared", [1]), item) for item in range(8)]
    assert len(pids) == 2


def test_a_task_of_which_workers_die_is_not_sent_forever(alone):
    _, client = alone
    with pytest.raises((distributed.KilledWorker, CancelledError)):
        list(_tasks.in_tasks(client, lambda shared, _: os.kill(os.getpid(), shared), signal.SIGKILL, range(1)))


def test_a_client_must_be_one(fitted, model):
    for call in (
        lambda: vc.tl.embed(fitted, model.se, client="tcp://scheduler:8786"),
        lambda: vc.tl.screen(fitted, context="type_3", client="tcp://scheduler:8786"),
        lambda: vc.tl.predict_perturbation(fitted, client="tcp://scheduler:8786"),
    ):
        with pytest.raises(TypeError, match=r"client='tcp://scheduler:8786' is not a `dask\.distributed\.Client`"):
            call()
