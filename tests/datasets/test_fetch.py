from __future__ import annotations

import hashlib
import re
import shutil

import pytest

import virtualcell as vc


def test_fetch_downloads_once_and_checks_the_file(server, tmp_path):
    url, folder, asked = server
    small = vc.datasets.synthetic(n_genes=20, n_perturbations=2, n_cells_per_group=2, n_control_cells=2)
    small.write_h5ad(folder / "small.h5ad")
    digest = "sha256:" + hashlib.sha256((folder / "small.h5ad").read_bytes()).hexdigest()
    for _ in range(2):
        found = vc.datasets.fetch(f"{url}/small.h5ad", known_hash=digest, folder=tmp_path / "cache")
        assert (found.X != small.X).nnz == 0
        assert found.obs_names.equals(small.obs_names)
    assert asked == ["/small.h5ad"]
    with pytest.raises(ValueError, match="does not match the known hash"):
        vc.datasets.fetch(f"{url}/small.h5ad", known_hash="sha256:" + "0" * 64, folder=tmp_path / "other")


def test_fetch_refuses_other_formats_before_it_asks(server, tmp_path):
    url, _, asked = server
    with pytest.raises(ValueError, match=r"must end in \.h5ad or \.h5mu; 'cells\.csv' does not"):
        vc.datasets.fetch(f"{url}/cells.csv", known_hash=None, folder=tmp_path)
    assert asked == []


def test_without_internet_the_error_says_where_to_put_the_file_and_that_works(closed_port, tmp_path):
    url, folder = f"{closed_port}/small.h5ad", tmp_path / "cache"
    small = vc.datasets.synthetic(n_genes=20, n_perturbations=2, n_cells_per_group=2, n_control_cells=2)
    small.write_h5ad(tmp_path / "by_hand.h5ad")
    digest = "sha256:" + hashlib.sha256((tmp_path / "by_hand.h5ad").read_bytes()).hexdigest()
    with pytest.raises(ConnectionError) as error:
        vc.datasets.fetch(url, known_hash=digest, folder=folder)
    assert f"{url} could not be downloaded (ConnectionError)" in str(error.value)
    name, where = re.search(r"save it as '(.+)' in the folder '(.+)';", str(error.value)).groups()
    assert where == str(folder)
    shutil.copy(tmp_path / "by_hand.h5ad", f"{where}/{name}")
    found = vc.datasets.fetch(url, known_hash=digest, folder=folder)
    assert found.obs_names.equals(small.obs_names)
    with pytest.raises(ConnectionError, match="that is there now has another checksum"):
        vc.datasets.fetch(url, known_hash="sha256:" + "0" * 64, folder=folder)


def test_a_file_that_the_server_lacks_is_named_with_the_servers_answer(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"gone\.h5ad could not be downloaded \(HTTP status 404\)"):
        vc.datasets.fetch(f"{server.url}/gone.h5ad", known_hash=None, folder=tmp_path)
    assert list(tmp_path.glob("*.h5ad")) == []
