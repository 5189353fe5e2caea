"""Base models: listed, downloaded, loaded, probed and pruned.

`catalogue` lists, `hub` and `download` fetch, `loading` returns weights and tokenizer by name (`load`) or
shapes without weights (`on_meta`), `silence` hides bars and warnings of libraries. `probe` collects the
inputs and gradients of layers, `low_rank_start` derives initial values of a low-rank pair from them,
`text_encoder` turns a text into vectors, `pruning` zeroes base weights as `pruning_settings` say.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "catalogue",
        "download",
        "hub",
        "loading",
        "low_rank_start",
        "probe",
        "pruning",
        "pruning_settings",
        "silence",
        "text_encoder",
    ],
    submod_attrs={
        "loading": ["Head", "Loaded", "Named", "is_causal", "load", "named", "on_meta"],
        "catalogue": ["home", "known"],
        "silence": ["quiet"],
    },
)
