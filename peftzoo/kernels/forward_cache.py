"""A value that several layers of one forward pass share, computed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ForwardCache:
    """Holds the last computed value, and returns it again for the same, unchanged source tensor and key.

    A copied or pickled `ForwardCache` is empty, so that no autograd graph is copied with a model.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the value and its graph."""
        self.source, self.key, self.value = None, None, None

    def get(self, source: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The value computed from `source` under `key`: cached, or `make()`.

        It is computed anew after an in-place change of `source` or a change of grad mode, and is never cached
        under torch.compile or in inference mode.
        """
        if torch.compiler.is_compiling() or source.is_inference():  # these have no version counter
            return make()
        key = (key, source._version, source.requires_grad, torch.is_grad_enabled())
        if self.source is None or self.source() is not source or self.key != key:
            self.source, self.key, self.value = weakref.ref(source), key, make()
        return self.value

    def __reduce__(self):
        return ForwardCache, ()
