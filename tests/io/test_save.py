from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from virtualcell.io._save import FORMAT, pack, read_folder, unpack, write_folder

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "double": torch.tensor([1 / 3], dtype=torch.float64),
    "codes": torch.tensor([[1], [-7]], dtype=torch.int64),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}
META = {"class": "ST", "genes": ["STAT1", "IFNβ"], "sizes": {"n": 3, "lr": 1e-3, "none": None}, "trained": True}


def check(meta: dict, tensors: dict[str, torch.Tensor]) -> None:
    assert meta == {"format": FORMAT, **META}
    assert set(tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert tensors[name].dtype == expected.dtype
        assert tensors[name].shape == expected.shape
        assert torch.equal(tensors[name], expected)


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "model", META, TENSORS)
    check(*read_folder(str(tmp_path / "deep" / "model")))
    # nothing else is left behind
    assert {p.name for p in (tmp_path / "deep" / "model").iterdir()} == {"model.json", "model.safetensors"}


def test_round_trip_through_uns_of_a_file(tmp_path: Path) -> None:
    adata = ad.AnnData(np.eye(2, dtype=np.float32), uns={"virtualcell": {"st": pack(META, TENSORS)}})
    adata.write_h5ad(tmp_path / "a.h5ad")
    check(*unpack(ad.read_h5ad(tmp_path / "a.h5ad").uns["virtualcell"]["st"]))
    adata.write_zarr(tmp_path / "a.zarr")
    check(*unpack(ad.read_zarr(tmp_path / "a.zarr").uns["virtualcell"]["st"]))


def test_weights_that_were_read_may_be_trained_on(tmp_path: Path) -> None:
    write_folder(tmp_path, META, TENSORS)
    for _ in range(2):
        tensors = read_folder(tmp_path)[1]
        tensors["weight"].add_(1)
        torch.testing.assert_close(tensors["weight"], TENSORS["weight"] + 1)


def test_gradients_and_numpy_values_are_written_as_plain_ones() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    meta, tensors = unpack(pack({"n": np.int64(3), "x": np.float32(0.5), "names": np.array(["a"])}, {"p": parameter}))
    assert meta == {"format": FORMAT, "n": 3, "x": 0.5, "names": ["a"]}
    assert not tensors["p"].requires_grad
    with pytest.raises(TypeError, match=r"set does not belong into a model.json"):
        pack({"bad": {1}}, {})


def test_files_hold_json_and_numbers_only(tmp_path: Path) -> None:
    write_folder(tmp_path, META, TENSORS)
    assert json.loads((tmp_path / "model.json").read_text())["class"] == "ST"
    content = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    spans = sorted(v["data_offsets"] for k, v in header.items() if k != "__metadata__")
    # the header accounts for every byte: there is no room for a pickle
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert spans[-1][1] == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_an_existing_model_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write_folder(tmp_path, META, TENSORS)
    with pytest.raises(FileExistsError, match=r"holds a model already. Pass overwrite=True"):
        write_folder(tmp_path, {"class": "SE"}, {})
    check(*read_folder(tmp_path))
    write_folder(tmp_path, {"class": "SE"}, {"x": torch.zeros(1)}, overwrite=True)
    meta, tensors = read_folder(tmp_path)
    assert meta["class"] == "SE"
    assert list(tensors) == ["x"]
    # a folder with other files in it is no model
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    write_folder(tmp_path / "other", META, TENSORS)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_newer_format_says_to_update(tmp_path: Path) -> None:
    write_folder(tmp_path, META, TENSORS)
    meta = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**meta, "format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}, newer than {FORMAT}: update virtualcell"):
        read_folder(tmp_path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model.json: it is not a folder written by `model.save`"):
        read_folder(tmp_path)


class Interrupted(BaseException):
    """Ctrl-C at a bad moment."""


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_write_leaves_no_half_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int, overwrite: bool
) -> None:
    if overwrite:
        write_folder(tmp_path, META, TENSORS)
    real, calls = getattr(Path, method), []

    def interrupted(self: Path, *args: object) -> object:
        calls.append(self)
        if len(calls) > at:
            raise Interrupted
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, interrupted)
        with pytest.raises(Interrupted):
            write_folder(tmp_path, {"class": "SE"}, {"x": torch.zeros(1)}, overwrite=overwrite)
    if (
        tmp_path / "model.json"
    ).exists():  # then it is the old model, whole: never new weights under an old description
        assert overwrite
        check(*read_folder(tmp_path))
    # and the next attempt works
    write_folder(tmp_path, META, TENSORS, overwrite=True)
    check(*read_folder(tmp_path))
