"""Which module plays which role in which architecture, as data.

A role is what a linear layer does: q, k, v (or a fused qkv), o, gate, up (or a fused gate_up), down. Other
kinds of site have one role each: `block` (a whole layer), `attention` (the call that mixes tokens), `embed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from peftzoo.contract.sites import ATTENTION, BLOCK, EMBED, LINEAR, MODEL, Site
from peftzoo.errors import UserError, nearest

_LLAMA = {
    "q": r"self_attn\.q_proj", "k": r"self_attn\.k_proj", "v": r"self_attn\.v_proj",
    "o": r"self_attn\.o_proj", "gate": r"mlp\.gate_proj", "up": r"mlp\.up_proj", "down": r"mlp\.down_proj",
    "attention": r"layers\.\d+\.self_attn", "block": r"layers\.\d+", "embed": r"embed_tokens",
}  # fmt: skip
_BERT = {
    "q": r"attention\.self\.query", "k": r"attention\.self\.key", "v": r"attention\.self\.value",
    "o": r"attention\.output\.dense", "up": r"intermediate\.dense", "down": r"layer\.\d+\.output\.dense",
    "attention": r"attention\.self", "block": r"layer\.\d+", "embed": r"word_embeddings",
}  # fmt: skip
_PHI = _LLAMA | {"o": r"self_attn\.dense", "up": r"mlp\.fc1", "down": r"mlp\.fc2"}
_TEXT = r"language_model(?:\.model)?\.layers\.\d+"
_GEMMA3 = {  # the text half only: its vision tower has layers of the same names
    role: rf"{_TEXT}\.{p}" for role, p in _LLAMA.items()
} | {"block": _TEXT, "attention": rf"{_TEXT}\.self_attn", "embed": r"embed_tokens"}
_T5 = r"(?:SelfAttention|EncDecAttention)"

ARCHITECTURES: dict[str, dict[str, str]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"], _LLAMA),
    "gemma3": _GEMMA3,
    **dict.fromkeys(["bert", "roberta", "xlm-roberta"], _BERT),
    "phi": {role: p for role, p in _PHI.items() if role != "gate"},
    "phi3": {
        "qkv": r"self_attn\.qkv_proj", "o": r"self_attn\.o_proj", "gate_up": r"mlp\.gate_up_proj",
        "down": r"mlp\.down_proj", "attention": r"layers\.\d+\.self_attn", "block": r"layers\.\d+",
        "embed": r"embed_tokens",
    },
    "gpt2": {
        "qkv": r"attn\.c_attn", "o": r"attn\.c_proj", "up": r"mlp\.c_fc", "down": r"mlp\.c_proj",
        "attention": r"h\.\d+\.attn", "block": r"h\.\d+", "embed": r"wte",
    },
    "gpt_neox": {
        "qkv": r"attention\.query_key_value", "o": r"attention\.dense", "up": r"mlp\.dense_h_to_4h",
        "down": r"mlp\.dense_4h_to_h", "attention": r"layers\.\d+\.attention", "block": r"layers\.\d+",
        "embed": r"embed_in",
    },
    "opt": {
        "q": r"self_attn\.q_proj", "k": r"self_attn\.k_proj", "v": r"self_attn\.v_proj",
        "o": r"self_attn\.out_proj", "up": r"layers\.\d+\.fc1", "down": r"layers\.\d+\.fc2",
        "attention": r"layers\.\d+\.self_attn", "block": r"layers\.\d+", "embed": r"embed_tokens",
    },
    "deberta-v2": _BERT | {
        "q": r"attention\.self\.query_proj", "k": r"attention\.self\.key_proj",
        "v": r"attention\.self\.value_proj",
    },
    "t5": {
        "q": rf"{_T5}\.q", "k": rf"{_T5}\.k", "v": rf"{_T5}\.v", "o": rf"{_T5}\.o",
        "gate": r"DenseReluDense\.wi_0", "up": r"DenseReluDense\.wi(?:_1)?", "down": r"DenseReluDense\.wo",
        "attention": _T5, "block": r"block\.\d+", "embed": r"shared",
    },
    "vit": {
        "q": r"attention\.q_proj", "k": r"attention\.k_proj", "v": r"attention\.v_proj",
        "o": r"attention\.o_proj", "up": r"mlp\.fc1", "down": r"mlp\.fc2",
        "attention": r"layers?\.\d+\.attention", "block": r"layers?\.\d+",
    },
}  # fmt: skip

FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
"""A role that an architecture computes inside a fused layer: the part then wraps the fused layer."""
LINEAR_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
_KIND = {"attention": ATTENTION, "block": BLOCK, "embed": EMBED}


def roles_of(model: nn.Module) -> dict[str, str]:
    """Role -> pattern for this model's architecture; empty for one that is not in the table."""
    return ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""), {})


def find_sites(model: nn.Module, targets: Iterable[str], kind: str = LINEAR) -> list[Site]:
    """The sites that `targets` name, in the model's own order.

    A target is a role (`q`), `all` (every linear role), or `re:PATTERN`, matched against the end of the
    module's name. Raises `UserError` for an unknown architecture, role, or a pattern that matches nothing.
    """
    if kind == MODEL:
        return [Site("", model, MODEL, MODEL)]
    patterns = _patterns(model, tuple(targets), kind)
    compiled = [(role, re.compile(rf"(?:^|\.)(?:{pattern})$")) for role, pattern in patterns.items()]
    sites = []
    for name, module in model.named_modules():
        role = next((role for role, regex in compiled if regex.search(name)), None)
        if role is None or (kind == LINEAR and not _is_linear(module)):
            continue
        layer = re.search(r"\.(\d+)(?:\.|$)", name)
        sites.append(Site(name, module, kind, role, int(layer[1]) if layer else -1))
    if not sites:
        raise UserError(
            f"targets {', '.join(targets)}: no {kind} layer of {type(model).__name__} matches; "
            "name roles (--set targets=q,v) or a pattern on module names (--set targets='re:q_proj')"
        )
    return sites


def norm_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of every normalisation layer (a module whose class name ends in `Norm`)."""
    norms = ((name, m) for name, m in model.named_modules() if type(m).__name__.endswith("Norm"))
    return [f"{name}.{leaf}" for name, m in norms for leaf, _ in m.named_parameters(recurse=False)]


def _is_linear(module: nn.Module) -> bool:
    """True for a module with a matrix as weight that is not an embedding (nn.Linear, Conv1D, quantised)."""
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding)


def _patterns(model: nn.Module, targets: tuple[str, ...], kind: str) -> dict[str, str]:
    """Role, or `re:PATTERN` itself -> regular expression on module names."""
    table = roles_of(model)
    patterns: dict[str, str] = {}
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise UserError(f'targets "{target}": not a regular expression ({error})') from None
            patterns[target] = target[3:]
            continue
        if not table:
            known = ", ".join(ARCHITECTURES)
            model_type = getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__
            raise UserError(
                f'architecture "{model_type}" has no table of roles (known: {known}); '
                "give patterns on module names by hand: --set targets='re:(q_proj|v_proj)'"
            )
        if target == "all":
            patterns |= {r: table[r] for r in LINEAR_ROLES if r in table}
            continue
        role = target if target in table else FUSED.get(target, target)
        if role not in table:
            if target in LINEAR_ROLES:  # a known role that this architecture lacks (no gate in BERT)
                continue
            raise UserError(
                f'unknown role "{target}": {nearest(target, [*table, "all"]) or ", ".join(table)}'
            )
        patterns[role] = table[role]
    return patterns
