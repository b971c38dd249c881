from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from virtualcell._state import FORMAT, State
from virtualcell.io._save import FILE, pack, read_state, save, unpack

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "double": torch.tensor([1 / 3, float("nan"), float("-inf")], dtype=torch.float64),
    "codes": torch.tensor([[1], [-7]], dtype=torch.int64),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}
META = {
    "genes": ["STAT1", "IFNβ", 'quo"te\\'], "sizes": {"n": 3, "lr": 1e-3, "third": 1 / 3, "none": None}, "trained": True
}  # fmt: skip


class Model:
    """Holds a state, as any model of ours can make one of itself."""

    def __init__(
        self, kind: str = "ST", meta: dict = META, tensors: dict[str, Tensor] = TENSORS, **parts: Model
    ) -> None:
        self.kind, self.meta, self.tensors, self.parts = kind, meta, tensors, parts

    def state(self) -> State:
        return State(self.kind, self.meta, self.tensors, {name: part.state() for name, part in self.parts.items()})


OTHER = Model("SE", {"x": 1}, {"weight": torch.ones(1)})
NESTED = Model(se=OTHER, fallback=Model("Mean", {}, {}, inner=Model("Additive", {"deep": [1, 2]}, {"m": torch.eye(2)})))


def same(found: State, model: Model) -> bool:
    assert found.kind == model.kind
    assert found.meta == model.meta
    assert list(found.tensors) == list(model.tensors)
    for name, expected in model.tensors.items():
        assert found.tensors[name].dtype == expected.dtype
        assert found.tensors[name].shape == expected.shape
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (found.tensors[name], expected)))  # NaN, too
    assert list(found.parts) == list(model.parts)
    return all(same(found.parts[name], part) for name, part in model.parts.items())


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Model(), OTHER, NESTED, Model("Empty", {}, {})], ids=lambda m: m.kind)
def test_round_trip_through_a_folder(tmp_path: Path, model: Model) -> None:
    save(model, tmp_path / "deep" / "model")
    assert same(read_state(str(tmp_path / "deep" / "model")), model)
    # one file, and nothing else is left behind
    assert [p.name for p in (tmp_path / "deep" / "model").iterdir()] == [FILE]


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_round_trip_through_uns_of_a_file(tmp_path: Path, kind: str) -> None:
    packed = pack(NESTED)
    assert packed.dtype == np.uint8
    adata = ad.AnnData(np.eye(2, dtype=np.float32), uns={"virtualcell": {"st": packed}})
    getattr(adata, f"write_{kind}")(tmp_path / f"a.{kind}")
    read = getattr(ad, f"read_{kind}")(tmp_path / f"a.{kind}")
    assert same(unpack(read.uns["virtualcell"]["st"]), NESTED)


def test_models_that_are_carried_may_be_left_out() -> None:
    state = NESTED.state()

    class Keeps:
        def state(self) -> State:
            return state

    found = unpack(pack(Keeps(), without=["se"]))
    assert list(found.parts) == ["fallback"]
    assert list(state.parts) == ["se", "fallback"]  # which is told to the file, not to the model


def test_weights_that_were_read_may_be_trained_on(tmp_path: Path) -> None:
    save(Model(), tmp_path)
    for _ in range(2):
        tensors = read_state(tmp_path).tensors
        tensors["weight"].add_(1)
        torch.testing.assert_close(tensors["weight"], TENSORS["weight"] + 1)


def test_weights_that_share_memory_are_written_each() -> None:
    base = torch.arange(6.0)
    model = Model(
        "A", {}, {"tied": base, "again": base, "view": base[2:]}, part=Model("B", {}, {"tied": base.view(2, 3)})
    )
    assert same(unpack(pack(model)), model)


def test_names_do_not_get_in_each_others_way() -> None:
    model = Model(
        "A", {}, {"weight": torch.zeros(1), "a.b": torch.ones(1)}, a=Model("B", {}, {"weight": torch.ones(2)})
    )
    assert same(unpack(pack(model)), model)
    with pytest.raises(ValueError, match=r"tensor a/weight is there twice"):
        pack(Model("A", {}, {"a/weight": torch.zeros(1)}, a=Model("B", {}, {"weight": torch.ones(2)})))


