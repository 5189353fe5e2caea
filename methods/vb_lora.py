"""VB-LoRA: every piece of every A and B is a mixture of a few vectors from one bank that all layers share.

    piece = sum_j softmax(p_J)_j Z[j], j in J, the k largest of the piece's logits p (h,)    Z (h, b) the bank
    y = x W^T + b0 + (drop(x) A^T) B^T    A (r, in): rows of in/b pieces, B (out, r): columns of out/b pieces

There is no alpha / r. Z ~ U(-0.02, 0.02), logits ~ N(0, std^2): A and B both start non-zero, so the start is
not exactly the base. Only the k chosen logits of a piece have a gradient; with k = 1 none has.
Trained: h b + S h with S = r sum(in + out) / b pieces. Afterwards the bank and, per piece, k indices and
k - 1 weights say everything: that is what the paper counts (RoBERTa-base q, v: 74,880 trained, 23,904 kept).
b divides the width of every layer; by default it is the largest power of two up to 256 that does.
Paper: Li, Han and Ji, arXiv 2405.15179. Logits start with std 0.01 there, with 0.1 in HF PEFT. The bank
learns at a tenth of the logits' rate, as in the official code. Different: the pieces of all layers are one
tensor of logits, mixed once per forward pass; the backward is three matrix products, deterministic on
every device.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import ForwardCache, exact, low_rank


def choice(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights and indices of the k vectors that make each piece, (S, k) both."""
    top, idx = logits.topk(k, dim=-1)
    return top.softmax(-1), idx


class _Mix(torch.autograd.Function):
    """bank (h, b), logits (S, h) -> pieces (S, b). Saves nothing: its graph may be walked more than once."""

    @staticmethod
    def forward(ctx, bank: Tensor, logits: Tensor, k: int) -> Tensor:
        w, idx = choice(logits, k)
        ctx.bank, ctx.w, ctx.idx = bank, w, idx
        return F.embedding_bag(idx, bank, mode="sum", per_sample_weights=w)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        bank, w, idx = ctx.bank.detach(), ctx.w, ctx.idx
        with exact(grad):
            mixing = w.new_zeros(len(w), len(bank)).scatter_(1, idx, w)  # (S, h)
            dw = (grad @ bank.T).gather(1, idx)  # (S, k)
            dtop = w * (dw - (w * dw).sum(1, keepdim=True))
            return mixing.T @ grad, torch.zeros_like(mixing).scatter_(1, idx, dtop), None


class VBLoRAPart(Part):
    def __init__(self, site: Site, owner: Adapter, number: int) -> None:
        super().__init__(site, owner)
        self.number = number
        self.dropout = nn.Dropout(owner.config.dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """This layer's A (r, in) and B (out, r)."""
        (out, in_), r, (a, b) = self.site.shape, self.owner.config.r, self.owner.pieces(self.number)
        return a.reshape(r, in_), b.view(-1, r, b.shape[1]).transpose(1, 2).reshape(out, r)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.pair(), 1.0, self.dropout)


class VBLoRA(Adapter):
    name = "vb-lora"
    title = "VB-LoRA: Low-Rank Adaptation with a Vector Bank"
    paper = "Li, Han and Ji, VB-LoRA, arXiv 2405.15179 (NeurIPS 2024)"
    family = "shared"
    count_formula = (
        "model: h * (b or gcd(256, gcd_widths)); layers: h * r * (in + out) // (b or gcd(256, gcd_widths))"
    )
    peft = "VBLoRAConfig"
    peft_names: ClassVar[dict] = {
        "h": "num_vectors",
        "b": "vector_length",
        "k": "topk",
        "bound": "init_vector_bank_bound",
        "std": "init_logits_std",
        "dropout": "vblora_dropout",
    }
    lr = 1e-1
    identity_at_init = False

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        r: int = Field(4, ge=1, description="rank")
        h: int = Field(90, ge=1, description="vectors in the bank")
        b: int | None = Field(None, ge=1, description="length of a vector; by default at most 256")
        k: int = Field(2, ge=1, description="vectors mixed into one piece, at most h")
        bound: float = Field(0.02, gt=0, description="the bank starts uniform in (-bound, bound)")
        std: float = Field(0.01, ge=0, description="standard deviation of the logits at start")
        bank_lr: float = Field(0.1, gt=0, description="learning rate of the bank as a share of the logits'")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    variants: ClassVar[list] = [{"r": 2, "h": 12, "std": 1.0, "bound": 0.5}]

    def prepare(self, sites: list[Site]) -> None:
        c = self.config
        if c.k > c.h:
            raise UserError(f'method "vb-lora": k={c.k} of h={c.h} vectors: raise h or lower k')
        b = c.b or math.gcd(256, *(n for s in sites for n in s.shape))
        if odd := [(s.name, n) for s in sites for n in s.shape if n % b]:
            raise UserError(f'method "vb-lora": b={b} does not divide the width {odd[0][1]} of {odd[0][0]}')
        self.sizes = [c.r * n // b for s in sites for n in reversed(s.shape)]  # pieces of A, B, A, B ...
        self.number = {s.name: i for i, s in enumerate(sites)}
        self.bank = nn.Parameter(self.ctx.uniform(c.h, b, bound=c.bound, key="bank"))
        self.logits = nn.Parameter(self.ctx.normal(sum(self.sizes), c.h, std=c.std, key="logits"))
        self.recent = ForwardCache()

    def pieces(self, number: int) -> tuple[Tensor, Tensor]:
        """The pieces of one layer's A and B; mixed anew when the first layer asks or the logits changed."""
        if torch.compiler.is_compiling():  # each layer mixes its own
            both = self.logits.split(self.sizes)[2 * number : 2 * number + 2]
            chosen = (choice(logits, self.config.k) for logits in both)
            return tuple((w[..., None] * self.bank[idx]).sum(1) for w, idx in chosen)
        if number == 0:
            self.recent.clear()
        make = lambda: _Mix.apply(self.bank, self.logits, self.config.k).split(self.sizes)  # noqa: E731
        return self.recent.get(self.logits, self.bank._version, make)[2 * number : 2 * number + 2]

    def part(self, site: Site) -> Part:
        return VBLoRAPart(site, self, self.number[site.name])

    def optimizer(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        groups = [{"params": [self.logits]}, {"params": [self.bank], "lr": self.config.bank_lr * lr}]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)

    def peft_config(self, sites: list[Site]) -> dict:
        return super().peft_config(sites) | {"vector_length": self.bank.shape[1]}

    def peft_state(self) -> dict[str, Tensor]:
        state, logits = {"vblora_vector_bank.default": self.bank}, self.logits.split(self.sizes)
        for name, i in self.number.items():
            A, B = logits[2 * i : 2 * i + 2]
            state[f"{name}.vblora_logits_A.default"] = A.view(self.config.r, -1, A.shape[1])
            state[f"{name}.vblora_logits_B.default"] = B.view(-1, self.config.r, B.shape[1])
        return state
