"""Workers of a real cluster, one of which is killed in the middle: nothing is lost, and nothing is another result."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata.io import sparse_dataset
from scipy import sparse

import virtualcell as vc
from virtualcell import _tasks
from virtualcell._state import digest_of
from virtualcell.data import _dask, _expression, _moments
from virtualcell.tl import _changes, _embed, _predicted, _prepare

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills a process")


def come_to_rest(cluster: distributed.LocalCluster, seconds: float = 30) -> None:
    """Wait until workers that died are replaced: distributed fails to close one that is about to be started."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        processes = [one.process for one in cluster.workers.values()]
        if all(one is not None and one.status.name == "running" and one.is_alive() for one in processes):
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as cluster:
        yield cluster
        come_to_rest(cluster)


@pytest.fixture(scope="module")
def client(cluster):
    with distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def kill(cluster, client) -> Callable[[], None]:
    """Kill a worker, once both have started: one that is killed before is not replaced."""
    cluster.scale(2)  # also where the test before lost one for good
    deadline, again = time.monotonic() + 120, time.monotonic() + 40
    while True:
        running = [one for one in cluster.workers.values() if one.status.name == "running"]
        if len(running) == len(client.nthreads()) == 2:
            return lambda: os.kill(running[0].process.pid, signal.SIGKILL)
        assert time.monotonic() < deadline
        if time.monotonic() > again:  # the cluster may take a dead one for one of two
            again = deadline
            cluster.scale(1)
            cluster.scale(2)
        time.sleep(0.1)


@pytest.fixture
def killed(kill, monkeypatch) -> list[int]:
    """Kill a worker when some tasks are sent, which the cluster then replaces; return the tasks."""
    sent, in_tasks = [], _tasks.in_tasks

    def counted(client, function, shared, items):
        def noted():
            for item in items:
                sent.append(item)
                if len(sent) == 3:
                    kill()
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
    # of fewer workers each gets more cells at a time, and products of other sizes differ in the last digit
    np.testing.assert_allclose(by_file.obsm["X_state"], cells.obsm["by_workers"], atol=1e-6)
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
def killed_in(kill, monkeypatch) -> Callable[[str], list[str]]:
    """Kill a worker in the middle of one of the things that workers do with cells on disk; return all that they did."""
    in_tasks, worked_on_by, sent = _tasks.in_tasks, _prepare.worked_on_by, []

    def patched(victim: str) -> list[str]:
        def counted(client, function, shared, items):
            name = function.args[0].__name__

            def noted():
                for item in items:
                    sent.append(name)
                    if name == victim and sent.count(name) == 3:
                        kill()
                    yield item

            yield from in_tasks(client, function, shared, noted())

        @contextmanager
        def then_killed(workers):
            with worked_on_by(workers):
                if workers.client is not None:
                    sent.append("genes")
                    if victim == "genes":
                        threading.Timer(0.1, kill).start()
                yield

        monkeypatch.setattr(_tasks, "in_tasks", counted)
        monkeypatch.setattr(_prepare, "worked_on_by", then_killed)
        return sent

    return patched


def two_files(cells: ad.AnnData, folder: Path) -> ad.AnnData:
    cells[:200].write_h5ad(folder / "one.h5ad")
    by_columns = cells[200:, ::-1].copy()
    by_columns.X = sparse.csc_matrix(by_columns.X)
    by_columns.write_h5ad(folder / "two.h5ad")
    return vc.pp.read_lazy([folder / "one.h5ad", folder / "two.h5ad"])


def view_of_a_file(cells: ad.AnnData, folder: Path) -> ad.AnnData:
    cells.write_h5ad(folder / "cells.h5ad")
    return ad.read_h5ad(folder / "cells.h5ad", backed="r")[::-1]


