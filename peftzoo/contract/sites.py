"""A site: one place in a model where a part of a method can stand."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

LINEAR, BLOCK, ATTENTION, EMBED, MODEL = "linear", "block", "attention", "embed", "model"
"""Kinds of site: a linear layer, a block of layers, the call that mixes tokens, an embedding, the model."""


@dataclass(eq=False)
class Site:
    """One place in the model where a part can stand.

    `weight` is (out, in) for `nn.Linear` and for GPT-2's transposed `Conv1D` alike.
    """

    name: str
    module: nn.Module
    kind: str = LINEAR
    role: str = ""
    layer: int = -1
    plain: bool = field(default=False, init=False)
    """True when the original call is exactly `x W^T + b`, so that a part may compute it in its own kernel."""

    def __post_init__(self) -> None:
        self.transposed = type(self.module).__name__ == "Conv1D"
        untouched = "forward" not in vars(self.module)
        self.plain = untouched and (self.transposed or type(self.module) is nn.Linear)

    @property
    def weight(self) -> Tensor:
        W = self.module.weight
        return W.T if self.transposed else W

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        out, in_ = self.weight.shape
        return out, in_
