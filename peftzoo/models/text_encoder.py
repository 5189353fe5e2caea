"""A language model that encodes a text as vectors: the last hidden states of learned tokens after it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftzoo import models
from peftzoo.adapters import attach
from peftzoo.contract import Context
from peftzoo.errors import UserError

if TYPE_CHECKING:  # imported only where one is loaded: methods that use this file are listed quickly
    from transformers import PreTrainedModel

SELF = "self"
"""Name of the base model itself as the reader."""


class TextEncoder(nn.Module):
    """The model `name`, frozen, with an adapter of `method` and one learned token.

    `self` is the base model, through modules of its own over the same weights, so that parts around the base
    do not touch it. Neither the model nor its tokenizer is registered; the adapter is, under the name of its
    method. `width` is the hidden size. Raises `UserError` for a model that cannot be used this way.
    """

    def __init__(self, name: str, ctx: Context, method: str, **options: Any) -> None:
        super().__init__()
        if name.startswith(("/", "~")):  # it goes into records and saved adapters
            raise UserError(
                f'"{name}": records hold no full paths: name this folder relative to the current one'
            )
        model, tokenizer = _base_model(ctx) if name == SELF else _other_model(name, ctx)
        embedding = model.get_input_embeddings()
        self.width = model.config.get_text_config().hidden_size
        if not isinstance(embedding, nn.Embedding) or embedding.weight.shape[1] != self.width:
            raise UserError(f'model "{name}" does not read tokens of its own width: name another one')
        model.config.use_cache = False
        trained = [p for p in model.parameters() if p.requires_grad]  # a head, when the weights are shared
        self.add_module(method, attach(model, method, seed=ctx.seed, **options).adapter)
        for p in trained:
            p.requires_grad_(True)
        self.meta = nn.Parameter(embedding.weight.detach().float().mean(0))
        object.__setattr__(self, "reader", (model.eval(), tokenizer))

    def tokens(self, text: str) -> Tensor:
        """Token ids of the text, (T,); empty for an empty text and on the meta device."""
        model, tokenizer = self.reader
        if not text or self.meta.is_meta:
            return torch.empty(0, dtype=torch.long, device=self.meta.device)
        if tokenizer is None:
            raise UserError("the description needs a tokenizer: pass tokenizer= to attach() or load()")
        return torch.tensor(tokenizer(text)["input_ids"], device=model.device)

    def forward(self, ids: Tensor, n: int) -> Tensor:
        """Last hidden states (n, width), in fp32, of n learned tokens after ids (T,).

        Raises `UserError` when the text is too long for the model.
        """
        model, _ = self.reader
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) + n > limit:
            raise UserError(
                f"the description has {len(ids)} tokens, its reader takes {limit - n}: shorten it"
            )
        text = model.get_input_embeddings()(ids)
        x = torch.cat([text, self.meta.to(text.dtype).expand(n, -1)])
        return model(inputs_embeds=x[None]).last_hidden_state[0, -n:].float()


def _base_model(ctx: Context) -> tuple[PreTrainedModel, Any]:
    """Base model and tokenizer: new modules over the base's own weights, without its head."""
    from transformers import PreTrainedModel

    if not isinstance(ctx.model, PreTrainedModel) or ctx.model.config.is_encoder_decoder:
        raise UserError(f"{type(ctx.model).__name__} cannot read for itself: name another model")
    shared = {id(t): t for t in (*ctx.model.parameters(), *ctx.model.buffers())}  # deepcopy's memo
    return copy.deepcopy(ctx.model.base_model, shared), ctx.tokenizer


def _other_model(name: str, ctx: Context) -> tuple[PreTrainedModel, Any]:
    if ctx.meta:
        return models.on_meta(name).base_model, None
    loaded = models.load(name)
    return loaded.model.base_model.to(ctx.model.device).requires_grad_(False), loaded.tokenizer
