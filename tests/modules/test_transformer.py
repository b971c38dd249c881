from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from virtualcell.modules._transformer import Llama, PostNormEncoder, RMSNorm, SelfAttention, SkipBlock, mlp


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention of one sequence (T, n_heads * k), a head and a query at a time."""
    out = torch.zeros_like(v)
    for head in torch.arange(v.shape[1]).chunk(n_heads):
        for i in range(len(q)):
            scores = (k[:, head] * q[i, head]).sum(dim=1) / math.sqrt(len(head))
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -math.inf)
            out[i, head] = scores.softmax(dim=0) @ v[:, head]
    return out


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return norm.weight * centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() + norm.bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def randomise(module: nn.Module) -> nn.Module:
    """Give every weight, norms and biases too, a value that would be noticed."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.4 + 0.1)
    return module.double().eval()


@torch.no_grad()
def test_llama_is_the_written_formula() -> None:
    # the width of a head is not n_hidden / n_heads
    llama, x = randomise(Llama(2, n_hidden=6, n_heads=3, head_dim=5, n_feedforward=7)), torch.randn(2, 4, 6).double()
    for found, cells in zip(llama(x), x, strict=True):
        for layer in llama.layers:
            y = rms_norm(cells, layer.input_layernorm.weight)
            a = layer.self_attn
            q, k, v = (y @ p.weight.T for p in (a.q_proj, a.k_proj, a.v_proj))
            cells = cells + attention(q, k, v, 3) @ a.o_proj.weight.T
            y, m = rms_norm(cells, layer.post_attention_layernorm.weight), layer.mlp
            gated = silu(y @ m.gate_proj.weight.T) * (y @ m.up_proj.weight.T)
            cells = cells + gated @ m.down_proj.weight.T
        torch.testing.assert_close(found, rms_norm(cells, llama.norm.weight))


def test_llama_has_no_biases() -> None:
    assert not [name for name, _ in Llama(1, 8, 2, 4, 8).named_parameters() if "bias" in name]


@torch.no_grad()
def test_post_norm_encoder_is_the_written_formula() -> None:
    encoder, x = randomise(PostNormEncoder(2, 6, 3, 10, dropout=0.5)), torch.randn(2, 5, 6).double()
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    for found, places, real in zip(encoder(x, mask), x, mask, strict=True):
        for layer in encoder.layers:
            joint = places @ layer.qkv_proj.weight.T + layer.qkv_proj.bias
            q, k, v = joint[:, :6], joint[:, 6:12], joint[:, 12:]
            attended = attention(q, k, v, 3, real) @ layer.out_proj.weight.T + layer.out_proj.bias
            places = layer_norm(places + attended, layer.norm1)
            wide = gelu(places @ layer.linear1.weight.T + layer.linear1.bias)
            places = layer_norm(places + wide @ layer.linear2.weight.T + layer.linear2.bias, layer.norm2)
        torch.testing.assert_close(found, places)


@torch.no_grad()
def test_places_that_are_not_read_are_left_out_of_the_last_layer_only() -> None:
    encoder, x = randomise(PostNormEncoder(3, 6, 3, 10, dropout=0.5)), torch.randn(2, 5, 6).double()
    for mask in (None, torch.tensor([[True] * 5, [True, True, False, True, False]])):
        torch.testing.assert_close(encoder(x, mask, read=[0, -1]), encoder(x, mask)[:, [0, -1]])


@torch.no_grad()
def test_both_are_equivariant_under_permutation_of_tokens() -> None:
    x, order = torch.randn(3, 9, 8).double(), torch.randperm(9)
    for network in (Llama(2, 8, 2, 6, 16), PostNormEncoder(2, 8, 2, 16, 0.1)):
        randomise(network)
        torch.testing.assert_close(network(x[:, order]), network(x)[:, order])


@torch.no_grad()
def test_padding_is_attended_by_nobody() -> None:
    encoder = randomise(PostNormEncoder(2, 8, 2, 16, 0.1))
    x = torch.randn(2, 7, 8).double()
    mask = torch.arange(7).expand(2, -1) < 4
    changed = torch.where(mask.unsqueeze(-1), x, 100 * torch.randn_like(x))
    torch.testing.assert_close(encoder(x, mask)[:, :4], encoder(changed, mask)[:, :4])
    torch.testing.assert_close(encoder(x, mask)[:, :4], encoder(x[:, :4]))


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    encoder, x = PostNormEncoder(1, 8, 2, 16, dropout=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(encoder.train()(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))
    # dropout of attention weights follows the mode too
    encoder.layers[0].dropout.p = 0.0
    assert torch.equal(encoder.train()(x), encoder.eval()(x))


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_mlp_has_linear_layers_where_checkpoints_have_them(n_layers: int) -> None:
    layers = mlp(3, 5, 2, n_layers, dropout=0.1)
    linear = {i: layer for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)}
    assert list(linear) == list(range(0, 3 * n_layers, 3))
    widths = [3, *[5] * (n_layers - 1), 2]
    assert [(m.in_features, m.out_features) for m in linear.values()] == list(pairwise(widths))
    x = torch.randn(4, 3)
    y = x
    for i, layer in enumerate(linear.values()):
        y = y @ layer.weight.T + layer.bias
        y = gelu(y) if i < n_layers - 1 else y
    torch.testing.assert_close(layers.eval()(x), y)


@torch.no_grad()
def test_skip_block_is_the_written_formula() -> None:
    block, x = randomise(SkipBlock(6)), torch.randn(3, 6).double()
    wide = (x @ block.intermediate_dense.weight.T + block.intermediate_dense.bias).clamp_min(0)
    assert wide.shape == (3, 12)
    torch.testing.assert_close(
        block(x), layer_norm(x + wide @ block.dense.weight.T + block.dense.bias, block.layer_norm)
    )


@torch.no_grad()
def test_skip_block_of_pairs_is_that_of_what_stands_side_by_side() -> None:
    block = randomise(SkipBlock(6))
    left, right = torch.randn(4, 2).double(), torch.randn(3, 4).double()
    places = torch.tensor([[0, 3, 3, 1, 2], [1, 1, 0, 2, 3], [3, 2, 1, 0, 0]])
    found = block.of_pairs(left, right, places)
    assert found.shape == (3, 5, 6)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(found[i, j], block(torch.cat([left[places[i, j]], right[i]])))


def test_rms_norm_computes_in_the_numbers_of_its_input() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(24, eps=1e-6), 3 * torch.randn(5, 24)
    nn.init.normal_(norm.weight)
    plain = nn.RMSNorm(24, eps=1e-6)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x))
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_of_16_bits_is_that_of_32(autocast: bool) -> None:
    torch.manual_seed(0)
    attend, x = SelfAttention(16, n_heads=2, head_dim=8), torch.randn(2, 9, 16, requires_grad=True)
    expected = attend(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    if not autocast:
        attend = attend.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(x if autocast else x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)
    torch.testing.assert_close(torch.autograd.grad(found.float().square().sum(), x)[0], gradient, rtol=0.05, atol=0.03)
