"""YAML files that include others, merged in the order in which lm-evaluation-harness merges them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftzoo.errors import UserError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(path: Path, _including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's keys merged over those of the files that it includes.

    Of two values of a key the later file's holds; `metadata` is merged key by key. (lm-eval lets the last
    `metadata` replace the others. It reads only `version` from it, so a file that states its version means
    the same to both.) `_including`: the files that led to this one, first the outermost. Raises `UserError`,
    which names the outermost file.
    """
    outermost = (_including or (path,))[0].name
    if path in _including:
        raise UserError(f'task file "{outermost}": {path.name} includes itself')
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        what = f", include {path.name}," if _including else ""
        raise UserError(f'task file "{outermost}"{what} cannot be read: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'task file "{outermost}": not plain YAML ({" ".join(str(error).split())})') from None
    if not isinstance(raw, dict):
        raise UserError(f'task file "{outermost}": needs lm-eval\'s keys and a metadata block')
    includes, included = raw.pop("include", []), {}
    for name in includes if isinstance(includes, list) else [includes]:
        included = _merge(included, read(path.parent / str(name), (*_including, path)))
    return _merge(included, raw)


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `update`; `metadata` is merged at every depth."""
    merged = {k: _deep_merge(base.get(k), v) if k == "metadata" else v for k, v in update.items()}
    return base | merged


def _deep_merge(base: Any, update: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(update, dict)):
        return update
    return base | {k: _deep_merge(base.get(k), v) for k, v in update.items()}
