"""Processes that train on the same cells have one store of their rows: one file that is mapped, or shared memory."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import virtualcell as vc
from virtualcell.data import _cache, _packed
from virtualcell.data._cache import Hold, Scratch, home, made_alone
from virtualcell.data._expression import Expression
from virtualcell.data._packed import PackedRows

N = 20_000


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with vc.settings.override(cache_dir=tmp_path / "cache", progress=False, max_memory=0.002):
        yield


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    counts = sparse.random(N, 30, 0.3, format="csr", random_state=0, data_rvs=lambda n: np.full(n, 3.0))
    counts += sparse.csr_matrix((np.ones(N), (np.arange(N), np.arange(N) % 30)), shape=counts.shape)
    obs = pd.DataFrame({"perturbation": np.resize(["NT", "A", "B"], N)}, index=[f"cell{i}" for i in range(N)])
    ad.AnnData(counts.astype(np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def expression(path: Path, **given: object) -> Expression:
    return Expression(ad.read_h5ad(path, backed="r"), **given)


def stores() -> list[Path]:
    return sorted(home().glob("packed-*"))


# -- one store --------------------------------------------------------------------------------------------------------


def test_what_was_packed_is_found_again(cells: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "virtualcell.data._packed")
    packed = PackedRows.pack(expression(cells))
    rows = packed.rows(np.arange(0, N, 999))
    np.testing.assert_array_equal(rows.numpy(), expression(cells).rows(np.arange(0, N, 999)).toarray())
    (entry,) = stores()
    sent = pickle.dumps(packed)  # to another process, which maps the same files
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).rows(np.arange(0, N, 999)), rows)
    os.utime(entry / "packed.json", (1, 1))
    for again in (PackedRows.pack(expression(cells)), PackedRows.pack(expression(cells).at_hand())):
        assert torch.equal(again.rows(np.arange(0, N, 999)), rows)
    assert stores() == [entry]
    assert (entry / "packed.json").stat().st_mtime > 1  # when it was used for the last time
    assert caplog.text.count("20000 cells x 30 genes are packed in") == 1


def test_other_rows_genes_and_scales_are_other_stores(cells: Path) -> None:
    whole = expression(cells)
    others = [
        whole,
        expression(cells, unit="log_counts"),
        expression(cells, target_sum=1e5),
        expression(cells, library_size=np.full(N, 200.0)),
        whole.select(whole.genes[:10]),
        whole.select(whole.genes[:10][::-1]),
        whole.take(np.arange(100)),
        whole.take(np.arange(100)[::-1]),
    ]
    found = [PackedRows.pack(one) for one in others]
    assert len(stores()) == len(others)
    for one, packed in zip(others, found, strict=True):
        np.testing.assert_array_equal(packed.rows(np.arange(50)).numpy(), one.rows(np.arange(50)).toarray())
    # the same place with other cells
    adata = ad.read_h5ad(cells)
    adata.X *= 2
    adata.write_h5ad(cells.with_name("new.h5ad"))
    cells.with_name("new.h5ad").replace(cells)
    PackedRows.pack(expression(cells))
    assert len(stores()) == len(others) + 1


class Interrupted(BaseException):
    """The process is killed."""


@pytest.mark.parametrize("torn", [None, "genes", "values", "lengths"])
def test_packing_goes_on_behind_the_last_whole_block(cells: Path, torn: str | None, monkeypatch) -> None:
    expected = PackedRows.pack(expression(cells).take(np.arange(N))).rows(np.arange(N))
    (before,) = stores()
    real, read = _packed._Writer.add, []

    def interrupted(writer: _packed._Writer, **arrays: np.ndarray) -> None:
        read.append(len(arrays["lengths"]))
        if len(read) == 4:
            for name in () if torn is None else (torn,):  # half of it was written
                with (writer.folder / name).open("ab") as file:
                    arrays[name].astype(writer.dtypes[name])[: len(arrays[name]) // 2].tofile(file)
            raise Interrupted
        real(writer, **arrays)

    def noted(writer: _packed._Writer, **arrays: np.ndarray) -> None:
        read.append(len(arrays["lengths"]))
        real(writer, **arrays)

    monkeypatch.setattr(_packed._Writer, "add", interrupted)
    with pytest.raises(Interrupted):
        PackedRows.pack(expression(cells))
    (half,) = set(stores()) - {before}
    assert not (half / "packed.json").exists()
    monkeypatch.setattr(_packed._Writer, "add", noted)
    written, read[:] = sum(read[:3]), []
    packed = PackedRows.pack(expression(cells))
    assert torch.equal(packed.rows(np.arange(N)), expected)
    assert 0 < sum(read) == N - written


def test_files_of_an_interrupted_store_that_lack_what_they_should_hold_are_written_anew(cells: Path) -> None:
    PackedRows.pack(expression(cells))
    (entry,) = stores()
    content = {name: (entry / name).read_bytes() for name in ("genes", "values")}
    (entry / "packed.json").unlink()
    np.full(N, 10).tofile(entry / "lengths")
    os.truncate(entry / "values", 100)
    PackedRows.pack(expression(cells))
    assert content == {name: (entry / name).read_bytes() for name in content}


def test_who_comes_second_waits_for_the_first(cells: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "virtualcell.data._packed")
    key = expression(cells).key
    folder, found = home() / f"packed-{key}-float32-1", []
    hold = Hold(folder)
    with made_alone(folder):  # as the first process does
        second = threading.Thread(target=lambda: found.append(PackedRows.pack(expression(cells))))
        second.start()
        time.sleep(0.3)
        assert second.is_alive()
        assert not found
    second.join()
    assert hold.folder == folder == stores()[0]
    assert found[0].rows([1]).shape == (1, 30)


@pytest.mark.skipif(sys.platform == "win32", reason="files have no greatest size")
@pytest.mark.parametrize("lazy", [True, False])
def test_a_full_disk_is_named_with_what_helps(cells: Path, lazy: bool) -> None:
    """In a process whose files may not be larger than a few kilobytes, as if the disk were full."""
    code = f"""
