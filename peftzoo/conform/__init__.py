"""Conformance checks: what every method must fulfil, tested on tiny models.

`suite` lists and runs the checks, for pytest and for `peftzoo check`; `rules` defines what a check is and
when it applies, `cases` builds the models, `where` finds the line that a failure is about, `process` compares
what all code of a process shares. The checks themselves: `plugin` (the file), `options` (their values,
dropout), `counting` (the formula of the count), `placement` (which layers have parts), `gradients` (against
differences), `training`, `lifetime` (memory over steps, resuming), `isolation` (the process, other rows,
other runs), `weights` (merging, saving, memory, generation).
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "cases",
        "counting",
        "gradients",
        "isolation",
        "lifetime",
        "options",
        "placement",
        "plugin",
        "process",
        "rules",
        "suite",
        "training",
        "weights",
        "where",
    ],
    submod_attrs={"suite": ["ANY", "Result", "checks", "plan", "run", "run_one"]},
)
