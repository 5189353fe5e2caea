"""A method on a model: attach it, switch it on and off, merge it, save it, load it.

`handle` attaches a method and returns the handle (Attached), `saving` reads and writes adapter folders,
`adapter_refs` are options that name such folders, `trainer` is for transformers' Trainer, `atomic` writes
files atomically.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["atomic", "adapter_refs", "handle", "saving", "trainer"],
    submod_attrs={
        "atomic": ["write_atomically"],
        "handle": ["Attached", "attach", "configure"],
        "adapter_refs": ["AdapterRef", "Adapters"],
        "saving": ["load", "read", "save"],
        "trainer": ["for_trainer"],
    },
)
