from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from virtualcell.modules import (
    Ensemble,
    STConfig,
    STNetwork,
    energy_distance,
    mean_distance,
    set_loss,
    sinkhorn_divergence,
    st_loss,
)
from virtualcell.modules._losses import contrast


def naive_energy(x: Tensor, y: Tensor) -> float:
    """Double loop in float64, self-pairs included as zeros."""
    x, y = x.double().numpy(), y.double().numpy()

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(math.sqrt(((p - q) ** 2).sum()) for p in a for q in b) / (len(a) * len(b))

    return mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2


def plain_sinkhorn(x: Tensor, y: Tensor, blur: float = 0.05, n_steps: int = 2000) -> float:
    """Debiased entropic cost: alternating log-domain Sinkhorn in float64 at the last temperature, until it stands."""

    def cost(a: Tensor, b: Tensor) -> float:
        c = (a.double()[:, None] - b.double()[None]).square().sum(-1) / 2
        f, g, t = torch.zeros(len(a)).double(), torch.zeros(len(b)).double(), blur**2
        for _ in range(n_steps):
            before = f
            f = -t * (torch.logsumexp((g[None] - c) / t, dim=1) - math.log(len(b)))
            g = -t * (torch.logsumexp((f[:, None] - c) / t, dim=0) - math.log(len(a)))
            if (f - before).abs().max() < 1e-12:
                break
        return float(f.mean() + g.mean())

    return cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    """Three pairs of sets of unequal size, each pair further apart."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, 5), torch.randn(3, 9, 5)
    return x, y + torch.tensor([0.0, 1.0, 4.0])[:, None, None]


LOSSES = [energy_distance, mean_distance, sinkhorn_divergence]


def test_energy_distance_is_the_double_loop(sets: tuple) -> None:
    x, y = sets
    expected = [naive_energy(a, b) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(energy_distance(x, y), torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5)


def test_mean_distance_is_the_distance_of_means(sets: tuple) -> None:
    x, y = sets
    expected = [math.dist(a.double().mean(0).tolist(), b.double().mean(0).tolist()) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(mean_distance(x, y), torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5)


def test_energy_of_two_single_cells_is_their_distance() -> None:
    x, y = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    assert energy_distance(x, y).item() == pytest.approx(5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_order_of_cells_and_genes_and_sets_does_not_matter(loss, sets: tuple) -> None:
    x, y = sets
    expected, genes = loss(x, y), torch.randperm(5)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(loss(x[:, torch.randperm(7)], y[:, torch.randperm(9)]), expected, **close)
    torch.testing.assert_close(loss(x[..., genes], y[..., genes]), expected, **close)
    torch.testing.assert_close(loss(x.flip(0), y.flip(0)), expected.flip(0), **close)
    torch.testing.assert_close(loss(y, x), expected, **close)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_shift_of_both_sets_changes_nothing(loss, sets: tuple) -> None:
    x, y = sets
    shift = torch.linspace(-3, 8, 5)
    torch.testing.assert_close(loss(x + shift, y + shift), loss(x, y), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n_genes", [5, 2000])
def test_identical_sets_have_no_distance(loss, n_genes: int) -> None:
    x = torch.rand(2, 64, n_genes) * 3
    # float32 distances between a cell and its copy are up to 0.04 at 2,000 genes where they should be 0
    torch.testing.assert_close(loss(x, x.clone()), torch.zeros(2), atol=1e-3, rtol=0)
    assert loss(x, x + 0.5).min() > 0.05


def test_energy_keeps_its_digits_at_two_thousand_genes_far_from_the_origin() -> None:
    # expression sits on an offset that is large beside the differences of interest
    torch.manual_seed(0)
    centre = torch.rand(2000) * 8
    x = centre + 0.01 * torch.randn(1, 32, 2000)
    y = centre + 0.01 * torch.randn(1, 32, 2000) + 0.003 * torch.randn(2000)
    expected = naive_energy(x[0], y[0])
    assert expected > 0.005
    assert energy_distance(x, y).item() == pytest.approx(expected, abs=1e-6)
    # what float32 distances give where they are, with exact zeros between a cell and itself
    between, within = torch.cdist(x, y).mean(), [torch.cdist(z, z)[0].fill_diagonal_(0).mean() for z in (x, y)]
    assert abs((between - sum(within) / 2).item() - expected) > 3e-5


def test_energy_keeps_its_digits_where_predictions_hardly_differ() -> None:
    torch.manual_seed(0)
    y = torch.randn(4, 6, 30)
    x = 1 + 0.001 * torch.randn(4, 6, 30)
    expected = torch.tensor([naive_energy(a, b) for a, b in zip(x, y, strict=True)], dtype=torch.float32)
    torch.testing.assert_close(energy_distance(x, y), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("n_cells", [8, 64])
def test_energy_takes_copies_of_a_cell_for_the_same_cell(n_cells: int) -> None:
    torch.manual_seed(n_cells)
    x, y = torch.rand(2, n_cells, 500), torch.rand(2, n_cells, 500) + 0.1
    x[:, : n_cells // 2] = x[:, :1]
    expected = torch.tensor([naive_energy(a, b) for a, b in zip(x, y, strict=True)], dtype=torch.float32)
    torch.testing.assert_close(energy_distance(x, y), expected, atol=5e-6, rtol=0)


def test_energy_is_computed_in_float32_under_half_precision(sets: tuple) -> None:
    x, y = sets
    found = energy_distance(x.bfloat16(), y.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, energy_distance(x.bfloat16().float(), y.bfloat16().float()), atol=0, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_distance_falls_all_the_way_to_the_target(loss) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(1, 16, 10), torch.randn(1, 16, 10) + 2
    values = [loss(x + t * (y - x), y).item() for t in torch.linspace(0, 1, 8)]
    assert all(a > b for a, b in pairwise(values))
    assert values[0] > 0.5
    assert values[-1] == pytest.approx(0, abs=2e-4)


def test_sinkhorn_between_single_cells_is_half_the_squared_distance() -> None:
    x, y = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[4.0, 6.0]], [[0.3, 0.4]]])
    torch.testing.assert_close(sinkhorn_divergence(x, y), torch.tensor([12.5, 0.125]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("blur", "tolerance"), [(2.0, 2e-3), (1.0, 2e-2)])
def test_sinkhorn_is_the_entropic_cost_where_it_converges(sets: tuple, blur: float, tolerance: float) -> None:
    x, y = sets
    expected = [plain_sinkhorn(a, b, blur) for a, b in zip(x, y, strict=True)]
    found = sinkhorn_divergence(x, y, blur)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-3, rtol=tolerance)


def test_sinkhorn_at_its_default_blur_is_near_the_assignment_cost() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 12, 3), torch.randn(8, 12, 3) + 1
    cost = (x[:, :, None] - y[:, None]).square().sum(-1).numpy() / 2
    expected = torch.tensor([c[linear_sum_assignment(c)].mean() for c in cost])
    # the temperature falls by 4 a step and leaves the potentials a few percent short
    ratio = sinkhorn_divergence(x, y) / expected
    assert ratio.min() > 0.9
    assert ratio.max() < 1.02


def finite_difference(loss, x: Tensor, y: Tensor, step: float) -> Tensor:
    gradient = torch.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.clone(), x.clone()
        up[i] += step
        down[i] -= step
        gradient[i] = (loss(up, y).sum() - loss(down, y).sum()) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    "loss",
    [energy_distance, mean_distance, lambda x, y: sinkhorn_divergence(x, y, 2.0)],
    ids=["energy", "mean", "sinkhorn"],
)
def test_gradient_is_that_of_the_value(loss) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1, 4, 3), torch.randn(1, 5, 3) + 1
    variable = x.clone().requires_grad_()
    loss(variable, y).sum().backward()
    expected = finite_difference(loss, x, y, step=1e-2)
    torch.testing.assert_close(variable.grad, expected, atol=3e-3, rtol=0.03)


def test_sinkhorn_gradient_has_the_size_of_the_slope_at_its_default_blur() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1, 8, 3), torch.randn(1, 8, 3) + 1
    variable = x.clone().requires_grad_()
    sinkhorn_divergence(variable, y).sum().backward()
    slope = finite_difference(sinkhorn_divergence, x, y, step=1e-2)
    assert ((variable.grad * slope).sum() / slope.square().sum()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["energy", "sinkhorn", "energy+sinkhorn"])
def test_gradient_is_finite_where_the_prediction_is_the_target(kind: str) -> None:
    target = torch.rand(2, 30, 50)
    predicted = target.clone().requires_grad_()
    set_loss(predicted, target, kind=kind, mean_weight=1.0).sum().backward()
    assert torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize("kind", ["energy", "sinkhorn", "energy+sinkhorn"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_loss_of_a_prediction_that_is_not_finite_is_not_finite_either(kind: str, value: float) -> None:
    predicted = torch.rand(2, 6, 5)
    predicted[1, 3, 2] = value
    loss = set_loss(predicted.requires_grad_(), torch.rand(2, 6, 5), kind=kind, mean_weight=1.0).mean()
    loss.backward()  # as a training does before it looks
    assert not torch.isfinite(loss)


def test_set_loss_adds_up(sets: tuple) -> None:
    x, y = sets
    energy, sinkhorn, mean = energy_distance(x, y), sinkhorn_divergence(x, y), mean_distance(x, y)
    torch.testing.assert_close(set_loss(x, y), energy)
    torch.testing.assert_close(set_loss(x, y, kind="sinkhorn"), sinkhorn)
    torch.testing.assert_close(set_loss(x, y, kind="energy+sinkhorn"), energy + 0.01 * sinkhorn)
    torch.testing.assert_close(set_loss(x, y, kind="energy", mean_weight=0.5), energy + 0.5 * mean)


def test_unknown_loss_names_the_valid_ones(sets: tuple) -> None:
    with pytest.raises(
        ValueError, match=r"loss='mmd' is unknown; valid are 'energy', 'sinkhorn' and 'energy\+sinkhorn'"
    ):
        set_loss(*sets, kind="mmd")


# -- the contrast -----------------------------------------------------------------------------------------------------


def test_contrast_falls_where_effects_are_told_apart() -> None:
    effects = torch.randn(4, 1, 30)
    control = torch.rand(4, 5, 30)
    batch = {"control": control, "perturbed": control + effects, "perturbation": torch.eye(4)}
    right, mixed = contrast(control + effects, batch), contrast(control + effects[[1, 0, 3, 2]], batch)
    same = contrast(control + effects.mean(dim=0), batch)
    assert right < 0.05 < same < mixed
    assert same > 0.5


def test_contrast_leaves_out_the_control_and_sets_of_the_same_perturbation() -> None:
    effects = torch.randn(2, 1, 30)[[0, 0, 1, 1]]
    control = torch.rand(4, 5, 30)
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 0], [0, 0]])
    batch = {"control": control, "perturbed": control + effects, "perturbation": vectors}
    predicted = control + effects
    expected = contrast(predicted, batch)
    predicted[2:] += torch.randn(2, 1, 30)  # the control sets
    torch.testing.assert_close(contrast(predicted, batch), expected)
    alone = {"control": control[:2], "perturbed": (control + effects)[:2], "perturbation": vectors[:2]}
    assert contrast(control[:2] + torch.randn(2, 1, 30), alone) == 0


def test_contrast_of_control_sets_alone_is_zero_and_has_no_gradient() -> None:
    control = torch.rand(3, 5, 30)
    predicted = torch.rand(3, 5, 30, requires_grad=True)
    loss = contrast(predicted, {"control": control, "perturbed": control, "perturbation": torch.zeros(3, 4)})
    loss.backward()
    assert loss == 0
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


def test_contrast_of_an_effect_of_zero_is_finite() -> None:
    control = torch.rand(3, 5, 30)
    predicted = control.clone().requires_grad_()  # what an untrained network predicts
    batch = {"control": control, "perturbed": control + torch.randn(3, 1, 30), "perturbation": torch.eye(3)}
    loss = contrast(predicted, batch)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(3.0).log())  # a guess
    assert torch.isfinite(predicted.grad).all()


def test_a_constant_tells_no_sets_apart_where_effects_have_one_base() -> None:
    """What knows nothing of perturbations (a level head stuck at the mean of the controls) must not win (InfoNCE)."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(500, 200, generator=generator) + 3
    effects = 0.05 * torch.randn(8, 1, 200, generator=generator)  # small beside the sampling noise of 64 cells
    mean = pool.mean(dim=0)
    found = {"own controls": [], "base": []}
    for _ in range(60):
        control = pool[torch.randint(500, (8, 64), generator=generator)]
        perturbed = pool[torch.randint(500, (8, 64), generator=generator)] + effects
        batch = {"control": control, "perturbed": perturbed, "perturbation": torch.eye(8)}
        # as a network says it, not to the last digit
        constant = mean.expand(8, 64, -1) + 1e-3 * torch.randn(8, 1, 200, generator=generator)
        found["own controls"].append(_told_apart(constant, batch, control.mean(dim=1)))
        batch["base"] = mean.expand(8, -1)
        found["base"].append(_told_apart(constant, batch, batch["base"]))
    (wrong_accuracy, wrong_loss), (accuracy, loss) = (torch.tensor(x).mean(dim=0).tolist() for x in found.values())
    chance, guess = 1 / 8, math.log(8)
    assert wrong_accuracy > 0.9  # the control cells of a set give it away
    assert wrong_loss < 0.5 * guess
    assert abs(accuracy - chance) < 0.06
    assert abs(loss - guess) < 0.35
    right = perturbed.mean(dim=1, keepdim=True).expand(-1, 64, -1)
    assert contrast(right, batch) < 0.2 * guess  # and what is right is still told apart


