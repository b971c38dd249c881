from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from virtualcell.models._mixture import NETWORKS, TRANSFERRED, Change, Mixture, put_on_cells, standard_error
from virtualcell.modules import Ensemble, STConfig, STNetwork

B, S, G, P = 3, 7, 10, 4
SIZES = {"n_input": G, "n_output": G, "n_perturbation": P, "n_hidden": 16, "n_heads": 2, "head_dim": 8, "n_layers": 1}
QUESTIONS = ["cells", "contexts", "perturbations"]


@pytest.fixture
def sets() -> tuple[Tensor, Tensor, Tensor]:
    """Two sets of cells with silent genes, and perturbations."""
    cells = torch.rand(2, B, S, G)
    cells[torch.rand(cells.shape) < 0.3] = 0
    return cells[0], cells[1], torch.eye(P)[:B]


@pytest.fixture
def change() -> Change:
    """A change of the mean, down for some genes and up for others."""
    return Change(torch.rand(G) - 0.3, torch.full((G,), 0.5))


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transferred", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("heads", [("shift", "level"), ("level",)])
@pytest.mark.parametrize("extrapolation", [0.0, 0.9, 3.0, np.inf])
def test_weights_sum_to_one(transferred: bool, question: str, heads: tuple, extrapolation: float) -> None:
    mixture = Mixture.equal(heads, transferred=transferred)
    weights = mixture.weights(question, extrapolation=extrapolation)
    assert list(weights) == [*heads, *([TRANSFERRED] if transferred else [])]
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0
    if transferred:
        assert weights[TRANSFERRED] == pytest.approx(1 - NETWORKS[question])
    # what a single prediction has decides over what the model has
    for there in (True, False):
        weights = mixture.weights(question, transferred=there, extrapolation=extrapolation)
        assert sum(weights.values()) == pytest.approx(1)
        assert (TRANSFERRED in weights) == there


def test_heads_share_what_the_transferred_effect_leaves() -> None:
    mixture = Mixture(("shift", "level"), (0.2, 0.8), transferred=True)
    third = {"shift": 0.2 / 3, "level": 0.8 / 3, TRANSFERRED: 2 / 3}
    assert mixture.weights() == pytest.approx(third)
    assert mixture.weights("perturbations") == pytest.approx(third)
    assert mixture.weights("cells") == pytest.approx({"shift": 0, "level": 0, TRANSFERRED: 1})
    assert mixture.weights("cells", transferred=False) == pytest.approx({"shift": 0.2, "level": 0.8})


def test_every_question_has_its_own_weight() -> None:
    mixture = Mixture(("shift", "level"), (0.2, 0.8), transferred=True)
    earned = mixture.with_networks("contexts", 1.0)
    assert earned.weights("contexts") == pytest.approx({"shift": 0.2, "level": 0.8, TRANSFERRED: 0})
    for question in ("cells", "perturbations"):
        assert earned.weights(question) == mixture.weights(question)
    assert mixture.weights("contexts")[TRANSFERRED] == pytest.approx(2 / 3)  # which stays as it was
    assert NETWORKS["contexts"] == pytest.approx(1 / 3)


def test_the_level_head_counts_less_the_further_it_has_to_reach() -> None:
    mixture = Mixture(("shift", "level"), (0.5, 0.5), transferred=True)
    inside, at_edge, outside, far = (mixture.weights(extrapolation=x) for x in (0.0, 1.0, 2.0, 1e6))
    assert inside == at_edge
    assert outside["level"] / outside["shift"] == pytest.approx(1 / 4)
    assert far["level"] == pytest.approx(0, abs=1e-9)
    # the shift head takes over, and the transferred effect keeps its weight
    for weights in (inside, outside, far):
        assert weights["shift"] + weights["level"] == pytest.approx(1 / 3)
    # with no other head there is nobody to take over
    assert Mixture.equal(("level",)).weights(extrapolation=1e6) == {"level": 1.0}


def test_the_mixture_is_told_in_one_sentence() -> None:
    mixture = Mixture(("shift", "level"), (0.58, 0.42), transferred=True).with_networks("contexts", 2 / 3)
    assert mixture.describe() == (
        "ST averages 3 predictions; weights: shift 0.39, level 0.28, same perturbation in other contexts 0.33."
    )
    assert mixture.describe("cells").endswith("same perturbation in other contexts 1.00.")
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


def moved(control: Tensor, change: Change) -> Tensor:
    """Mean of control cells that falls by a factor or rises by a sum."""
    falls = change.change < 0
    factor = torch.where(falls, (change.base + change.change) / change.base, 1).clamp_min(0)
    return control.mean(dim=1) * factor + torch.where(falls, 0, change.change)


