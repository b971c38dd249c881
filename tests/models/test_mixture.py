from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from virtualcell.models._mixture import TRANSFERRED, WEIGHT, WEIGHT_UNSEEN, Mixture, put_on_cells, standard_error
from virtualcell.modules import Ensemble, STConfig, STNetwork

B, S, G, P = 3, 7, 10, 4
SIZES = {"n_input": G, "n_output": G, "n_perturbation": P, "n_hidden": 16, "n_heads": 2, "head_dim": 8, "n_layers": 1}
Effect = tuple[Tensor, Tensor]


@pytest.fixture
def sets() -> tuple[Tensor, Tensor, Tensor]:
    """Two sets of cells with silent genes, and perturbations."""
    cells = torch.rand(2, B, S, G)
    cells[torch.rand(cells.shape) < 0.3] = 0
    return cells[0], cells[1], torch.eye(P)[:B]


@pytest.fixture
def effect() -> Effect:
    return torch.full((G,), 0.5), torch.rand(G)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transferred", [True, False])
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("heads", [("shift", "level"), ("level",)])
def test_weights_sum_to_one(transferred: bool, measured: bool, heads: tuple) -> None:
    mixture = Mixture.equal(heads, transferred=transferred)
    weights = mixture.weights(measured=measured)
    assert list(weights) == [*heads, *([TRANSFERRED] if transferred else [])]
    assert sum(weights.values()) == pytest.approx(1)
    if transferred:
        assert weights[TRANSFERRED] == (WEIGHT if measured else WEIGHT_UNSEEN)
    # what a single prediction has decides over what the model has
    assert sum(mixture.weights(measured=measured, transferred=True).values()) == pytest.approx(1)
    assert TRANSFERRED not in mixture.weights(measured=measured, transferred=False)


def test_heads_share_what_the_transferred_effect_leaves() -> None:
    mixture = Mixture(("shift", "level"), (0.2, 0.8), transferred=True)
    assert mixture.weights() == pytest.approx({"shift": 0.2 * 2 / 3, "level": 0.8 * 2 / 3, TRANSFERRED: 1 / 3})
    assert mixture.weights(measured=False) == pytest.approx({"shift": 0.2 / 3, "level": 0.8 / 3, TRANSFERRED: 2 / 3})


def test_the_mixture_is_told_in_one_sentence() -> None:
    mixture = Mixture(("shift", "level"), (0.58, 0.42), transferred=True)
    assert mixture.describe() == (
        "ST averages 3 predictions; weights: shift 0.39, level 0.28, same perturbation in other contexts 0.33."
    )
    assert Mixture.equal(("level",)).describe() == "ST predicts by one head, level."


def a_network(seed: int, *errors: float) -> STNetwork:
    """A network whose heads are wrong by so much on `batch` in every gene."""
    torch.manual_seed(seed)
    network = STNetwork(STConfig(**SIZES, head="both", relu=False)).eval()
    for layer, error in zip((network.project_out[-1], network.project_level[-1]), errors, strict=True):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, error)
    return network


def test_heads_are_weighed_by_the_inverse_of_their_squared_error(sets: tuple) -> None:
    control, _, vectors = sets
    batch = {"control": control, "perturbed": control, "perturbation": vectors}  # the shift head is off by its bias
    network = a_network(0, 0.5, 0.0)
    level = control.mean(dim=1).square().mean()  # and the level head, which says 0, by the level
    mixture = Mixture.equal(network.config.heads, transferred=True).weighed([network], [batch, batch])
    expected = torch.tensor([1 / 0.25, 1 / level])
    np.testing.assert_allclose(mixture.head_weights, expected / expected.sum(), rtol=1e-5)
    assert mixture.transferred
    # over all networks of an ensemble together
    other = a_network(1, 1.0, 0.0)
    both = Mixture.equal(network.config.heads).weighed([network, other], [batch])
    expected = torch.tensor([1 / (0.25 + 1), 1 / (2 * level)])
    np.testing.assert_allclose(both.head_weights, expected / expected.sum(), rtol=1e-5)
    # one head alone has no weight to be found
    one = Mixture.equal(("level",))
    assert one.weighed([network], []) is one


