"""MiSS: one trained shard per layer, tiled over the input (first named Bone, then DiSHA).

    y = x W^T + b + S(x) D        D (r, out), S(x) = sum_t x[t r : (t + 1) r] (r,), the last chunk padded
    "mini":  y = x W^T + b + [S(x) D, ..., S(x) D]        D (r, k), k = mini_r, repeated out / k times
    "bat":   V[a, c] = W[a, c] + W[a, c] D[a] + D[a]      D (out / r, r, r), for the r x r blocks of W

So the change is dW[i, j] = D[j mod r, i], of rank up to r: LoRA with A = [I I ... I] frozen, B = D^T, s = 1.
D = 0: the start is the base, and D has a gradient at once. Trained: r out, or r k for "mini"; no alpha.
Paper: Kang and Yin, arXiv 2409.15371 (authors' names from memory). It prints 87.0M at r = 64 for Llama-2-7B
(87,031,808 here) and for Mistral-7B, whose shapes give 88,080,384.
Different: only S(x) is kept for D, and nothing is padded; the changed weight of "bat" is rebuilt in backward.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import active, cast, fusable, in_place, rebuilt


def shard_sum(x: Tensor, r: int) -> Tensor:
    """S(x), (..., in) -> (..., r)"""
    whole, rest = divmod(x.shape[-1], r)
    S = x[..., : whole * r].unflatten(-1, (whole, r)).sum(-2)
    if rest:
        S = S + F.pad(x[..., whole * r :], (0, r - rest))
    return S


class _Shards(torch.autograd.Function):
    """y = x W^T + b + S(x) D:  dD = S(x)^T dy, and dy D^T is added to every chunk of dx. Saved: S(x)."""

    @staticmethod
    def forward(ctx, x, W, b, D):
        y = F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
        S = shard_sum(x, len(D)).view(-1, len(D))  # (n, r)
        y.view(-1, y.shape[-1]).addmm_(S, D.to(x.dtype))
        ctx.save_for_backward(W, D, S)
        return y

    @staticmethod
    def backward(ctx, dy):
        W, D, S = ctx.saved_tensors
        G, dx = dy.reshape(-1, dy.shape[-1]), None  # (n, out)
        if ctx.needs_input_grad[0]:
            dx, dS = torch.mm(G, W.to(G.dtype)), torch.mm(G, D.T.to(G.dtype))  # (n, in), (n, r)
            whole, rest = divmod(dx.shape[1], len(D))
            dx[:, : whole * len(D)].unflatten(1, (whole, -1)).add_(dS[:, None])
            if rest:
                dx[:, -rest:].add_(dS[:, :rest])
            dx = dx.view(*dy.shape[:-1], -1)
        return dx, None, None, torch.mm(S.T, G).to(D.dtype)


def blockwise(W: Tensor, D: Tensor) -> Tensor:
    """W[a, c] D[a] + D[a] for every r x r block of W (out, in); D (out / r, r, r)."""
    blocks, r, _ = D.shape
    P = (W.reshape(blocks, -1, r) @ D).view(blocks, r, -1, r)  # (a, row, c, column)
    return (P + D[:, :, None, :]).view(W.shape)


class MiSSPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, _) = owner.config, site.shape
        _check(c, site)
        shapes = {"miss": (c.r, out), "mini": (c.r, c.mini_r), "bat": (out // c.r, c.r, c.r)}
        self.D = nn.Parameter(torch.zeros(shapes[c.variant]))
        self.bat = c.variant == "bat"
        self.repeat = out // c.mini_r if c.variant == "mini" else 1
        self.dropout = nn.Dropout(c.dropout)

    def delta(self, W: Tensor) -> Tensor:
        if self.bat:
            return blockwise(W, self.D)
        in_ = self.site.shape[1]
        B = self.D.T.repeat(self.repeat, 1)  # (out, r)
        return B.repeat(1, -(-in_ // B.shape[1]))[:, :in_]

    def forward(self, base, x: Tensor) -> Tensor:
        if self.bat:
            return rebuilt(self.site, base, x, blockwise, self.D)
        X = cast(x)
        if self.repeat == 1 and fusable(self.site, x) and not active(self.dropout):
            return _Shards.apply(X, self.site.weight, self.site.bias, self.D)
        S = shard_sum(self.dropout(X), len(self.D))
        z = S @ self.D.to(S.dtype)  # (..., out) or (..., mini_r)
        if self.repeat > 1:
            z = z.repeat(*(1,) * (z.ndim - 1), self.repeat)
        return in_place(self.site, base(x), z)


def _check(c: Config, site: Site) -> None:
    """Raises `UserError` where the shapes of this layer do not fit the options."""
    out, in_ = site.shape
    say = f'method "miss", layer {site.name} ({out} x {in_}): '
    if c.r > in_:
        raise UserError(f"{say}r={c.r} is more than its {in_} inputs: lower r")
    if c.variant == "bat" and (out % c.r or in_ % c.r):
        raise UserError(f"{say}both sizes must be multiples of r={c.r} for variant=bat: choose a divisor")
    if c.variant == "mini" and out % c.mini_r:
        raise UserError(f"{say}mini_r={c.mini_r} does not divide its {out} outputs: choose a divisor")


class MiSS(Adapter):
    name = "miss"
    title = "Matrix Shard Sharing"
    paper = (
        "Kang and Yin, Balancing LoRA Performance and Efficiency with Simple Shard Sharing, arXiv 2409.15371"
    )
    family = "structured"
    count_formula = "r * (mini_r if variant == 'mini' else out)"
    peft = "MissConfig"
    peft_names: ClassVar[dict] = {"dropout": "miss_dropout"}
    lr = 3e-3

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(64, ge=1, description="length of a shard")
        variant: Literal["miss", "bat", "mini"] = Field(
            "miss", description="one shard, blocks, or a short shard"
        )
        mini_r: int = Field(1, ge=1, description="outputs of the shard that variant=mini repeats")
        dropout: float = Field(
            0.0, ge=0, lt=1, description="dropout on the shard's input, not for variant=bat"
        )

    tiny: ClassVar[dict] = {"r": 6}
    variants: ClassVar[list] = [{"r": 8, "variant": "bat"}, {"r": 7, "variant": "mini", "mini_r": 8}]

    def part(self, site: Site) -> Part:
        return MiSSPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        variant = self.config.variant
        return super().peft_config(sites) | {"init_weights": True if variant == "miss" else variant}

    @classmethod
    def from_peft(cls, config, sites: list[Site]) -> dict:
        variant = config.init_weights if config.init_weights in ("bat", "mini") else "miss"
        return super().from_peft(config, sites) | {"variant": variant}

    def peft_state(self) -> dict[str, Tensor]:
        return {f"{p.site.name}.miss_block.default": p.D for p in self.parts.values()}