def _told_apart(predicted: torch.Tensor, batch: dict, base: torch.Tensor) -> tuple[float, float]:
    """Share of sets whose own effect is the nearest one, and the loss."""
    one, other = (torch.nn.functional.normalize(x.mean(dim=1) - base, dim=-1) for x in (predicted, batch["perturbed"]))
    right = (one @ other.T).argmax(dim=1) == torch.arange(len(one))
    return float(right.float().mean()), float(contrast(predicted, batch))


def test_without_a_base_effects_are_taken_from_the_control_cells_of_the_set() -> None:
    control, perturbed, predicted = (torch.rand(4, 5, 30) for _ in range(3))
    batch = {"control": control, "perturbed": perturbed, "perturbation": torch.eye(4)}
    with_base = {**batch, "base": control.mean(dim=1)}
    torch.testing.assert_close(contrast(predicted, with_base), contrast(predicted, batch))


# -- the loss of ST ---------------------------------------------------------------------------------------------------

B, S, G, P = 3, 7, 10, 4
SIZES = {"n_input": G, "n_output": G, "n_perturbation": P, "n_hidden": 16, "n_heads": 2, "head_dim": 8, "n_layers": 1}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three sets of control and perturbed cells, with zeros as in expression."""
    torch.manual_seed(0)
    cells = torch.rand(2, B, S, G)
    cells[torch.rand(cells.shape) < 0.3] = 0
    return {"control": cells[0], "perturbed": cells[1], "perturbation": torch.eye(P)[:B]}


def test_loss_is_the_mean_over_heads_and_the_weighted_contrast(batch: dict) -> None:
    network = STNetwork(STConfig(**SIZES, head="both")).eval()
    heads = network(batch["control"], batch["perturbation"]).heads
    expected = torch.stack([set_loss(x, batch["perturbed"], mean_weight=0.5) for x in heads]).mean()
    losses = st_loss(network, batch, mean_weight=0.5, contrast_weight=0.3)
    assert next(iter(losses)) == "loss"
    torch.testing.assert_close(losses["loss_contrast"], torch.stack([contrast(x, batch) for x in heads]).mean())
    torch.testing.assert_close(losses["loss"], expected + 0.3 * losses["loss_contrast"])
    assert set(st_loss(network, batch)) == {"loss"}


def test_loss_of_decoded_genes_and_of_the_confidence(batch: dict) -> None:
    network = STNetwork(STConfig(**SIZES, head="level", relu=False, n_genes=6, confidence_token=True)).eval()
    batch["genes"] = torch.rand(B, S, 6)
    out = network(batch["control"], batch["perturbation"])
    per_set = energy_distance(out.heads[0], batch["perturbed"])
    losses = st_loss(network, batch)
    genes = energy_distance(network.decode(out.heads[0]), batch["genes"]).mean()
    confidence = (out.confidence - 10 * per_set).square().mean()
    torch.testing.assert_close(losses["loss_genes"], genes)
    torch.testing.assert_close(losses["loss_confidence"], confidence)
    torch.testing.assert_close(losses["loss"], per_set.mean() + genes + confidence)


def test_an_ensemble_learns_the_mean_of_its_networks_losses(batch: dict) -> None:
    ensemble = Ensemble(STConfig(**SIZES, head="both"), 3).eval()
    options = {"kind": "energy", "mean_weight": 1.0, "contrast_weight": 0.1}
    losses = [st_loss(network, batch, **options)["loss"] for network in ensemble.networks]
    torch.testing.assert_close(st_loss(ensemble, batch, **options)["loss"], torch.stack(losses).mean())


def test_heads_learn_each_by_itself(batch: dict) -> None:
    """The gradient of one head does not depend on what the other predicts."""
    network = STNetwork(STConfig(**SIZES, head="both", dropout=0.0))

    def gradient() -> Tensor:
        network.zero_grad()
        st_loss(network, batch, kind="energy", mean_weight=1.0)["loss"].backward()
        return network.project_out[-1].weight.grad.clone()

    before = gradient()
    network.project_level[-1].bias.data += 3
    torch.testing.assert_close(gradient(), before)
