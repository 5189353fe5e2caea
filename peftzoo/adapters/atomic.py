"""Atomic writes: a file is complete or it is not there; and the checks of folders to read and to write."""

from __future__ import annotations

import os
from pathlib import Path

from peftzoo.errors import UserError


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


def assert_new(folder: Path) -> None:
    """Raise `UserError` unless there is nothing at `folder` yet, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'--out "{folder}" is there already: name a new folder')


def assert_folder(folder: Path, of: str) -> None:
    """Raise `UserError` unless `folder` is a folder; `of` says what it should hold."""
    if not folder.is_dir():
        raise UserError(f'"{folder}" is no folder: name the folder of {of}')
