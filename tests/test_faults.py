"""Disks that are full, folders that may not be written, files that vanish or come in part, signals: all real."""

from __future__ import annotations

import http.server
import os
import signal
import sys
import threading
import time
from pathlib import Path

import anndata as ad
import pytest

import virtualcell as vc
from virtualcell.io._save import FILE, save

if sys.platform == "win32":
    pytest.skip("needs signals and processes that fork", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))  # where the processes find them too
import faulty
import killed

SIGNALS = [signal.SIGTERM, signal.SIGINT]


# -- disks and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "fault", "why"),
    [
        (faulty.saves, faulty.disk_is_full, "File too large"),
        (faulty.saves, faulty.folder_is_read_only, "Permission denied"),
        (faulty.writes, faulty.disk_is_full, None),  # of which HDF5 itself can crash the process
        (faulty.writes, faulty.folder_is_read_only, "Permission denied"),
    ],
)
def test_what_cannot_be_written_leaves_what_was_there(work, fault, why):
    # a folder that everybody can reach, as pytest's cannot be
    folder = Path(f"/tmp/virtualcell_{os.getpid()}_{time.monotonic_ns()}")
    folder.mkdir(mode=0o777)
    try:
        save(killed.model(0), folder)
        killed.cells().write_h5ad(folder / "written.h5ad")
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        status, said = faulty.Running(work, folder, fault=fault).end()
        assert status != 0
        if why is not None:
            assert f"is not written, and what was there is as it was: {why}. Free some space, see who may write" in said
        assert {name: (folder / name).read_bytes() for name in before} == before
    finally:
        folder.chmod(0o777)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        Path(f"{folder}.said").unlink()


def test_a_fit_goes_on_without_checkpoints_where_the_disk_is_full(tmp_path):
    status, said = faulty.Running(faulty.fits, tmp_path, fault=faulty.disk_is_full).end()
    assert status == 0, said
    assert "ST: no checkpoint after step 3. [Errno 27] " in said
    assert "The fitted model is in the data, and not in checkpoint_dir: [Errno 27]" in said
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_fit_goes_on_where_its_checkpoints_vanish(tmp_path):
    status, said = faulty.Running(faulty.fits_while_files_vanish, tmp_path).end()
    assert (status, said) == (0, "")
    assert vc.models.ST.load(tmp_path / "fit").is_trained


def test_two_processes_that_save_at_once_leave_one_whole_model(tmp_path):
    running = [faulty.Running(faulty.saves_often, tmp_path) for _ in range(2)]
    assert [one.end() for one in running] == [(0, ""), (0, "")]
    assert killed.which_is_saved(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


# -- signals ----------------------------------------------------------------------------------------------------------


def end_by(number: signal.Signals, work, folder: Path, *arguments: object) -> str:
    running = faulty.Running(work, folder, *arguments).is_at_it()
    os.kill(running.process.pid, number)
    status, said = running.end()
    assert status == (143 if number == signal.SIGTERM else 1)  # by which multiprocessing reports a KeyboardInterrupt
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    return said


@pytest.mark.parametrize("number", SIGNALS)
def test_a_fit_that_is_interrupted_says_once_how_to_go_on(tmp_path, number):
    said = end_by(number, faulty.fits_for_ever, tmp_path)
    assert said.count("The same call with resume=True goes on from") == 1
    assert "The fit was interrupted" not in said
    assert killed.steps_on_disk(tmp_path) > 0


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (faulty.fits_for_ever_without_a_folder, "checkpoint_dir="),
        (faulty.embeds_for_ever, "With to= the same call goes on behind the cells that are written."),
        (faulty.benchmarks_for_ever, "nothing of it is kept"),
    ],
)
@pytest.mark.parametrize("number", SIGNALS)
def test_calls_that_are_interrupted_say_once_what_to_do(tmp_path, number, work, sentence):
    said = end_by(number, work, tmp_path)
    told = [line for line in said.splitlines() if sentence in line]
    assert len(told) == 1
    if work is faulty.embeds_for_ever:
        assert killed.cells_on_disk(tmp_path) > 0
        assert not (tmp_path / "embedded.zarr").exists()


# -- downloads --------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Sends a file, all of it or only its beginning, and then may say nothing more for a long time."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        self.content, self.share, self.waits, self.n_asked = content, 1.0, 0.0, 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/cells.h5ad"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.n_asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: int(server.share * len(server.content))])
        self.wfile.flush()
        time.sleep(server.waits)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Server:
    killed.cells().write_h5ad(tmp_path / "cells.h5ad")
    with Server((tmp_path / "cells.h5ad").read_bytes()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_download_that_ends_early_leaves_nothing_and_can_be_repeated(server, tmp_path):
    server.share = 0.5
    with pytest.raises(ConnectionError, match=r"could not be downloaded .*save it as .* then repeat the call"):
        vc.datasets.fetch(server.url, known_hash=None, folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    server.share = 1.0
    assert vc.datasets.fetch(server.url, known_hash=None, folder=tmp_path / "cache").shape == killed.cells().shape


@pytest.mark.parametrize("number", SIGNALS)
def test_a_download_that_is_interrupted_leaves_nothing(server, tmp_path, number):
    server.share, server.waits = 0.5, 60.0
    said = end_by(number, faulty.downloads, tmp_path, server.url)
    assert said.count("The download was interrupted: the same call fetches the file again.") == 1
    assert not list((tmp_path / "cache").iterdir())


def test_two_processes_that_fetch_one_file_at_once_both_get_it(server, tmp_path):
    server.waits = 1.0
    running = [faulty.Running(faulty.downloads, tmp_path, server.url) for _ in range(2)]
    assert [one.end()[0] for one in running] == [0, 0]
    (path,) = (tmp_path / "cache").iterdir()
    assert ad.read_h5ad(path).shape == killed.cells().shape
