"""A site: one place in a model where a part of a method can stand."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

LINEAR, BLOCK, ATTENTION, EMBED, MODEL = "linear", "block", "attention", "embed", "model"
"""Kinds of site: a linear layer, a block of layers, the call that mixes tokens, an embedding, the model."""


@dataclass(eq=False)
class Site:
    """One place in the model where a part can stand.

    `role` is the module's role in its architecture (`q`, `up`, ...) or the pattern that matched it, `layer`
    the number in the module's name (-1 without one).
    """

    name: str
    module: nn.Module
    kind: str = LINEAR
    role: str = ""
    layer: int = -1
    plain: bool = field(default=False, init=False)
    """True when the original call is exactly `x W^T + b`, so that a part's own kernel may compute it."""

    def __post_init__(self) -> None:
        self.transposed = type(self.module).__name__ == "Conv1D"
        untouched = "forward" not in vars(self.module)
        self.plain = untouched and (self.transposed or type(self.module) is nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in) for `nn.Linear` and for GPT-2's transposed `Conv1D`."""
        W = self.module.weight
        return W.T if self.transposed else W

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.module.bias

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        out, in_ = self.weight.shape
        return out, in_
