"""BitFit: only bias vectors are trained.

    y = x W^T + b        W (out, in) frozen, b (out,) trained; so are the biases of the normalisation layers

Starts from the model's own biases, so it is the identity. Trained: the sum of the bias lengths (BERT-base
102,912 with the pooler). Llama-like models have no biases, and attaching to them is refused.
Paper: Ben Zaken, Ravfogel, Goldberg, arXiv 2106.10199; `biases=query-mlp` is its smaller set, b_q and b_m2 of
the first MLP layer. Where q, k and v are one layer (GPT-2), the whole bias of that layer is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import nn

from peftzoo.contract import Adapter, Config, find_sites


class BitFit(Adapter):
    name = "bitfit"
    title = "Bias-only fine-tuning"
    paper = "Ben Zaken et al., BitFit, arXiv 2106.10199 (ACL 2022)"
    family = "selective"
    lr = 3e-3

    class Config(Config):
        biases: Literal["all", "query-mlp"] = Field(
            "all", description="every bias, or those of the queries and of the first MLP layer"
        )

    def unfreeze(self, model: nn.Module) -> Sequence[str]:
        names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if self.config.biases == "all":
            return names
        layers = {f"{site.name}.bias" for site in find_sites(model, ("q", "up"))}
        return [name for name in names if name in layers]
