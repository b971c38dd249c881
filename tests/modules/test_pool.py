from __future__ import annotations

import pytest
import torch

from virtualcell.modules import (
    PRIOR_WEIGHT,
    PRIOR_WEIGHT_UNSEEN,
    Ensemble,
    Prior,
    STConfig,
    STNetwork,
    networks,
    st_loss,
)
from virtualcell.modules._losses import contrast
from virtualcell.modules._st import pool

B, S, G, P = 3, 7, 10, 4
SIZES = {"n_input": G, "n_output": G, "n_perturbation": P, "n_hidden": 16, "n_heads": 2, "head_dim": 8, "n_layers": 1}


@pytest.fixture
def sets() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cells = torch.rand(2, B, S, G)
    cells[torch.rand(cells.shape) < 0.3] = 0
    return cells[0], cells[1], torch.eye(P)[:B]


@pytest.fixture
def prior() -> Prior:
    return Prior(torch.full((B, G), 0.5), torch.rand(B, G))


def test_pool_has_the_weighted_mean_and_the_scatter_of_the_first(sets):
    first, second, _ = sets
    weights = torch.tensor([0.3, 0.7])
    pooled = pool([first, second], weights)
    wanted = 0.3 * first.mean(dim=1) + 0.7 * second.mean(dim=1)
    torch.testing.assert_close(pooled.mean(dim=1), wanted)
    assert (pooled >= 0).all()
    torch.testing.assert_close(pool([first, first], weights), first)
    lowered = wanted <= first.mean(dim=1)
    zero = (first == 0) & lowered.unsqueeze(1)
    assert (pooled[zero] == 0).all()  # a gene that falls stays silent where it was
    moved = pool([first, second], weights, nonnegative=False)
    torch.testing.assert_close(moved - moved.mean(dim=1, keepdim=True), first - first.mean(dim=1, keepdim=True))


def test_pool_raises_silent_genes_too(sets):
    first = torch.zeros_like(sets[0])
    pooled = pool([first, sets[1]], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(pooled.mean(dim=1), sets[1].mean(dim=1) / 2)


def test_two_heads_are_pooled_by_their_weights_and_with_the_prior(sets, prior):
    control, _, vectors = sets
    network = STNetwork(STConfig(**SIZES, residual="both", prior="similar")).eval()
    network.head_weights.copy_(torch.tensor([0.2, 0.8]))
    alone, beside = network(control, vectors), network(control, vectors, prior=prior)
    shift, level = (x.mean(dim=1) for x in alone.learned)
    torch.testing.assert_close(shift, control.mean(dim=1))  # no change before training
    torch.testing.assert_close(alone.cells.mean(dim=1), 0.2 * shift + 0.8 * level)
    known = prior(control).mean(dim=1)
    assert alone.baseline is None
    torch.testing.assert_close(beside.baseline.mean(dim=1), known)
    expected = (1 - PRIOR_WEIGHT) * alone.cells.mean(dim=1) + PRIOR_WEIGHT * known
    torch.testing.assert_close(beside.cells.mean(dim=1), expected)


def test_a_prior_says_how_much_it_counts(sets, prior):
    control, _, vectors = sets
    network = STNetwork(STConfig(**SIZES, residual="both", prior="similar")).eval()
    alone = network(control, vectors).cells.mean(dim=1)
    known = prior(control).mean(dim=1)
    for share in (0.0, PRIOR_WEIGHT_UNSEEN, 1.0):
        cells = network(control, vectors, prior=prior._replace(weight=share)).cells
        torch.testing.assert_close(cells.mean(dim=1), (1 - share) * alone + share * known)


def test_perturbation_dropout_shows_an_average_perturbation_in_training_alone(sets):
    control, _, vectors = sets
    vectors = torch.cat([vectors, torch.ones(B, 1)], dim=1)  # features and the count
    sizes = {**SIZES, "n_perturbation": P + 1, "dropout": 0.0, "residual": "hidden"}
    network = STNetwork(STConfig(**sizes, perturbation_dropout=1.0))
    average = torch.tensor([[0.0] * P + [1.0]]).expand(B, -1)
    torch.testing.assert_close(network.train()(control, vectors).cells, network.eval()(control, average).cells)
    assert not torch.allclose(network(control, vectors).cells, network(control, average).cells)
    some = STNetwork(STConfig(**sizes, perturbation_dropout=0.5)).train()
    many = some(control[:1].expand(400, -1, -1), vectors[:1].expand(400, -1)).cells
    hidden = (many - some.eval()(control[:1], average[:1]).cells).abs().amax(dim=(1, 2)) < 1e-5
    assert 0.4 < hidden.float().mean() < 0.6


def test_an_additive_prior_is_where_the_learned_shift_starts(sets, prior):
    control, _, vectors = sets
    network = STNetwork(STConfig(**SIZES, residual="expression", prior="additive")).eval()
    torch.testing.assert_close(network(control, vectors, prior=prior).cells, prior(control))
    torch.testing.assert_close(network(control, vectors).cells, control)
    with pytest.raises(ValueError, match="added to the control cells, which residual='hidden' drops"):
        STConfig(**SIZES, residual="hidden", prior="additive")
    with pytest.raises(ValueError, match="prior='other' is unknown; valid are 'similar', 'additive' and None"):
        STConfig(**SIZES, prior="other")


def test_an_ensemble_averages_its_members(sets, prior):
    control, target, vectors = sets
    ensemble = Ensemble(STConfig(**SIZES, residual="both", prior="similar"), 3).eval()
    assert len(networks(ensemble)) == 3
    assert networks(ensemble.members[0]) == [ensemble.members[0]]
    out, members = ensemble(control, vectors, prior=prior), [m(control, vectors, prior=prior) for m in ensemble.members]
    expected = torch.stack([m.cells.mean(dim=1) for m in members]).mean(dim=0)
    torch.testing.assert_close(out.cells.mean(dim=1), expected)
    assert len(out.learned) == 6
    batch = {"control": control, "perturbed": target, "perturbation": vectors, "batch": torch.zeros(B)}
    options = {"kind": "energy", "mean_weight": 1.0, "contrast_weight": 0.1}
    losses = [st_loss(m, batch, **options)["loss"] for m in ensemble.members]
    torch.testing.assert_close(st_loss(ensemble, batch, **options)["loss"], torch.stack(losses).mean())


def test_heads_learn_each_by_itself(sets):
    """The gradient of one head does not depend on what the other predicts."""
    control, target, vectors = sets
    network = STNetwork(STConfig(**SIZES, residual="both", dropout=0.0))
    batch = {"control": control, "perturbed": target, "perturbation": vectors, "batch": torch.zeros(B)}

    def gradient() -> torch.Tensor:
        network.zero_grad()
        st_loss(network, batch, kind="energy", mean_weight=1.0)["loss"].backward()
        return network.project_out[-1].weight.grad.clone()

    before = gradient()
    network.project_level[-1].bias.data += 3
    torch.testing.assert_close(gradient(), before)


def test_contrast_falls_where_effects_are_told_apart():
    effects = torch.randn(4, 1, 30)
    control = torch.rand(4, 5, 30)
    batch = {"control": control, "perturbed": control + effects, "perturbation": torch.eye(4)}
    right, mixed = contrast(control + effects, batch), contrast(control + effects[[1, 0, 3, 2]], batch)
    same = contrast(control + effects.mean(dim=0), batch)
    assert right < 0.05 < same < mixed
    assert same > 0.5


def test_contrast_leaves_out_the_control_and_sets_of_the_same_perturbation():
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
