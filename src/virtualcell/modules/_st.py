"""ST, the State Transition network: a set of control cells and a perturbation in, the set of perturbed cells out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from virtualcell.modules._transformer import Llama, mlp

Head = Literal["both", "shift", "level", "all", "none"]
_HEADS = ("both", "shift", "level", "all", "none")
_SHIFTS = ("both", "shift")


@dataclass(frozen=True)
class STConfig:
    """Sizes and arithmetic of `STNetwork`.

    Parameters
    ----------
    n_input
        Columns of the control matrix: genes, or dimensions of the cell embedding.
    n_output
        Columns of the prediction: genes, or dimensions of the cell embedding.
    n_perturbation
        Width of a perturbation's vector (one-hot or features).
    n_hidden
        Width of the Llama backbone.
    n_layers
        Number of its layers.
    n_heads
        Number of its attention heads.
    head_dim
        Width of a head, which need not be `n_hidden / n_heads`.
    n_feedforward
        Width of its feed-forward layers.
    n_encoder_layers
        Layers of the MLPs before the backbone.
    n_decoder_layers
        Layers of the MLP behind it.
    dropout
        Dropout of these MLPs.
    perturbation_dropout
        Share of the training sets whose perturbation is shown as an average one, by the last entry of its vector alone
        (which counts perturbations): what the network then knows by heart of single features is less.
    head
        How cells are predicted from b = backbone output and c = control encoding. `"shift"`: control + W(b), where the
        last layer of W starts at zero (the untrained model predicts no change); `"level"`: V(b + c), as published;
        `"both"` (our default): the two as separate heads on one backbone; `"all"`: U(W(b) + control) with a bottleneck
        U, as published for all genes; `"none"`: W(b).
    relu
        Expression is not negative: apply ReLU to the prediction.
    control_projection
        Encode control cells by one Linear layer (False) or by an MLP (True).
    n_batches
        Number of experimental batches with an embedding; none where it is 0.
    batch_token
        Whether a learned token stands in front of the set.
    confidence_token
        Whether the set has a learned token behind it, from which the loss is predicted.
    n_genes
        Genes that a model in embedding space decodes; 0 is no decoder.
    decoder_hidden
        Widths of the hidden layers of the decoder.
    decoder_residual
        Whether the decoder has residual connections.
    decoder_dropout
        Dropout of the decoder.

    Examples
    --------
    >>> vc.models.STConfig(n_input=60, n_output=60, n_perturbation=5, head="level").head
    'level'
    """

    n_input: int
    n_output: int
    n_perturbation: int
    n_hidden: int = 128
    n_layers: int = 2
    n_heads: int = 4
    head_dim: int = 32
    n_feedforward: int = 256
    n_encoder_layers: int = 2
    n_decoder_layers: int = 2
    dropout: float = 0.1
    perturbation_dropout: float = 0.0
    head: Head = "shift"
    relu: bool = True
    control_projection: bool = True
    n_batches: int = 0
    batch_token: bool = False
    confidence_token: bool = False
    n_genes: int = 0
    decoder_hidden: tuple[int, ...] = (512,)
    decoder_residual: bool = False
    decoder_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.head not in _HEADS:
            raise ValueError(f"head={self.head!r} is unknown; valid are {list(_HEADS)}.")
        if self.head in (*_SHIFTS, "all") and self.n_input != self.n_output:
            raise ValueError(
                f"head={self.head!r} adds the control cells to the prediction and needs n_input == n_output, got "
                f"{self.n_input} and {self.n_output}. Use head='level'."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads, in the order in which the network returns their predictions."""
        return ("shift", "level") if self.head == "both" else (self.head,)


class STOutput(NamedTuple):
    """What each head predicts, (B, S, n_output), and the predicted loss, (B,), of a network with a confidence token."""

    heads: tuple[Tensor, ...]
    confidence: Tensor | None = None


class _NotNegative(torch.autograd.Function):
    """max(x, 0), whose gradient at exactly 0 is 1, not 0.

    By this a gene that is silent in the controls can be switched on by a network that starts at "no change". The
    backward pass of `clamp_min`, which is the same, takes a CPU several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, x, -torch.finfo(x.dtype).tiny)


class ConfidenceToken(nn.Module):
    """A learned token behind the set whose output predicts the set's loss (times 10)."""

    def __init__(self, n_hidden: int, dropout: float) -> None:
        super().__init__()
        self.confidence_token = nn.Parameter(torch.randn(1, 1, n_hidden) * 0.02)
        half, quarter = n_hidden // 2, n_hidden // 4
        self.confidence_projection = nn.Sequential(
            *(nn.Linear(n_hidden, half), nn.LayerNorm(half), nn.GELU(), nn.Dropout(dropout)),
            *(nn.Linear(half, quarter), nn.LayerNorm(quarter), nn.GELU(), nn.Dropout(dropout)),
            *(nn.Linear(quarter, 1), nn.ReLU()),
        )

    def forward(self, token: Tensor) -> Tensor:  # (B, H) -> (B,)
        return self.confidence_projection(token).squeeze(-1)


