from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from virtualcell.data._cell_sets import CellGroups, SetSampler
from virtualcell.data._design import Design
from virtualcell.data._packed import DenseRows, PackedRows
from virtualcell.data._screen import Screen
from virtualcell.models import _set_batches
from virtualcell.models._features import PerturbationTable
from virtualcell.models._set_batches import (
    MOST_VALIDATION_STEPS,
    SetBatches,
    SetSource,
    auto_batch_size,
    default_steps,
    validation_interval,
    validation_steps,
)

CPU = torch.device("cpu")
S, N_SETS, N_STEPS = 6, 4, 30


@pytest.fixture(scope="module")
def screen(session_screen, design) -> Screen:
    return Screen.from_anndata(session_screen, Design(**design, batch_key="batch", scale="log1p"))


@pytest.fixture(scope="module")
def table(screen) -> PerturbationTable:
    return PerturbationTable.one_hot(screen.perturbation_names, screen.design.control)


@pytest.fixture(scope="module")
def batches(screen, table) -> SetBatches:
    """Batches whose rows say which cells they are: their numbers are all that a row holds."""
    sampler = SetSampler(screen.groups(screen.is_train), set_size=S, sets_per_step=N_SETS, n_steps=N_STEPS)
    numbers = DenseRows(torch.arange(screen.n_cells, dtype=torch.float32)[:, None])
    codes = np.asarray(screen.batch.codes, np.int64)
    return SetBatches(sampler, SetSource(numbers, table, batch=codes, genes=PackedRows.pack(screen.expression)))


def cells(batch: dict[str, Tensor], role: str) -> np.ndarray:
    return batch[role][..., 0].numpy().astype(int)


def test_shares_of_two_processes_are_the_whole_step(batches):
    for i in (0, 7, N_STEPS - 1):
        whole = batches.step(i, 0, 1, CPU)
        assert {len(tensor) for tensor in whole.values()} == {N_SETS}
        shares = [batches.step(i, rank, 2, CPU) for rank in (0, 1)]
        for name, tensor in whole.items():
            assert [len(share[name]) for share in shares] == [N_SETS // 2] * 2
            together = torch.stack([share[name] for share in shares], dim=1).flatten(0, 1)
            assert torch.equal(together, tensor), name


def test_a_step_is_a_function_of_its_number(batches):
    first = [batches.step(i, 0, 1, CPU) for i in (3, 4)]
    batches.step(9, 0, 1, CPU)
    again = [batches.step(i, 0, 1, CPU) for i in (4, 3)][::-1]
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(first[0]["perturbed"], first[1]["perturbed"])


def test_sets_are_of_one_perturbation_and_context_with_controls_of_the_batches_of_their_cells(batches, screen, table):
    for i in range(N_STEPS):
        batch = batches.step(i, 0, 1, CPU)
        perturbed, control = cells(batch, "perturbed"), cells(batch, "control")
        assert perturbed.shape == control.shape == (N_SETS, S)
        np.testing.assert_array_equal(batch["batch"], screen.batch.codes[perturbed])
        np.testing.assert_array_equal(screen.batch.codes[control], screen.batch.codes[perturbed])
        np.testing.assert_array_equal(screen.context.codes[control], screen.context.codes[perturbed])
        assert screen.is_control[control].all()
        for rows, vector in zip(perturbed, batch["perturbation"], strict=True):
            (label,) = set(screen.perturbation[rows])
            assert len(set(screen.context[rows])) == 1
            assert torch.equal(vector, table.encode([label])[0])


def test_genes_are_those_of_the_perturbed_cells(batches, session_screen):
    batch = batches.step(2, 0, 1, CPU)
    np.testing.assert_array_equal(batch["genes"], session_screen.X[cells(batch, "perturbed")])


def test_what_a_model_has_not_is_not_there(screen, table):
    sampler = SetSampler(screen.groups(screen.is_train), set_size=S, sets_per_step=N_SETS, n_steps=3)
    batch = SetBatches(sampler, SetSource(PackedRows.pack(screen.expression), table)).step(0, 0, 1, CPU)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "control": (N_SETS, S, 80),
        "perturbed": (N_SETS, S, 80),
        "perturbation": (N_SETS, 6),
    }


