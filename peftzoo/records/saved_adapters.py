"""Finding the saved adapter of a run on record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from peftzoo.errors import UserError, nearest
from peftzoo.records import store
from peftzoo.records.schema import Record


def find(reference: str, folders: Sequence[Path]) -> Path:
    """The adapter folder that `reference` names: the folder itself, a record's file, a run's id or its name.

    An id is `0123456789ab-s0`, or `0123456789ab` where only one seed is saved. The first of `folders` that
    knows the run decides. Raises `UserError` when there is no such run, several of them in one folder, or no
    saved adapter.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        record = store.read(path)
        roots = [p.parent for p in path.parents if p.name == "records"][:1]
        candidates = [[root / "adapters" / f"{record.id}-s{record.seed}"] for root in roots or folders]
    elif re.fullmatch(r"[0-9a-f]{12}(-s\d+)?", reference):
        pattern = reference if "-s" in reference else f"{reference}-s*"
        candidates = [[*(folder / "adapters").glob(pattern)] for folder in folders]
    else:
        records = [[r for r in store.read_all(f) if isinstance(r, Record)] for f in folders]
        candidates = [[_root(r) / "adapters" / f"{r.id}-s{r.seed}" for r in rs if r.name == reference]
                      for rs in records]  # fmt: skip
        if not any(candidates):
            hint = nearest(reference, {r.name for rs in records for r in rs}) or "name one of these"
            names = ", ".join(f.name for f in folders) or "any folder here"
            raise UserError(f'"{reference}" is no folder, no record and no run in {names}: {hint}')
    places = next(filter(None, candidates), [])
    if len(places) > 1:
        which = ", ".join(sorted(f"{p.name} (in {p.parents[1]})" for p in places))
        raise UserError(f'"{reference}" names {len(places)} runs: name the record or the folder of {which}')
    if not places or not places[0].is_dir():
        raise UserError(
            f'run "{reference}" has no saved adapter beside its records (the published ones have none): run '
            "it again with peftzoo bench, with --force where it is on record"
        )
    return places[0]


def _root(record: Record) -> Path:
    """The folder that has `records/`, with the record in it, and `adapters/`."""
    return next(p.parent for p in record.file.parents if p.name == "records")
