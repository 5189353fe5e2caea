"""A value that several layers of one forward pass share, computed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ForwardCache:
    """The last value computed, given again for the same source tensor, unchanged, and the same key.

    A copied or pickled `ForwardCache` is empty, so that no graph travels with a model.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.source, self.key, self.value = None, None, None

    def get(self, source: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling() or source.is_inference():  # neither keeps a version
            return make()
        key = (key, source._version, source.requires_grad, torch.is_grad_enabled())
        if self.source is None or self.source() is not source or self.key != key:
            self.source, self.key, self.value = weakref.ref(source), key, make()
        return self.value

    def __reduce__(self):
        return ForwardCache, ()