@pytest.fixture(scope="module")
def with_base(screen, table) -> SetBatches:
    sampler = SetSampler(screen.groups(screen.is_train), set_size=S, sets_per_step=N_SETS, n_steps=N_STEPS)
    return SetBatches(sampler, SetSource(PackedRows.pack(screen.expression), table), with_base=True)


def test_the_base_is_the_mean_of_the_control_cells_that_those_of_the_set_were_drawn_from(
    with_base, batches, screen, session_screen
):
    """Of their own context and batch, each batch counting as it does in the set; all of them, and not a sample."""
    of_pool = {}
    for c in screen.context_names:
        for b in screen.batch_names:
            is_pool = screen.is_control & np.asarray(screen.context == c) & np.asarray(screen.batch == b)
            of_pool[c, b] = session_screen.X[is_pool].mean(axis=0)
    for i in (0, 5, N_STEPS - 1):
        control = cells(batches.step(i, 0, 1, CPU), "control")
        batch = with_base.step(i, 0, 1, CPU)
        for rows, base in zip(control, batch["base"].numpy(), strict=True):
            labels = zip(screen.context[rows], screen.batch[rows], strict=True)
            expected = np.mean([of_pool[pair] for pair in labels], axis=0)
            np.testing.assert_allclose(base, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(batch["base"], batch["control"].mean(dim=1), atol=1e-3)


def test_a_base_is_shared_among_processes_and_the_same_for_the_same_sets(with_base, batches):
    whole, shares = with_base.step(4, 0, 1, CPU), [with_base.step(4, rank, 2, CPU) for rank in (0, 1)]
    together = torch.stack([share["base"] for share in shares], dim=1).flatten(0, 1)
    torch.testing.assert_close(together, whole["base"])
    assert "base" not in batches.step(4, 0, 1, CPU)


def test_a_step_says_its_contexts(batches, screen):
    for i in range(5):
        rows = cells(batches.step(i, 0, 1, CPU), "perturbed").ravel()
        assert batches.describe(i) == f"contexts {', '.join(sorted(set(screen.context[rows])))}"


def test_training_has_no_end_and_validation_has_its_steps(screen, table, batches):
    assert batches.n_steps is None
    sampler = SetSampler(screen.groups(screen.is_train), set_size=S, sets_per_step=N_SETS, n_steps=3)
    assert SetBatches(sampler, batches.source, is_validation=True).n_steps == 3


def test_rows_are_moved_to_a_device_once_for_training_and_validation(screen, table):
    rows = PackedRows.pack(screen.expression)
    source = SetSource(rows, table, genes=rows)
    source.move(CPU)
    assert source.rows is rows
    meta = torch.device("meta")
    source.move(meta)
    moved = source.rows
    source.move(meta)
    assert source.rows is moved
    assert moved.values.device == meta


def test_rows_that_do_not_fit_on_a_device_stay_and_the_log_says_so(screen, table, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "virtualcell")
    sampler = SetSampler(screen.groups(screen.is_train), set_size=S, sets_per_step=N_SETS, n_steps=N_STEPS)
    stores = {"memory": PackedRows.pack(screen.expression), "disk": PackedRows.pack(screen.expression, folder=tmp_path)}
    for place, rows in stores.items():
        fitting = SetBatches(sampler, SetSource(rows, table), with_base=True)
        assert not fitting.is_fetched(CPU)
        with monkeypatch.context() as patch:
            patch.setattr(_set_batches, "BOUNDED_ON", ("cpu",))
            source = SetSource(rows, table)
            fetched, held = (SetBatches(sampler, source, with_base=True, is_validation=v) for v in (False, True))
            assert fetched.is_fetched(CPU)
            assert held.is_fetched(CPU)
            expected, found = (batches.step(3, 0, 1, CPU) for batches in (fitting, fetched))
        assert set(expected) == set(found)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert caplog.text.count(f"They are fetched from {place}, for each step while the GPU works") == 1


def test_st_learns_the_same_from_rows_that_are_fetched(build, session_screen, monkeypatch):
    models = []
    for bounded in ((), ("cpu",)):
        monkeypatch.setattr(_set_batches, "BOUNDED_ON", bounded)
        st = build(session_screen.copy(), n_hidden=16, n_feedforward=16, set_size=8, n_networks=1)
        st.train(max_steps=12, batch_size=4, validate_every=4, accelerator="cpu", progress_bar=False)
        models.append(st)
    one, other = (st.module.state_dict() for st in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(table.equals(models[1].history[name]) for name, table in models[0].history.items())
    assert models[0].mixture.head_weights == models[1].mixture.head_weights


# -- how long and how large -------------------------------------------------------------------------------------------


def groups(*sizes: int) -> CellGroups:
    """Groups of so many cells, with as many controls."""
    out = CellGroups.empty()
    for g, size in enumerate(sizes):
        out.pools.append(np.arange(size))
        out.add(f"p{g}", "(all)", np.arange(size), np.full(size, g))
    return out


@pytest.mark.parametrize(
    ("n_groups", "expected"),
    [(10, 8), (200, 8), (400, 16), (1000, 48), (1279, 56), (1280, 64), (100_000, 64)],
)
def test_batches_grow_with_the_data_on_a_gpu_alone(n_groups: int, expected: int) -> None:
    data = groups(*[64] * n_groups)  # one set each
    assert auto_batch_size(data, 64, on_gpu=True) == expected
    assert auto_batch_size(data, 64, on_gpu=False) == 8
    assert auto_batch_size(data, 64, on_gpu=True, n_devices=2) == 2 * expected
    assert auto_batch_size(data, 64, on_gpu=False, n_devices=3) == 24


@pytest.mark.parametrize(
    ("n_groups", "expected"),
    [
        (10, 400),  # at least
        (800, 2000),  # 20 passes over 800 sets in steps of 8
        (20_000, 20_000),  # 8 passes
        (200_000, 25_000),  # one pass: no group is left unseen
    ],
)
def test_training_makes_passes_over_the_cells(n_groups: int, expected: int) -> None:
    data = groups(*[64] * n_groups)
    assert default_steps(data, 64, 8) == expected
    sets = expected * 8
    assert sets >= n_groups


def test_small_groups_have_a_set_each() -> None:
    data = groups(3, 64, 65)
    assert data.n_sets(64) == 4
    assert validation_steps(data, 64, 2) == 2
    assert validation_steps(data, 64, 3) == 2
    assert validation_steps(groups(*[1] * 10_000), 64, 8) == MOST_VALIDATION_STEPS


@pytest.mark.parametrize(("n_steps", "n_each", "every"), [(400, 6, 20), (60, 1, 4), (1, 1, 4), (2000, 50, 167)])
def test_validations_take_a_tenth_of_a_training_at_most(n_steps: int, n_each: int, every: int) -> None:
    assert validation_interval(n_steps, n_each) == every
    assert n_each / 3 <= 0.1 * every


def test_batch_keys_leave_sets_and_length_as_they_are(design) -> None:
    """A screen in 48 batches: sets are drawn within contexts, whatever the batches (as in fault_batchsets.py)."""
    import anndata as ad

    rng = np.random.default_rng(0)
    n, n_controls = 40 * 120, 2000
    obs = pd.DataFrame({
        "target_gene": [*np.repeat([f"g{i:02d}" for i in range(40)], 120), *["non-targeting"] * n_controls],
        "cell_type": "K562",
        "batch": rng.integers(48, size=n + n_controls).astype(str),
    }, index=[f"c{i}" for i in range(n + n_controls)])  # fmt: skip
    data = ad.AnnData(np.ones((len(obs), 1), np.float32), obs=obs)
    lengths = []
    for key in (None, "batch"):
        screen = Screen.from_anndata(data, Design(**design, batch_key=key, scale="log1p"))
        found = screen.groups(screen.is_train)
        assert len(found) == 41
        lengths.append(default_steps(found, 64, 8))
        sets = SetSampler(found, set_size=64, sets_per_step=8, n_steps=20).step(3)
        assert all(len(set(rows.tolist())) == 64 for rows in sets.perturbed)
    assert lengths[0] == lengths[1]
