"""Parts around attention: a function registered with transformers, through which every attention call goes.

A part gets the queries, keys and values that the model is about to use, (B, heads, tokens, head dim), and a
mask that is never implicit: (B, 1, queries, keys), boolean (True: attend) or additive.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from peftzoo.errors import UserError

_PREFIX = "peftzoo_"


def install(model: nn.Module, parts: dict[nn.Module, nn.Module]) -> str:
    """Route the model's attention through the parts, given by attention module.

    Returns the name of the attention implementation that they replace ("sdpa", "eager", ...). Raises
    `UserError` when the architecture does not dispatch its attention by name, or another method has parts
    around it.
    """
    previous = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise UserError(
            f"{type(model).__name__} computes attention without transformers' dispatch, so no part can stand "
            "around it; choose a method that changes linear layers"
        )
    if any("_peftzoo_part" in vars(module) for module in parts):
        raise UserError("another method stands around this model's attention already: detach that one first")
    _register_implementation(previous)
    for module, part in parts.items():
        object.__setattr__(module, "_peftzoo_part", part)  # not a submodule: the model keeps its own keys
    if not previous.startswith(_PREFIX):
        model.set_attn_implementation(_PREFIX + previous)
    return previous


def remove(model: nn.Module, modules: list[nn.Module], previous: str) -> None:
    """Undo `install`: take the parts off `modules` and restore the implementation named `previous`."""
    for module in modules:
        del module._peftzoo_part
    model.set_attn_implementation(previous)


def sync_training_mode(part: nn.Module) -> None:
    """Set the adapter to the train or eval mode of the part's module: `model.eval()` does not reach it."""
    training = part.site.module.training
    if part.training != training:
        (part.owner or part).train(training)


def _register_implementation(implementation: str) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(_PREFIX + implementation, partial(_attention_forward, implementation))
    mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    AttentionMaskInterface.register(_PREFIX + implementation, mask)


def _attention_forward(implementation: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask, **kw):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def base(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None):
        return _attention_function(ALL_ATTENTION_FUNCTIONS, implementation, module)(
            module, q, k, v, mask, **kw
        )

    part = vars(module).get("_peftzoo_part")
    if part is None:
        return base(q, k, v, mask)
    sync_training_mode(part)
    return part(base, q, k, v, explicit_mask(module, q, k, mask, kw.get("is_causal")))


def _attention_function(functions, name: str, module: nn.Module):
    if name != "eager":
        return functions[name]
    import sys

    return sys.modules[type(module).__module__].eager_attention_forward  # eager is defined per architecture


def explicit_mask(
    module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool | None
) -> Tensor:
    """The mask (B, 1, queries, keys); built here where the model left causality to the kernel."""
    if mask is not None:
        return mask
    queries, keys = q.shape[2], k.shape[2]
    full = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if module.is_causal if causal is None else causal:
        full = full.tril(keys - queries)
    return full.expand(q.shape[0], 1, queries, keys)