def test_a_head_without_error_has_all_the_weight(sets: tuple) -> None:
    control, _, vectors = sets
    batch = {"control": control, "perturbed": control, "perturbation": vectors}
    mixture = Mixture.equal(("shift", "level")).weighed([a_network(0, 0.0, 0.0)], [batch])
    np.testing.assert_allclose(mixture.head_weights, [1, 0], atol=1e-6)
    nothing = {"control": 0 * control, "perturbed": 0 * control, "perturbation": vectors}
    mixture = Mixture.equal(("shift", "level")).weighed([a_network(0, 0.0, 0.0)], [nothing])
    np.testing.assert_allclose(mixture.head_weights, [0.5, 0.5])


# -- means put onto cells ---------------------------------------------------------------------------------------------


def test_cells_get_exactly_the_wanted_means_and_keep_their_zeros(sets: tuple) -> None:
    cells, other, _ = sets
    mean = cells.mean(dim=1, keepdim=True)
    wanted = mean * torch.linspace(0, 2, G)  # down to nothing, and up to twice
    put = put_on_cells(cells, wanted)
    torch.testing.assert_close(put.mean(dim=1, keepdim=True), wanted)
    assert (put >= 0).all()
    assert (put[cells == 0] == 0).all()
    torch.testing.assert_close(put_on_cells(cells, mean), cells)
    # beyond that the rest is added, also to cells that are silent
    wanted = mean * 5 + 0.1
    put = put_on_cells(cells, wanted)
    torch.testing.assert_close(put.mean(dim=1, keepdim=True), wanted)
    assert (put - 2 * cells).std(dim=1).max() < 1e-5
    silent = torch.zeros_like(cells)
    wanted = other.mean(dim=1, keepdim=True)
    torch.testing.assert_close(put_on_cells(silent, wanted), wanted.expand_as(silent))
    assert not put_on_cells(cells, 0 * mean).any()


def test_embeddings_are_shifted(sets: tuple) -> None:
    cells, other, _ = sets
    wanted = other.mean(dim=1, keepdim=True) - 3
    put = put_on_cells(cells, wanted, nonnegative=False)
    torch.testing.assert_close(put.mean(dim=1, keepdim=True), wanted)
    torch.testing.assert_close(put - wanted, cells - cells.mean(dim=1, keepdim=True))


def test_order_of_cells_and_genes_changes_nothing_but_the_order(sets: tuple) -> None:
    cells, other, _ = sets
    genes, order = torch.randperm(G), torch.randperm(S)
    put = put_on_cells(cells, other.mean(dim=1, keepdim=True))
    moved = put_on_cells(cells[:, order][..., genes], other.mean(dim=1, keepdim=True)[..., genes])
    torch.testing.assert_close(moved, put[:, order][..., genes])


# -- cells ------------------------------------------------------------------------------------------------------------


def test_cells_have_the_weighted_mean_of_all_parts(sets: tuple, effect: Effect) -> None:
    control, level, _ = sets
    scale, shift = effect
    mixture = Mixture(("shift", "level"), (0.2, 0.8), transferred=True)
    outputs = [(control, level)]
    known = (control * scale + shift).mean(dim=1)
    heads = 0.2 * control.mean(dim=1) + 0.8 * level.mean(dim=1)
    torch.testing.assert_close(mixture.cells(outputs, control).mean(dim=1), heads)
    for measured, weight in ((True, WEIGHT), (False, WEIGHT_UNSEEN)):
        cells = mixture.cells(outputs, control, effect, measured=measured)
        torch.testing.assert_close(cells.mean(dim=1), (1 - weight) * heads + weight * known)
        assert (cells >= 0).all()


def test_one_part_is_returned_as_it_is(sets: tuple) -> None:
    _, level, _ = sets
    assert torch.equal(Mixture.equal(("level",)).cells([(level,)], sets[0]), level)


