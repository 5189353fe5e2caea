"""LoRA+: LoRA in which B learns faster than A.

    y = x W^T + b + s * (drop(x) A^T) B^T     lr of A = lr, lr of B = ratio * lr     A (r, in), B (out, r)

With steps of Adam's size and B = 0 at the start, both changes, B dA x and dB A x, stay of order one as the
width n grows only if lr_A ~ 1/n and lr_B ~ 1. Everything else is LoRA: initialisation, count r (in + out) per
layer, merging. The schedule multiplies both rates, so their ratio is kept.

Paper: Hayou et al., arXiv 2402.12354; ratio 16 is its advice, its scripts use 10 to 80. Different: no weight
decay, and a fresh head keeps a rate of its own (HF PEFT gives every vector of a head the rate of B).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from peftzoo.methods.lora import LoRA


class LoRAPlus(LoRA):
    name = "lora-plus"
    title = "LoRA+: Efficient Low Rank Adaptation of Large Models"
    paper = "Hayou et al., LoRA+, arXiv 2402.12354 (ICML 2024)"
    trained_as = "lora"
    lr = 1e-3

    class Config(LoRA.Config):
        ratio: float = Field(16.0, ge=1, description="learning rate of B over that of A")

    def optimizer(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        of_B = {id(part.B) for part in self.parts.values()}
        A = [p for p in params if id(p) not in of_B]
        B = [p for p in params if id(p) in of_B]
        groups = [{"params": A, "lr": lr}, {"params": B, "lr": self.config.ratio * lr}]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
