"""The two transformers: Llama layers without order for sets of cells (ST), post-norm layers for cell sentences (SE).

Names of parameters are those of the published checkpoints, so that these load without a table of renamings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, T, n_heads * k) -> (B, n_heads, T, k)


def _attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Every token attends to every token (that `mask` allows)."""
    if q.dtype != torch.float32 and q.device.type == "cpu":  # whose fused kernel is slower in 16 bits than in 32
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), n_heads, mask, dropout).to(q.dtype)
    out = F.scaled_dot_product_attention(
        _heads(q, n_heads), _heads(k, n_heads), _heads(v, n_heads), attn_mask=mask, dropout_p=dropout
    )
    return out.transpose(1, 2).flatten(-2)  # (B, T, n_heads * k)


class RMSNorm(nn.RMSNorm):
    """In mixed precision its weight is rounded like its input: a kernel of one piece takes no two kinds of numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Bidirectional attention without biases or positions; a head may have any width."""

    def __init__(self, n_hidden: int, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(n_hidden, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(n_hidden, n_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(n_hidden, n_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, n_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(_attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.n_heads))


class GatedMLP(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, n_hidden: int, n_feedforward: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(n_hidden, n_feedforward, bias=False)
        self.up_proj = nn.Linear(n_hidden, n_feedforward, bias=False)
        self.down_proj = nn.Linear(n_feedforward, n_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """x <- x + attention(RMSNorm x); x <- x + SwiGLU(RMSNorm x)."""

    is_unit = True  # of a network that is divided among GPUs: its weights are put together when it is called

    def __init__(self, n_hidden: int, n_heads: int, head_dim: int, n_feedforward: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(n_hidden, eps=1e-6)
        self.self_attn = SelfAttention(n_hidden, n_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(n_hidden, eps=1e-6)
        self.mlp = GatedMLP(n_hidden, n_feedforward)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Stack of Llama layers and a last RMSNorm. The tokens are a set: permuting them permutes the output."""

    def __init__(self, n_layers: int, n_hidden: int, n_heads: int, head_dim: int, n_feedforward: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(n_hidden, n_heads, head_dim, n_feedforward) for _ in range(n_layers))
        self.norm = RMSNorm(n_hidden, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, n_hidden)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def add_norm(
    x: Tensor, change: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """LN(x + change), as it is added to and, in `dtype`, as it is multiplied."""
    x = F.layer_norm(x + change, weight.shape, weight, bias, eps)
    return x, x.to(dtype)


class PostNormLayer(nn.Module):
    """x <- LN(x + W_o attention(x)); x <- LN(x + W_2 gelu(W_1 x)); joint qkv projection with bias.

    Where matrices have 16 bits, so has what they are multiplied with; x itself keeps its 32.
    """

    is_unit = True

    def __init__(self, n_hidden: int, n_heads: int, n_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(n_hidden, 3 * n_hidden)
        self.out_proj = nn.Linear(n_hidden, n_hidden)
        self.norm1 = nn.LayerNorm(n_hidden)
        self.norm2 = nn.LayerNorm(n_hidden)
        self.linear1 = nn.Linear(n_hidden, n_feedforward)
        self.linear2 = nn.Linear(n_feedforward, n_hidden)
        self.dropout = nn.Dropout(dropout)
        self.add_norm = add_norm

    def lower(self, dtype: torch.dtype, add_norm: Callable = add_norm) -> None:
        """Let products of matrices have numbers of 16 bits, and `add_norm` join them to x."""
        for linear in (self.qkv_proj, self.out_proj, self.linear1, self.linear2):
            linear.to(dtype)
        self.add_norm = add_norm

    def forward(
        self, x: Tensor, low: Tensor, mask: Tensor | None = None, read: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x, and x as it is multiplied, of the next layer."""
        attention_dropout = self.dropout.p if self.training else 0.0
        q, k, v = self.qkv_proj(low).chunk(3, dim=-1)
        if read is not None:  # every place is attended to, but only these go on
            q, x = q[:, read], x[:, read]
        change = self.dropout(self.out_proj(_attend(q, k, v, self.n_heads, mask, attention_dropout)))
        x, low = self.add_norm(x, change, self.norm1.weight, self.norm1.bias, self.norm1.eps, low.dtype)
        change = self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(low)))))
        return self.add_norm(x, change, self.norm2.weight, self.norm2.bias, self.norm2.eps, low.dtype)


class PostNormEncoder(nn.Module):
    """Stack of post-norm layers; `mask` (B, T) is true where a token is real, and padding is attended by nobody.

    With `read`, the places whose output is asked for, the last layer computes only those.
    """

    def __init__(self, n_layers: int, n_hidden: int, n_heads: int, n_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PostNormLayer(n_hidden, n_heads, n_feedforward, dropout) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None, read: Sequence[int] | None = None) -> Tensor:
        if mask is not None:
            mask = mask[:, None, None, :]  # (B, heads, queries, keys)
        low = x.to(self.layers[0].qkv_proj.weight.dtype)
        for layer in self.layers[:-1]:
            x, low = layer(x, low, mask)
        return self.layers[-1](x, low, mask, read)[0]  # (B, T, n_hidden), or (B, len(read), n_hidden)


def mlp(n_in: int, n_hidden: int, n_out: int, n_layers: int, dropout: float) -> nn.Sequential:
    """Linear-GELU-Dropout blocks, the last one plain Linear (Linear layers at 0, 3, 6, ... as in the checkpoints)."""
    blocks: list[nn.Module] = []
    for i in range(n_layers - 1):
        blocks += [nn.Linear(n_in if i == 0 else n_hidden, n_hidden), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*blocks, nn.Linear(n_in if n_layers == 1 else n_hidden, n_out))


class SkipBlock(nn.Module):
    """y = LN(x + W_2 relu(W_1 x)), twice as wide inside."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(n, 2 * n)
        self.dense = nn.Linear(2 * n, n)
        self.layer_norm = nn.LayerNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(x, self.intermediate_dense(x))

    def of_pairs(self, left: Tensor, right: Tensor, places: Tensor) -> Tensor:
        """Forward of left[places[i, j]] beside right[i], (B, T, n), with every left and every right multiplied once.

        `left` (N, n_left), `right` (B, n - n_left), `places` (B, T), rows of `left`.
        """
        w_left, w_right = self.intermediate_dense.weight.split([left.shape[-1], right.shape[-1]], dim=1)
        wide = F.embedding(places, F.linear(left, w_left))
        wide += F.linear(right, w_right, self.intermediate_dense.bias).unsqueeze(1)
        x = torch.cat([F.embedding(places, left), right.unsqueeze(1).expand(-1, places.shape[1], -1)], dim=-1)
        return self._finish(x, wide)

    def _finish(self, x: Tensor, wide: Tensor) -> Tensor:
        return self.layer_norm(x + self.dense(wide.relu_()))  # in place: neither fetches another such tensor