def test_a_transferred_effect_makes_no_negative_expression_but_may_move_embeddings(sets: tuple) -> None:
    control, _, _ = sets
    down = torch.ones(G), torch.full((G,), -5.0)
    parts, weights = Mixture.equal(("shift",), transferred=True).means([(control,)], control, down)
    assert not parts[-1].any()
    free = Mixture.equal(("shift",), transferred=True, nonnegative=False)
    torch.testing.assert_close(free.means([(control,)], control, down)[0][-1], control.mean(dim=1) - 5)
    assert weights.sum() == pytest.approx(1)


@torch.no_grad()
def test_an_ensemble_averages_its_networks(sets: tuple, effect: Effect) -> None:
    control, _, vectors = sets
    ensemble = Ensemble(STConfig(**SIZES, head="both"), 2).eval()
    mixture = Mixture(("shift", "level"), (0.3, 0.7), transferred=True)
    outputs = [network(control, vectors).heads for network in ensemble.networks]
    each = [mixture.cells([heads], control, effect).mean(dim=1) for heads in outputs]
    torch.testing.assert_close(mixture.cells(outputs, control, effect).mean(dim=1), torch.stack(each).mean(dim=0))
    assert not torch.allclose(*each)


@torch.no_grad()
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_parts_and_weights_add_up_to_the_cells(sets: tuple, effect: Effect, measured: bool, given: bool) -> None:
    control, _, vectors = sets
    ensemble = Ensemble(STConfig(**SIZES, head="both"), 2).eval()
    outputs = [network(control, vectors).heads for network in ensemble.networks]
    mixture = Mixture(("shift", "level"), (0.3, 0.7), transferred=True)
    transferred = effect if given else None
    parts, weights = mixture.means(outputs, control, transferred, measured=measured)
    assert parts.shape == (4 + given, B, G)
    assert weights.sum() == pytest.approx(1)
    total = torch.einsum("p,pbg->bg", torch.from_numpy(weights).float(), parts)
    torch.testing.assert_close(mixture.cells(outputs, control, transferred, measured=measured).mean(dim=1), total)


# -- standard error ---------------------------------------------------------------------------------------------------


def test_the_standard_error_is_the_usual_one_for_equal_weights() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(4, 30))
    still = np.broadcast_to(parts, (5, 4, 30))  # draws change nothing: only parts disagree
    np.testing.assert_allclose(standard_error(still, np.full(4, 1 / 4)), parts.std(axis=0, ddof=1) / np.sqrt(4))
    draws = rng.normal(size=(6, 1, 30))
    np.testing.assert_allclose(standard_error(draws, np.ones(1)), draws[:, 0].std(axis=0, ddof=1))
    together = standard_error(draws + parts, np.full(4, 1 / 4))
    expected = np.sqrt(draws[:, 0].var(axis=0, ddof=1) + parts.var(axis=0, ddof=1) / 4)
    np.testing.assert_allclose(together, expected)


def test_the_standard_error_is_that_of_the_weighted_average() -> None:
    parts, weights = np.array([0.0, 1.0, 4.0]), np.array([0.2, 0.3, 0.5])
    centre = 0.3 * 1 + 0.5 * 4
    total = 0.2**2 + 0.3**2 + 0.5**2
    between = (0.2 * centre**2 + 0.3 * (1 - centre) ** 2 + 0.5 * (4 - centre) ** 2) / (1 - total)
    found = standard_error(np.broadcast_to(parts[:, None], (3, 3, 1)), weights)
    np.testing.assert_allclose(found, np.sqrt(between * total))


def test_the_standard_error_is_unbiased_whatever_the_weights() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([0.6, 0.3, 0.1])
    parts = rng.normal(size=(3, 20_000))
    squared = standard_error(np.broadcast_to(parts, (2, 3, 20_000)), weights) ** 2
    assert squared.mean() == pytest.approx((weights @ parts).var(), rel=0.03)


def test_a_part_that_has_all_the_weight_leaves_the_scatter_of_draws() -> None:
    means = np.random.default_rng(0).normal(size=(5, 2, 30))
    found = standard_error(means, np.array([1.0, 0.0]))
    np.testing.assert_allclose(found, means[:, 0].std(axis=0, ddof=1))
