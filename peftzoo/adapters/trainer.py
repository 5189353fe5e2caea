"""Use an attached method with `transformers.Trainer`.

The Trainer wants one module that owns what is trained: `for_trainer` gives it that, with the method's own
optimiser and a callback that calls the method's hooks. Checkpoints then hold the adapter, not the model.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from peftzoo.adapters.handle import Attached
from peftzoo.errors import UserError


class TrainableModule(nn.Module):
    """Model and adapter as one module with the model's own signature; its state dict is the adapter's."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self.model, self.adapter = attached.model, attached.adapter
        self.config = attached.model.config
        object.__setattr__(self, "attached", attached)
        self.forward = functools.update_wrapper(
            functools.partial(TrainableModule.forward, self), attached.model.forward
        )

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's output; in train mode the adapter's penalty is added to its loss."""
        out = self.model(*args, labels=labels, **kwargs)
        if self.training and out.loss is not None:
            out.loss = out.loss + self.adapter.penalty()
        return out

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Copies of the adapter's tensors, as `Attached.state_dict` names them."""
        return {name: t.clone() for name, t in self.attached.state_dict().items()}

    def load_state_dict(self, tensors: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        """Raises `UserError` when names or shapes do not fit."""
        self.attached.load_state_dict(tensors)
        return nn.modules.module._IncompatibleKeys([], [])

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Called by the Trainer; passed on to the model."""
        self.model.gradient_checkpointing_enable(**kwargs)


class HookCallback(TrainerCallback):
    """Calls the method's `after_backward` and `after_step` (the Trainer clips gradients before the first)."""

    def __init__(self, attached: Attached) -> None:
        self.adapter = attached.adapter

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the backward pass and gradient clipping."""
        self.adapter.after_backward(state.global_step + 1, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimiser's step."""
        self.adapter.after_step(state.global_step, state.max_steps)


def for_trainer(attached: Attached, lr: float | None = None, head_lr: float | None = None) -> dict[str, Any]:
    """Arguments for `transformers.Trainer`: `Trainer(**for_trainer(handle), args=..., train_dataset=...)`.

    `lr` and `head_lr` are those of `Attached.optimizer`. Raises `UserError` for a method that searches.
    """
    if attached.adapter.searches:
        raise UserError(
            f'method "{attached.adapter.name}" fits itself without gradients: call handle.adapter.search(...)'
        )
    optimizer = attached.optimizer(lr, head_lr)
    return {
        "model": TrainableModule(attached),
        "optimizers": (optimizer, None),
        "callbacks": [HookCallback(attached)],
    }
