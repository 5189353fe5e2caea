"""Prefix tuning: learned keys and values in front of those of the text, in every attention layer.

    y = softmax(Q [P_K ; K]^T / sqrt(width)) [P_V ; V]        P_K, P_V (kv heads, n, width of a head)

Every query attends to all n learned positions, whatever the mask; their keys are not rotated. P ~ N(0, std^2)
takes its share of the attention from the first step on, so this is not the identity, and it cannot be merged.
Trained: 2 n (kv heads) (width) per layer.
Paper: Li and Liang, arXiv 2101.00190. Different: the vectors are trained directly, without the MLP that the
paper trains them through and then drops; heads that share keys and values share their prefix; the text keeps
its own positions, where HF PEFT counts the prefix too.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import ATTENTION, Adapter, Config, Part, Site, Targets


class PrefixPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, model = owner.config, owner.ctx.model.config.get_text_config()
        heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        for name in ("K", "V"):
            P = owner.ctx.normal(heads, c.n, width, std=c.std, key=f"{site.name}/{name}")
            self.register_parameter(name, nn.Parameter(P))

    def forward(self, base, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """k, v (batch, kv heads, tokens, head dim), mask (batch, 1, queries, tokens)"""
        K, V = (P.to(k.dtype).expand(len(k), -1, -1, -1) for P in (self.K, self.V))
        attended = True if mask.dtype == torch.bool else 0.0
        front = mask.new_full((*mask.shape[:-1], self.K.shape[1]), attended)
        return base(q, torch.cat([K, k], dim=2), torch.cat([V, v], dim=2), torch.cat([front, mask], dim=-1))


class PrefixTuning(Adapter):
    name = "prefix-tuning"
    title = "Prefix-Tuning"
    paper = "Li and Liang, Prefix-Tuning, arXiv 2101.00190 (ACL 2021)"
    family = "prompt"
    count_formula = "blocks: 2 * n * kv_heads * head_dim"
    peft = "PrefixTuningConfig"
    peft_differs = "it counts the positions of the text from the prefix on"
    lr = 0.15
    mergeable = False
    identity_at_init = False
    kind = ATTENTION

    class Config(Config):
        targets: Targets = Field(("attention",), description="the attention calls to extend")
        n: int = Field(16, ge=1, description="learned positions per layer")
        std: float = Field(
            0.02, gt=0, description="standard deviation of the learned keys and values at start"
        )

    def part(self, site: Site) -> Part:
        return PrefixPart(site, self)

    def peft_config(self, sites: list[Site]) -> dict:
        return {"num_virtual_tokens": self.config.n, "task_type": "CAUSAL_LM"}

    def peft_state(self) -> dict[str, Tensor]:
        rows = [P.transpose(0, 1).flatten(1) for p in self.parts.values() for P in (p.K, p.V)]  # (n, width)
        return {"prompt_encoder.default.embedding.weight": torch.cat(rows, dim=1)}
