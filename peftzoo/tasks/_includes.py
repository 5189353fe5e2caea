"""YAML files that include others, laid on top of each other as lm-evaluation-harness lays them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftzoo.errors import UserError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file as a mapping on top of those it includes: later files win, `metadata` is merged key by key.

    lm-eval lets the last `metadata` win as a whole; of ours it reads nothing but `version`, so a file that
    states its version means the same to both. Raises `UserError` naming the file that was asked for.
    """
    shown = (_seen or (path,))[0].name
    if path in _seen:
        raise UserError(f'task file "{shown}": {path.name} includes itself')
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        what = f", include {path.name}," if _seen else ""
        raise UserError(f'task file "{shown}"{what} cannot be read: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'task file "{shown}": not plain YAML ({" ".join(str(error).split())})') from None
    if not isinstance(raw, dict):
        raise UserError(f'task file "{shown}": needs lm-eval\'s keys and a metadata block')
    includes, under = raw.pop("include", []), {}
    for name in includes if isinstance(includes, list) else [includes]:
        under = _lay(under, read(path.parent / str(name), (*_seen, path)))
    return _lay(under, raw)


def _lay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = {k: _deep(under.get(k), v) if k == "metadata" else v for k, v in over.items()}
    return under | merged


def _deep(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {k: _deep(under.get(k), v) for k, v in over.items()}
