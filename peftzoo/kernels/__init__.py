"""What methods compute, as autograd functions in plain PyTorch: exact, but cheap in time and memory.

A plugin calls these in place of building an (out, in) matrix at every step. A file a structure: `lowrank`
products, `rebuilt_weights` that are recomputed in backward, `frozen_cores` between fixed factors, `kronecker`
products, `rotation` by small blocks, `fourier` coefficients, random `projections`, `tensor_train`s,
`decompositions` for initialisation, a mixture of `experts`; `forward_cache` holds what several layers share.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "decompositions",
        "experts",
        "forward_cache",
        "fourier",
        "frozen_cores",
        "kronecker",
        "lowrank",
        "projections",
        "rebuilt_weights",
        "rotation",
        "tensor_train",
    ],
    submod_attrs={
        "decompositions": ["check_rank", "pivoted_qr", "top_qr", "top_svd"],
        "experts": ["Router", "imbalance", "mixed", "mixed_products", "keep_top"],
        "forward_cache": ["ForwardCache"],
        "fourier": ["Spectrum", "signal", "spectral", "spectrum"],
        "frozen_cores": ["frozen_core", "rows_first"],
        "kronecker": ["apply_kron", "plus_kron"],
        "lowrank": [
            "active",
            "branch_input",
            "cast",
            "frozen_pair",
            "fusable",
            "low_rank",
            "rows",
            "scaled",
            "scaled_input",
            "scaled_low_rank",
        ],
        "projections": ["DENSE", "Fastfood", "Gaussian", "Map", "balanced", "hadamard", "local"],
        "rebuilt_weights": ["exact", "in_place", "rebuilt", "recomputed", "remade"],
        "rotation": ["cayley", "neumann", "rotate_blocks"],
        "tensor_train": ["TensorTrain", "shape_of"],
    },
)
