"""peftzoo: parameter-efficient fine-tuning methods under one contract, compared fairly."""

from __future__ import annotations

from pathlib import Path

import lazy_loader

from peftzoo.contract import former_names

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "methods" / "__init__.py").is_file():
    __path__.append(str(_root))  # a source checkout: `peftzoo.methods` is the folder methods/ beside us
former_names.install()

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["contract", "kernels", "models"],
    submod_attrs={
        "adapters": ["Attached", "attach", "for_trainer", "load", "save"],
        "contract": ["Adapter", "Config", "Context", "Part", "Site"],
        "errors": ["UserError"],
    },
)