@pytest.mark.parametrize(
    ("kind", "victim"),
    [(two_files, "_copy_block"), (view_of_a_file, "_look_at"), (view_of_a_file, "_sums"), (two_files, "genes")],
)
def test_cells_on_disk_are_gone_through_by_workers_of_which_one_dies(
    kind, victim, screen, fit, client, killed_in, monkeypatch, tmp_path
):
    screen.X = sparse.csr_matrix(screen.X)
    with vc.settings.override(max_memory=2e-5):  # which makes small chunks
        cells, did = kind(screen, tmp_path), killed_in(victim)
    for module in (_moments, _expression):
        monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr(_expression, "_PIECES", 1)
    monkeypatch.setattr(_dask, "_CELLS", 32)
    models = []
    for name, workers in (("here", None), ("there", client)):
        with vc.settings.override(cache_dir=tmp_path / name, max_memory=2e-5, progress=False):
            models.append(fit(cells, client=workers, n_top_genes=40, training={"max_steps": 3, "accelerator": "cpu"}))
    counted = Counter(did)
    assert counted.pop("genes") == 1
    assert set(counted) == {"_copy_block", "_look_at", "_sums"}
    assert min(counted.values()) > 3
    here, there = models
    assert here.genes == there.genes
    assert digest_of(here.state()) == digest_of(there.state())  # weights and effects, bit for bit


def test_workers_that_do_not_see_a_file_or_the_cache_are_named(screen, design, alone, tmp_path):
    screen.X = sparse.csr_matrix(screen.X)
    cells, (_, client) = view_of_a_file(screen, tmp_path), alone
    for name, lacks in (("cells.h5ad", r"cells\.h5ad"), ("copy.json", r"cache.rows.\w+.copy\.json")):
        client.run(lambda lacking: setattr(Path, "exists", lambda path: path.name != lacking), name)
        with (
            vc.settings.override(cache_dir=tmp_path / "cache"),
            pytest.raises(
                FileNotFoundError, match=rf"^1 workers of client= do not see .*{lacks}, .*on a disk that all"
            ),
        ):
            vc.tl.fit_baseline(cells, **design, client=client)


def test_baselines_measure_effects_by_workers_of_cells_on_disk_alone(screen, design, client, caplog, tmp_path):
    with caplog.at_level("INFO", "virtualcell"):
        expected = vc.tl.fit_baseline(screen, **design, client=client)
    assert "X is in memory: client= is of use for data that its workers can open" in caplog.text
    with vc.settings.override(cache_dir=tmp_path / "cache"):
        found = vc.tl.fit_baseline(view_of_a_file(screen, tmp_path), **design, client=client)
    assert all((found.arrays[name] == array).all() for name, array in expected.arrays.items())


def test_a_file_that_workers_cannot_open_is_named(screen, design, client, tmp_path):
    screen.write_h5ad(tmp_path / "cells.h5ad")
    cells = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r+")
    with pytest.raises(ValueError, match=r"cells\.h5ad, which is open for writing here\. Open it with backed='r'"):
        vc.tl.fit_baseline(cells, **design, client=client)
    cells.file.close()
    with h5py.File(io.BytesIO((tmp_path / "cells.h5ad").read_bytes())) as file:
        cells = ad.AnnData(sparse_dataset(file["X"]), obs=screen.obs, var=screen.var)
        with pytest.raises(ValueError, match=r"BytesIO .*, which is no file, was opened from another folder, or"):
            vc.tl.fit_baseline(cells, **design, client=client)


@pytest.fixture
def alone():
    """A cluster of one worker, with which all that was sent is lost, and its client."""
    options = {"processes": True, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield cluster, client
        come_to_rest(cluster)


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


def test_a_client_must_be_one(fitted, model, design):
    for call in (
        lambda: vc.tl.embed(fitted, model.se, client="tcp://scheduler:8786"),
        lambda: vc.tl.screen(fitted, context="type_3", client="tcp://scheduler:8786"),
        lambda: vc.tl.predict_perturbation(fitted, client="tcp://scheduler:8786"),
        lambda: vc.tl.fit_state(fitted, **design, client="tcp://scheduler:8786"),
        lambda: vc.tl.fit_baseline(fitted, **design, client="tcp://scheduler:8786"),
    ):
        with pytest.raises(TypeError, match=r"client='tcp://scheduler:8786' is not a `dask\.distributed\.Client`"):
            call()
