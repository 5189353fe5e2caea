"""The command line: one file per command; `commands` is the program, `output` prints.

Heavy imports happen inside the commands, so that `peftzoo --help` is fast.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"commands": ["app", "main"]})
