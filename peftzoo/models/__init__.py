"""Base models: which are known, how one comes to this machine, how it is loaded, looked into and pruned.

`loading` gives weights and tokenizer by name (`load`) or the bare shapes (`on_meta`), `silence` keeps
transformers quiet meanwhile. `catalogue` lists, `hub` and `download` fetch, `probe` shows a method the inputs
and gradients of layers, `low_rank_start` derives a pair's start from them, `text_reader` turns a text into
vectors, `pruning` zeroes base weights.
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
        "silence",
        "text_reader",
    ],
    submod_attrs={
        "loading": ["Head", "Loaded", "Named", "is_causal", "load", "named", "on_meta"],
        "catalogue": ["home", "known"],
        "silence": ["quiet"],
    },
)
