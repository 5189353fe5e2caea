"""Conformance checks: what every method must fulfil, tested on tiny models.

`suite` lists and runs the checks, for pytest and for `peftzoo check`; `rules` defines what a check is and
when it applies, `cases` builds the models. The checks themselves: `plugin` (the file), `placement` (which
layers have parts), `gradients` (against differences), `training`, `weights` (merging, saving, memory,
generation).
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["cases", "gradients", "placement", "plugin", "rules", "suite", "training", "weights"],
    submod_attrs={"suite": ["ANY", "Result", "checks", "plan", "run", "run_one"]},
)
