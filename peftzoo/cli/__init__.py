"""The command line: one file a command, no logic here; `commands` puts them together, `output` prints.

Heavy imports happen inside the commands, so that `peftzoo --help` answers at once.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"commands": ["app", "main"]})
