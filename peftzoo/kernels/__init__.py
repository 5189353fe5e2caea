"""Cheap forms of what methods compute, with their own backward passes.

A plugin calls these in place of building an (out, in) matrix at every step. Each file is one form: a product
of low rank, a weight that is rebuilt, a small core between frozen factors, Kronecker products, rotations,
Fourier, random projections, tensor trains, decompositions for initialisation, a mixture of experts.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
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