import resource, signal
from pathlib import Path
from test_shared_rows import PackedRows, expression, vc
vc.settings.cache_dir, vc.settings.progress, vc.settings.max_memory = Path("cache"), False, 0.002
rows = expression(Path({str(cells)!r}))
rows = rows if {lazy} else rows.at_hand()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({"4000" if lazy else "200_000"}, resource.RLIM_INFINITY))
(rows.at_hand if {lazy} else lambda: PackedRows.pack(rows))()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    last = ended.stderr.strip().splitlines()[-1]
    assert "cache/rows/" in last, ended.stderr
    assert " is not written: " in last
    assert "Free some space, or name a folder on a larger disk: `vc.settings.cache_dir = path`" in last


def test_locks_are_closed(cells: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        kept = Scratch.of_session()  # whose lock another one does not get
        PackedRows.pack(expression(cells))
        del kept
        gc.collect()
    assert not [one for one in said if "in_use.lock" in str(one.message)]


def test_a_store_that_is_there_is_read_without_its_lock(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that another user keeps, no file may be opened for writing."""
    packed = PackedRows.pack(expression(cells)).rows([1])
    monkeypatch.setattr(_cache, "made_alone", lambda folder: (_ for _ in ()).throw(PermissionError(folder)))
    np.testing.assert_array_equal(PackedRows.pack(expression(cells)).rows([1]), packed)


def test_a_matrix_that_nothing_tells_apart_is_packed_for_one_fit(cells: Path) -> None:
    import dask.array as da

    adata = ad.read_h5ad(cells)
    adata.X = da.from_array(adata.X.toarray(), chunks=(1000, 30))
    for lazy in (Expression(adata), Expression(adata).at_hand()):
        packed = PackedRows.pack(lazy)
        assert packed.rows([1]).shape == (1, 30)
        del packed
    assert stores() == []


# -- two processes ----------------------------------------------------------------------------------------------------


def fitted_by_two(cells: Path, strategy: str) -> list[dict]:
    program = [sys.executable, str(Path(__file__).parent / "shared_rows.py"), str(cells), strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(Path(f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("pid") != second.pop("pid")
    return [first, second]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes_learn_from_the_same_memory(cells: Path, strategy: str) -> None:
    first, second = fitted_by_two(cells, strategy)
    packed = first.pop("packed"), second.pop("packed")
    assert first == second
    for inode, path in first.values():
        assert inode != "0"
        assert ("/cache/rows/packed-" if strategy == "ddp" else "/dev/shm/torch_") in path
    if strategy == "ddp":
        assert [len(said) for said in packed] == [1, 0]  # packed once
