"""The line of a plugin that a failure is about."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

NAMED = (
    r"option (\w+)", r"with (\w+)=", r"[,(] (\w+)=", r"([a-z_]+)\(\)", r"parts\.[\w/]+\.(\w+)",
    r"^(\w+) (?:moves|ends)",
    r"\b(count_formula|known_failures|variants|tiny|lr|paper|title|family|name)\b",
)  # fmt: skip
"""How messages name options, hooks, tensors and facts."""


def place(cls: type, error: BaseException) -> str:
    """`methods/lora.py:42`: where the plugin was when it broke, or what the message names, or its class."""
    file = inspect.getsourcefile(cls)
    if file is None:
        return ""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    line = _in_trace(file, error) or next(_named(str(error), lines), 0) or _class_line(cls, lines)
    return f"{_short(Path(file))}:{line}"


def _in_trace(file: str, error: BaseException) -> int:
    """The innermost line of the file in the traceback of the error or of its causes; 0 for none."""
    found, current = 0, error
    while current is not None:
        trace = current.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == file:
                found = trace.tb_lineno
            trace = trace.tb_next
        current = current.__cause__ or current.__context__
    return found


def _named(message: str, lines: list[str]) -> Iterator[int]:
    """Lines that define what the message names, the first name first."""
    for pattern in NAMED:
        for name in re.findall(pattern, message):
            definition = re.compile(
                rf'^\s+{name}\s*[:=]|def {name}\(|self\.{name}\b[^=]*=|register_\w+\(f?"{name}"'
            )
            yield from (n for n, text in enumerate(lines, 1) if definition.search(text))


def _class_line(cls: type, lines: list[str]) -> int:
    """The line where the class begins; 1 where the file does not show it."""
    names = [c.__name__ for c in cls.__mro__]
    found = (n for name in names for n, t in enumerate(lines, 1) if t.startswith(f"class {name}("))
    return next(found, 1)


def _short(file: Path) -> str:
    """The path as seen from the current folder, where it lies below it."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
