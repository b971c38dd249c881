from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from virtualcell.modules import Ensemble, STConfig, STNetwork, networks
from virtualcell.modules._st import GeneDecoder, _NotNegative

B, S, G, P = 3, 7, 16, 4


def network(seed: int = 0, **options: object) -> STNetwork:
    """Build a network with a last layer that is not zero."""
    torch.manual_seed(seed)
    given = {"n_input": G, "n_output": G, "n_perturbation": P, "n_hidden": 24, "n_heads": 2, "head_dim": 8}
    net = STNetwork(STConfig(**{**given, "n_feedforward": 32, **options})).eval()
    torch.nn.init.normal_(net.project_out[-1].weight, std=0.5)
    return net


@pytest.fixture
def sets() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(B, S, G) * 3, torch.eye(P)[[0, 2, 3]], torch.tensor([1, 0, 1])


EVERYTHING = {"n_batches": 2, "batch_token": True, "confidence_token": True}


@torch.no_grad()
@pytest.mark.parametrize("head", ["shift", "level", "all", "none"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "tokens"])
def test_permuting_the_cells_of_a_set_permutes_the_prediction(head: str, options: dict, sets: tuple) -> None:
    control, perturbation, batch = sets
    net = network(head=head, n_genes=5, **options)
    order = torch.randperm(S)
    out, permuted = net(control, perturbation, batch), net(control[:, order], perturbation, batch)
    cells, genes = out.heads[0], net.decode(out.heads[0])
    torch.testing.assert_close(permuted.heads[0], cells[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.decode(permuted.heads[0]), genes[:, order], atol=1e-5, rtol=1e-5)
    assert cells.shape == (B, S, G)
    assert genes.shape == (B, S, 5)
    if options:
        assert out.confidence.shape == (B,)
        torch.testing.assert_close(permuted.confidence, out.confidence, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sets_do_not_see_each_other_but_cells_of_a_set_do(sets: tuple) -> None:
    control, perturbation, _ = sets
    net, changed = network(), control.clone()
    changed[0, 0] += 1
    difference = (net(changed, perturbation).heads[0] - net(control, perturbation).heads[0]).abs().amax(dim=-1)
    assert (difference[1:] == 0).all()
    assert (difference[0] > 1e-6).all()


@torch.no_grad()
def test_untrained_default_predicts_exactly_the_controls(sets: tuple) -> None:
    control, perturbation, _ = sets
    net = STNetwork(STConfig(n_input=G, n_output=G, n_perturbation=P)).eval()
    assert torch.equal(net(control, perturbation).heads[0], control)
    # in gene space nothing is negative
    below = control - 1.5
    assert torch.equal(net(below, perturbation).heads[0], below.clamp_min(0))
    free = STNetwork(STConfig(n_input=G, n_output=G, n_perturbation=P, relu=False)).eval()
    assert torch.equal(free(below, perturbation).heads[0], below)


def test_a_gene_silent_in_all_controls_can_be_switched_on(sets: tuple) -> None:
    # relu has gradient 0 at 0: a network that starts at "no change" would never learn that interferon induces ISG15
    control, perturbation, _ = sets
    control = control.clone()
    control[..., 0] = 0
    net = STNetwork(STConfig(n_input=G, n_output=G, n_perturbation=P))
    cells = net(control, perturbation).heads[0]
    assert (cells[..., 0] == 0).all()
    cells[..., 0].sum().backward()
    assert net.project_out[-1].bias.grad[0] == B * S
    assert torch.autograd.grad(torch.relu(z := torch.zeros(1, requires_grad=True)).sum(), z)[0] == 0


def test_gradient_of_what_is_not_negative_is_that_of_clamp_min() -> None:
    x = torch.tensor([-1.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, torch.nan], requires_grad=True)
    weights = torch.arange(1.0, 8)
    (expected,) = torch.autograd.grad((x.clamp_min(0) * weights).sum(), x)
    ours = _NotNegative.apply(x)
    assert torch.equal(ours.nan_to_num(9), x.clamp_min(0).nan_to_num(9))
    (gradient,) = torch.autograd.grad((ours * weights).sum(), x)
    assert torch.equal(gradient[:-1], expected[:-1])  # where x is NaN, so is the loss, and training stops


def test_silent_gene_is_learned() -> None:
    control, perturbation = torch.rand(1, S, G), torch.eye(P)[:1]
    control[..., 0] = 0
    target = control.clone()
    target[..., 0] = 2
    net = network_from_zero()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.mse_loss(net(control, perturbation).heads[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net(control, perturbation).heads[0][..., 0].mean() > 1.5


def network_from_zero() -> STNetwork:
    torch.manual_seed(0)
    return STNetwork(STConfig(n_input=G, n_output=G, n_perturbation=P, n_hidden=24, n_heads=2, head_dim=8)).eval()


@torch.no_grad()
@pytest.mark.parametrize("head", ["shift", "level", "all", "none"])
def test_a_head_is_the_written_formula(head: str, sets: tuple) -> None:
    control, perturbation, batch = sets
    net = network(head=head, relu=False, n_batches=2)
    code = net.basal_encoder(control)
    x = code + net.pert_encoder(perturbation)[:, None] + net.batch_encoder.weight[batch][:, None]
    b = net.transformer_backbone(x)
    expected = {
        "shift": lambda: control + net.project_out(b),
        "level": lambda: net.project_out(b + code),
        "none": lambda: net.project_out(b),
        "all": lambda: net.final_down_then_up(net.project_out(b) + control),
    }[head]()
    torch.testing.assert_close(net(control, perturbation, batch).heads[0], expected)
    if head == "all":
        assert [m.out_features for m in net.final_down_then_up if hasattr(m, "out_features")] == [G // 8, G]


@torch.no_grad()
def test_two_heads_look_at_one_backbone_and_start_at_the_controls_and_at_zero(sets: tuple) -> None:
    control, perturbation, _ = sets
    net = network(head="both")
    code = net.basal_encoder(control)
    b = net.transformer_backbone(code + net.pert_encoder(perturbation)[:, None])
    shift, level = net(control, perturbation).heads
    torch.testing.assert_close(shift, (control + net.project_out(b)).clamp_min(0))
    torch.testing.assert_close(level, net.project_level(b + code).clamp_min(0))
    assert net.config.heads == ("shift", "level")
    untrained = STNetwork(STConfig(n_input=G, n_output=G, n_perturbation=P, head="both")).eval()
    assert torch.equal(untrained(control, perturbation).heads[0], control)
    assert not untrained.project_level[-1].bias.any()


@torch.no_grad()
@pytest.mark.parametrize("head", ["both", "shift", "level", "all", "none"])
def test_every_head_is_nonnegative_where_cells_are_expression(head: str, sets: tuple) -> None:
    control, perturbation, _ = sets
    heads = network(head=head)(control - 1.5, perturbation).heads
    assert len(heads) == len(STConfig(n_input=G, n_output=G, n_perturbation=P, head=head).heads)
    assert all((cells >= 0).all() for cells in heads)
    free = network(head=head, relu=False)(control - 1.5, perturbation).heads
    for cells, clipped in zip(free, heads, strict=True):
        torch.testing.assert_close(cells.clamp_min(0), clipped)


@torch.no_grad()
def test_tokens_stand_beside_the_cells_and_not_in_their_slots(sets: tuple) -> None:
    control, perturbation, batch = sets
    net = network(**EVERYTHING)
    seen = {}
    net.transformer_backbone.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], out=out))
    out = net(control, perturbation, batch)
    assert seen["x"].shape == (B, S + 2, 24)
    torch.testing.assert_close(seen["x"][:, 0], net.batch_token[0].expand(B, -1))
    torch.testing.assert_close(seen["x"][:, -1], net.confidence_token.confidence_token[0].expand(B, -1))
    torch.testing.assert_close(out.heads[0], (control + net.project_out(seen["out"][:, 1:-1])).clamp_min(0))
    torch.testing.assert_close(out.confidence, net.confidence_token(seen["out"][:, -1]))
    assert (out.confidence >= 0).all()


@torch.no_grad()
def test_dropout_acts_in_training_only(sets: tuple) -> None:
    net = network(dropout=0.5, confidence_token=True, n_genes=5, decoder_dropout=0.5)
    first, second = net(*sets[:2]), net(*sets[:2])
    assert torch.equal(first.heads[0], second.heads[0])
    assert torch.equal(net.decode(first.heads[0]), net.decode(second.heads[0]))
    assert torch.equal(first.confidence, second.confidence)
    net.train()
    assert not torch.equal(net(*sets[:2]).heads[0], net(*sets[:2]).heads[0])


def test_perturbation_dropout_shows_an_average_perturbation_in_training_alone(sets: tuple) -> None:
    control, vectors, _ = sets
    vectors = torch.cat([vectors, torch.ones(B, 1)], dim=1)  # features and the count
    sizes = {"n_perturbation": P + 1, "dropout": 0.0, "head": "level"}
    net = network(**sizes, perturbation_dropout=1.0)
    average = torch.tensor([[0.0] * P + [1.0]]).expand(B, -1)
    torch.testing.assert_close(net.train()(control, vectors).heads[0], net.eval()(control, average).heads[0])
    assert not torch.allclose(net(control, vectors).heads[0], net(control, average).heads[0])
    some = network(**sizes, perturbation_dropout=0.5).train()
    many = some(control[:1].expand(400, -1, -1), vectors[:1].expand(400, -1)).heads[0]
    hidden = (many - some.eval()(control[:1], average[:1]).heads[0]).abs().amax(dim=(1, 2)) < 1e-5
    assert 0.4 < hidden.float().mean() < 0.6


def test_an_ensemble_holds_networks_that_start_apart() -> None:
    config = network().config
    ensemble = Ensemble(config, 3)
    assert len(networks(ensemble)) == 3
    assert networks(ensemble.networks[0]) == [ensemble.networks[0]]
    first, second, _ = (net.basal_encoder[0].weight for net in networks(ensemble))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_control_encoder_is_one_linear_layer_where_asked(sets: tuple) -> None:
    net = network(control_projection=False)
    assert {"basal_encoder.weight", "basal_encoder.bias"} <= set(net.state_dict())
    assert net(*sets[:2]).heads[0].shape == (B, S, G)


@torch.no_grad()
def test_gene_decoder_adds_every_other_block() -> None:
    decoder = GeneDecoder(6, 9, (5, 5, 8, 8), residual=True, dropout=0.3).eval()
    assert {name.split(".weight")[0] for name in decoder.state_dict() if name.endswith("weight")} == {
        *(f"blocks.{i}.{j}" for i in range(4) for j in (0, 1)),
        "final_layer.0",
    }
    x = y = torch.randn(3, 6)

    def block(i: int, x: Tensor) -> Tensor:
        linear, norm = decoder.blocks[i][0], decoder.blocks[i][1]
        x = norm(x @ linear.weight.T + linear.bias)
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    y = block(0, y)
    y = block(1, y) + y
    y = block(2, y)
    y = block(3, y) + y
    last = decoder.final_layer[0]
    torch.testing.assert_close(decoder(x), (y @ last.weight.T + last.bias).clamp_min(0))


def test_wrong_configurations_say_what_to_do() -> None:
    sizes = {"n_input": 8, "n_output": 8, "n_perturbation": 2}
    with pytest.raises(
        ValueError, match=r"head='gene' is unknown; valid are \['both', 'shift', 'level', 'all', 'none'\]"
    ):
        STConfig(**sizes, head="gene")
    for head in ("both", "shift", "all"):
        with pytest.raises(ValueError, match=rf"head='{head}' .* got 8 and 9. Use head='level'"):
            STConfig(**{**sizes, "n_output": 9}, head=head)
    assert STConfig(**{**sizes, "n_output": 9}, head="level").n_output == 9


def test_forgotten_batch_is_an_error(sets: tuple) -> None:
    with pytest.raises(ValueError, match="batch=None, but this network was built with batches"):
        network(n_batches=2)(*sets[:2])