def test_gradients_and_numpy_values_are_written_as_plain_ones() -> None:
    meta = {"n": np.int64(3), "x": np.float32(0.1), "is": np.bool_(True), "names": np.array(["a"]), "t": (1, 2)}
    found = unpack(pack(Model("A", meta, {"p": torch.nn.Parameter(torch.ones(2))})))
    assert found.meta == {"n": 3, "x": float(np.float32(0.1)), "is": True, "names": ["a"], "t": [1, 2]}
    assert not found.tensors["p"].requires_grad
    with pytest.raises(TypeError, match=r"set does not belong into the description of a model"):
        pack(Model("A", {"bad": {1}}, {}))


def test_files_hold_json_and_numbers_only(tmp_path: Path) -> None:
    save(NESTED, tmp_path)
    content = (tmp_path / FILE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = json.loads(header.pop("__metadata__")["virtualcell"])
    assert (described["format"], described["class"]) == (FORMAT, "ST")
    # the header accounts for every byte: there is no room for a pickle
    spans = sorted(v["data_offsets"] for v in header.values())
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert spans[-1][1] == len(content) - 8 - int.from_bytes(content[:8], "little")


# -- what is there ----------------------------------------------------------------------------------------------------


def test_an_existing_model_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    save(Model(), tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a model already. Pass overwrite=True"):
        save(OTHER, tmp_path)
    assert same(read_state(tmp_path), Model())
    save(OTHER, tmp_path, overwrite=True)
    assert same(read_state(tmp_path), OTHER)
    # a folder with other files in it is no model
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    save(Model(), tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file. Name a folder"):
        save(Model(), tmp_path / "other" / "notes.txt")


def test_what_cannot_be_written_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(Model("A", {"bad": {1}}, {}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Interrupted(BaseException):
    """Ctrl-C at a bad moment."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_model_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, overwrite: bool
) -> None:
    if overwrite:
        save(Model(), tmp_path)

    def interrupted(*args: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), interrupted)
        with pytest.raises(Interrupted):
            save(OTHER, tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ([FILE] if overwrite else [])
    if overwrite:
        assert same(read_state(tmp_path), Model())
    # and the next attempt works
    save(OTHER, tmp_path, overwrite=overwrite)
    assert same(read_state(tmp_path), OTHER)


KILLED = """
import os, signal, sys, torch
from virtualcell._state import State
from virtualcell.io._save import save
class Model:
    def state(self):
        return State("SE", {}, {"weight": torch.ones(1000)})
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
save(Model(), sys.argv[1], overwrite=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system that kills")
def test_a_process_that_dies_leaves_the_old_model(tmp_path: Path) -> None:
    save(Model(), tmp_path)
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert died.returncode == -signal.SIGKILL
    (part,) = tmp_path.glob(".*.part")
    assert same(read_state(tmp_path), Model())
    save(OTHER, tmp_path, overwrite=True)
    assert same(read_state(tmp_path), OTHER)
    assert part.exists()  # it might be that of a process which is still at it
    os.utime(part, (0, 0))
    save(OTHER, tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    # half a first model is none
    (tmp_path / FILE).rename(part)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        read_state(tmp_path)
    save(Model(), tmp_path)
    assert same(read_state(tmp_path), Model())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=rf"holds no {FILE}: it is not a folder written by `model.save`"):
            read_state(folder)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_a_file_that_was_cut_off(tmp_path: Path, kept: int) -> None:
    save(NESTED, tmp_path)
    content = (tmp_path / FILE).read_bytes()[:kept]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{FILE} is no model of virtualcell, or it is cut off or damaged .* Save the model again"
    ):
        read_state(tmp_path)
    with pytest.raises(ValueError, match=r"uns is no model of virtualcell"):
        unpack(np.frombuffer(content, np.uint8))


def test_files_of_others(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / FILE)  # a pickle
    with pytest.raises(ValueError, match=r"is no model of virtualcell"):
        read_state(tmp_path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"holds tensors, but no model of virtualcell"):
        read_state(tmp_path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds tensors, but no model of virtualcell"):
        read_state(tmp_path)


def test_newer_format_says_to_update(tmp_path: Path) -> None:
    described = json.dumps({"format": FORMAT + 1, "class": "ST", "something": "new"})
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / FILE, {"virtualcell": described})
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}, newer than {FORMAT}: update virtualcell"):
        read_state(tmp_path)
