"""Full fine-tuning: every parameter of the base is trained.

    W' = W + dW        dW (out, in) unconstrained, for every tensor of the model

Nothing is added, so there is nothing to merge, and a saved adapter is as large as the model. Trained: all of
it (tied tensors count once). The usual upper reference for quality and for memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftzoo.contract import Adapter


class Full(Adapter):
    name = "full"
    title = "Full fine-tuning"
    paper = "no paper: the usual way to fine-tune"
    family = "baseline"
    count_formula = "model: all_parameters"
    lr = 5e-4

    def unfreeze(self, model: nn.Module) -> Sequence[str]:
        return [name for name, _ in model.named_parameters()]
