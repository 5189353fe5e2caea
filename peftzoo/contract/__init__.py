"""The contract of a method: what a plugin implements, and what it gets from the model.

A plugin imports from here, from `peftzoo.kernels` and from the top of `peftzoo`. `adapter` defines the
method's side (Adapter, Config, Part, Context), `sites` and `roles` the model's side (which layers there are
and what each does), `attention` puts a part around attention, `registry` finds methods, `scaffold` writes a
new one, `former_names` lets plugins go on importing the module names of earlier versions.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["adapter", "attention", "former_names", "registry", "roles", "scaffold", "sites"],
    submod_attrs={
        "adapter": ["Adapter", "Config", "Context", "Part", "Targets"],
        "roles": ["FUSED", "LINEAR_ROLES", "find_sites", "norm_parameters", "roles_of"],
        "sites": ["ATTENTION", "BLOCK", "EMBED", "LINEAR", "MODEL", "Site"],
    },
)