class GeneDecoder(nn.Module):
    """Embedding to genes: Linear, LN, GELU, Dropout for each hidden width, then Linear, ReLU."""

    def __init__(self, n_in: int, n_genes: int, hidden: tuple[int, ...], residual: bool, dropout: float) -> None:
        super().__init__()
        widths = [n_in, *hidden]
        blocks = [[nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(dropout)] for a, b in pairwise(widths)]
        last = [nn.Linear(widths[-1], n_genes), nn.ReLU()]
        self.residual = residual
        if residual:  # blocks 1, 3, 5, ... add the output of the block before them
            self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)
            self.final_layer = nn.Sequential(*last)
        else:
            self.decoder = nn.Sequential(*[layer for block in blocks for layer in block], *last)

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.decoder(x)
        for i, block in enumerate(self.blocks):
            x = block(x) + x if i % 2 else block(x)
        return self.final_layer(x)


class STNetwork(nn.Module):
    """X_perturbed = ReLU(control + W(Llama(control encoding + perturbation encoding [+ batch]))) for a set of cells."""

    def __init__(self, config: STConfig) -> None:
        super().__init__()
        self.config = c = config
        h = c.n_hidden
        self.pert_encoder = mlp(c.n_perturbation, h, h, c.n_encoder_layers, c.dropout)
        self.basal_encoder = (
            mlp(c.n_input, h, h, c.n_encoder_layers, c.dropout) if c.control_projection else nn.Linear(c.n_input, h)
        )
        self.transformer_backbone = Llama(c.n_layers, h, c.n_heads, c.head_dim, c.n_feedforward)
        self.project_out = mlp(h, h, c.n_output, c.n_decoder_layers, c.dropout)
        if c.head == "both":
            self.project_level = mlp(h, h, c.n_output, c.n_decoder_layers, c.dropout)
            nn.init.zeros_(self.project_level[-1].bias)  # set before training: what is zero starts at the mean cell
        if c.n_batches:
            self.batch_encoder = nn.Embedding(c.n_batches, h)
        if c.batch_token:
            self.batch_token = nn.Parameter(torch.randn(1, 1, h) * 0.02)
        if c.confidence_token:
            self.confidence_token = ConfidenceToken(h, c.dropout)
        if c.head == "all":
            narrow = c.n_output // 8
            self.final_down_then_up = nn.Sequential(
                nn.Linear(c.n_output, narrow), nn.GELU(), nn.Linear(narrow, c.n_output)
            )
        if c.n_genes:
            self.gene_decoder = GeneDecoder(
                c.n_output, c.n_genes, c.decoder_hidden, c.decoder_residual, c.decoder_dropout
            )
        # a one-hot vector has length 1, not the sqrt(n) of unit-variance inputs that the default start reckons with
        nn.init.uniform_(self.pert_encoder[0].weight, -1, 1)
        if c.head in _SHIFTS:
            nn.init.zeros_(self.project_out[-1].weight)
            nn.init.zeros_(self.project_out[-1].bias)

    def forward(self, control: Tensor, perturbation: Tensor, batch: Tensor | None = None) -> STOutput:
        """Predict from controls (B, S, n_input), perturbations (B, n_perturbation) and batch codes (B,) or (B, S)."""
        c = self.config
        if self.training and c.perturbation_dropout:
            hidden = torch.rand(len(perturbation), 1, device=perturbation.device) < c.perturbation_dropout
            average = nn.functional.pad(perturbation[:, -1:], (c.n_perturbation - 1, 0))
            perturbation = average.where(hidden, perturbation)
        control_code = self.basal_encoder(control)  # (B, S, H)
        x = control_code + self.pert_encoder(perturbation).unsqueeze(1)
        if c.n_batches:
            if batch is None:
                raise ValueError("batch=None, but this network was built with batches: give their codes.")
            x = x + self.batch_encoder(batch if batch.ndim == 2 else batch.unsqueeze(1))
        n_front = int(c.batch_token)
        if c.batch_token:
            x = torch.cat([self.batch_token.expand(len(x), -1, -1), x], dim=1)
        if c.confidence_token:
            x = torch.cat([x, self.confidence_token.confidence_token.expand(len(x), -1, -1)], dim=1)
        x = self.transformer_backbone(x)
        confidence = self.confidence_token(x[:, -1]) if c.confidence_token else None
        x = x[:, n_front : n_front + control.shape[1]]

        if c.head in _SHIFTS:
            heads = [control + self.project_out(x)]
            if c.head == "both":
                heads.append(self.project_level(x + control_code))
        elif c.head == "level":
            heads = [self.project_out(x + control_code)]
        elif c.head == "all":
            heads = [self.final_down_then_up(self.project_out(x) + control)]
        else:
            heads = [self.project_out(x)]
        if c.relu:
            heads = [_NotNegative.apply(cells) for cells in heads]
        return STOutput(tuple(heads), confidence)

    def decode(self, cells: Tensor) -> Tensor:
        """Genes (..., n_genes) of predicted embeddings (..., n_output), for a network in embedding space."""
        return self.gene_decoder(cells)


class Ensemble(nn.Module):
    """Networks of one configuration and different first weights, trained side by side."""

    def __init__(self, config: STConfig, n_networks: int) -> None:
        super().__init__()
        self.config = config
        self.networks = nn.ModuleList(STNetwork(config) for _ in range(n_networks))


def networks(module: STNetwork | Ensemble) -> list[STNetwork]:
    """List the networks of an ensemble, or the one network."""
    return list(module.networks) if isinstance(module, Ensemble) else [module]