@pytest.mark.parametrize("extrapolation", [0.0, 2.0])
def test_cells_have_the_weighted_mean_of_all_parts(sets: tuple, change: Change, extrapolation: float) -> None:
    control, level, _ = sets
    mixture = Mixture(("shift", "level"), (0.2, 0.8), transferred=True)
    outputs = [(control, level)]
    share = 0.8 if extrapolation < 1 else (0.8 / 4) / (0.2 + 0.8 / 4)
    heads = (1 - share) * control.mean(dim=1) + share * level.mean(dim=1)
    alone = mixture.cells(outputs, control, extrapolation=extrapolation)
    torch.testing.assert_close(alone.mean(dim=1), heads)
    for question, weight in NETWORKS.items():
        cells = mixture.cells(outputs, control, change, question=question, extrapolation=extrapolation)
        torch.testing.assert_close(cells.mean(dim=1), weight * heads + (1 - weight) * moved(control, change))
        assert (cells >= 0).all()


def test_without_networks_control_cells_get_the_transferred_change(sets: tuple, change: Change) -> None:
    control, _, _ = sets
    mixture = Mixture(("shift", "level"), (0.2, 0.8), transferred=True)
    cells = mixture.cells([], control, change, question="cells")
    torch.testing.assert_close(cells.mean(dim=1), moved(control, change))
    torch.testing.assert_close(mixture.cells([], control, Change(torch.zeros(G), change.base)), control)
    falls = change.change < 0
    assert (cells[..., falls][control[..., falls] == 0] == 0).all()  # and what is silent stays so
    parts, weights = mixture.means([], control, change, question="cells")
    torch.testing.assert_close(parts, moved(control, change)[None])
    np.testing.assert_allclose(weights, [1.0])


def test_one_part_is_returned_as_it_is(sets: tuple) -> None:
    _, level, _ = sets
    assert torch.equal(Mixture.equal(("level",)).cells([(level,)], sets[0]), level)


def test_a_transferred_effect_makes_no_negative_expression_but_may_move_embeddings(sets: tuple) -> None:
    control, _, _ = sets
    down = Change(torch.full((G,), -5.0), torch.ones(G))
    parts, weights = Mixture.equal(("shift",), transferred=True).means([(control,)], control, down)
    assert not parts[-1].any()
    free = Mixture.equal(("shift",), transferred=True, nonnegative=False)
    torch.testing.assert_close(free.means([(control,)], control, down)[0][-1], control.mean(dim=1) - 5)
    assert weights.sum() == pytest.approx(1)


@torch.no_grad()
def test_an_ensemble_averages_its_networks(sets: tuple, change: Change) -> None:
    control, _, vectors = sets
    ensemble = Ensemble(STConfig(**SIZES, head="both"), 2).eval()
    mixture = Mixture(("shift", "level"), (0.3, 0.7), transferred=True)
    outputs = [network(control, vectors).heads for network in ensemble.networks]
    each = [mixture.cells([heads], control, change).mean(dim=1) for heads in outputs]
    torch.testing.assert_close(mixture.cells(outputs, control, change).mean(dim=1), torch.stack(each).mean(dim=0))
    assert not torch.allclose(*each)


@torch.no_grad()
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("extrapolation", [0.0, 4.0])
def test_parts_and_weights_add_up_to_the_cells(
    sets: tuple, change: Change, question: str, given: bool, extrapolation: float
) -> None:
    control, _, vectors = sets
    ensemble = Ensemble(STConfig(**SIZES, head="both"), 2).eval()
    outputs = [network(control, vectors).heads for network in ensemble.networks]
    mixture = Mixture(("shift", "level"), (0.3, 0.7), transferred=True)
    stated = {"question": question, "extrapolation": extrapolation}
    parts, weights = mixture.means(outputs, control, change if given else None, **stated)
    assert parts.shape == (4 + given, B, G)
    assert weights.sum() == pytest.approx(1)
    total = torch.einsum("p,pbg->bg", torch.from_numpy(weights).float(), parts)
    cells = mixture.cells(outputs, control, change if given else None, **stated)
    torch.testing.assert_close(cells.mean(dim=1), total)


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


def test_a_rare_gene_falls_as_far_in_every_set_as_on_average() -> None:
    """Of a gene in few cells most sets of cells have more or less than the mean, and some none."""
    torch.manual_seed(0)
    control = (torch.rand(200, 64, 1) < 0.02).float()
    base = control.mean(dim=(0, 1))
    wanted = Change(-0.8 * base, base)
    cells = Mixture.equal(("shift",), transferred=True).cells([], control, wanted, question="cells")
    torch.testing.assert_close(cells.mean(dim=(0, 1)), 0.2 * base)


def test_the_standard_error_of_a_mean_over_draws_falls_with_their_number() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([0.5, 0.5])
    # both parts agree, draws scatter by 1: the mean of 8 draws scatters by 1 / sqrt(8)
    draws = np.repeat(rng.normal(size=(8, 1, 4000)), 2, axis=1)
    found = standard_error(draws, weights, averaged=True)
    assert np.sqrt(np.square(found).mean()) == pytest.approx(1 / np.sqrt(8), rel=0.03)
    np.testing.assert_allclose(found, standard_error(draws, weights) / np.sqrt(8))
    parts = np.array([[[0.0], [2.0]]])  # of one draw, only the parts disagree
    assert standard_error(parts, weights, averaged=True) == pytest.approx(np.sqrt(2 / 2))
