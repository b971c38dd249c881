"""What is kept in the cache folder: bounded, and never taken from a process that uses it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import virtualcell as vc
from virtualcell.data import _cache, _copied
from virtualcell.data._cache import Hold, Scratch, home, make_room
from virtualcell.data._expression import Expression

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is removed there")

GB = 1e-9


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path) -> Iterator[None]:
    with vc.settings.override(cache_dir=tmp_path / "cache", progress=False):
        yield


def backed(folder: Path, seed: int) -> ad.AnnData:
    counts = sparse.random(200, 30, 0.3, format="csr", random_state=seed, data_rvs=lambda n: np.full(n, 3.0))
    path = folder / f"cells{seed}.h5ad"
    if not path.exists():
        ad.AnnData(counts.astype(np.float32)).write_h5ad(path)
    return ad.read_h5ad(path, backed="r")


def copy_of(folder: Path, seed: int, age: int | None = None) -> Path:
    """Make a copy that nobody uses then; an age in hours is that of its last use."""
    entry = Expression(backed(folder, seed)).at_hand()._matrix.folder
    if age is not None:
        when = entry.stat().st_mtime - 3600 * age
        os.utime(entry / "copy.json", (when, when))
    return entry


def size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir())


def test_the_least_recently_used_copies_are_removed_when_one_is_made(tmp_path, caplog):
    entries = [copy_of(tmp_path, seed, age=3 - seed) for seed in range(3)]
    packed = home() / "rows-of-a-model"  # whatever else is kept there counts, and goes, in the same way
    packed.mkdir()
    (packed / "genes").write_bytes(bytes(1000))
    (packed / "packed.json").write_text("{}")
    os.utime(packed / "packed.json", (1, 1))
    copy_of(tmp_path, 0)  # is used again
    bound = 4.2 * size(entries[0])  # of three copies and what the fourth takes at most
    caplog.set_level("INFO", "virtualcell")
    with vc.settings.override(max_cache=bound * GB):
        last = copy_of(tmp_path, 3)
    assert not packed.exists()
    assert [entry.exists() for entry in (*entries, last)] == [True, False, True, True]
    assert f"{packed}, 1e-06 GB of the cache, is removed: vc.settings.max_cache=" in caplog.text
    assert "it was used last on 1970-01-01" in caplog.text
    with vc.settings.override(max_cache=None):
        make_room()
    assert [entry.exists() for entry in (*entries, last)] == [True, False, True, True]
    # what was removed is made again
    expected = ad.read_h5ad(tmp_path / "cells1.h5ad").X.toarray()
    found = Expression(backed(tmp_path, 1), unit="counts").at_hand()
    np.testing.assert_array_equal(found.rows().toarray(), expected)
    assert found._matrix.folder == entries[1]


PROGRAM = """
import sys, time
from pathlib import Path
import anndata as ad
import virtualcell as vc
from virtualcell.data._cache import Scratch
from virtualcell.data._expression import Expression

vc.settings.cache_dir = sys.argv[1]
used = Expression(ad.read_h5ad(sys.argv[2], backed="r"), unit="counts").at_hand()
scratch = Scratch()
print(used._matrix.folder, scratch.name, flush=True)
sys.stdin.readline()
print(used.rows().sum(), flush=True)
sys.stdin.readline()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": str(Path(vc.__file__).parents[1])}
    run = [sys.executable, "-c", PROGRAM, str(vc.settings.cache_dir), str(path)]
    process = subprocess.Popen(run, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_what_another_process_uses_stays_until_it_has_ended_however_it_ends(tmp_path, caplog):
    adata, other = backed(tmp_path, 0), copy_of(tmp_path, 1)
    with another_process(tmp_path / "cells0.h5ad") as process:
        used, scratch = map(Path, process.stdout.readline().split())
        os.utime(used / "copy.json", (1, 1))
        with vc.settings.override(max_cache=1 * GB):
            make_room()
        assert not other.exists()
        assert used.exists()
        assert scratch.exists()
        assert "more than vc.settings.max_cache=1e-09: what is left of it is in use" in caplog.text
        process.stdin.write("read\n")
        process.stdin.flush()
        assert float(process.stdout.readline()) == adata.X[:].sum()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert used.exists()
        with vc.settings.override(max_cache=None):
            make_room()
        assert used.exists()
        assert not scratch.exists()  # of no use to anybody
        with vc.settings.override(max_cache=1 * GB):
            make_room()
        assert not used.exists()
    assert list(home().iterdir()) == []


def test_what_this_process_uses_stays(tmp_path):
    copy, scratch = Expression(backed(tmp_path, 0), unit="counts").at_hand(), Scratch()
    with vc.settings.override(max_cache=1 * GB):
        made = copy_of(tmp_path, 1)
        assert made.exists()  # as long as it was in use
        make_room()
    np.testing.assert_array_equal(copy.rows().toarray(), ad.read_h5ad(tmp_path / "cells0.h5ad").X.toarray())
    assert {entry.name for entry in home().iterdir()} == {copy._matrix.folder.name, Path(scratch.name).name}
    scratch.cleanup()
    folder = copy._matrix.folder
    assert folder in _copied._OPEN
    del copy
    assert folder not in _copied._OPEN  # others may be there, of tests that failed
    with vc.settings.override(max_cache=1 * GB):
        make_room()
    assert list(home().iterdir()) == []


def test_who_waits_for_an_entry_while_it_is_removed_holds_a_new_one():
    entry, held = home() / "entry", []
    entry.mkdir(parents=True)
    removing = _cache._locked(entry, exclusive=True)
    waiting = threading.Thread(target=lambda: held.append(Hold(entry)))
    waiting.start()
    waiting.join(0.2)
    assert not held
    shutil.rmtree(entry)
    removing.close()
    waiting.join(10)
    assert held
    (entry / "index.json").write_text("of some length")
    with vc.settings.override(max_cache=1 * GB):
        make_room()
        assert entry.exists()
        held.clear()
        make_room()
    assert not entry.exists()
