"""Libraries without their progress bars, load reports and warnings on import."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator


def libraries() -> None:
    """For a process of ours, before libraries are imported: none of their bars, and no warnings on import."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # beside ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the `with`, transformers shows no progress bars and no load reports."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
