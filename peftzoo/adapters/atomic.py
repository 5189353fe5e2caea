"""Atomic writes: a file is complete or it is not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new one, never a mixture.

    Missing folders are made. `durable` flushes the data to disk first, so that this holds after a power cut
    too. Raises `OSError`, with the old file in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
