"""The error that a user's mistake raises, and the "did you mean" of its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can correct; the command line prints one line and exits with code 2.

    The message names the value, what is allowed, and the next step.
    """


class NeedsWeights(UserError):
    """The method cannot be attached to a model on the meta device; with the model's weights it may work."""


EXTRAS = {"peft": ("HF PEFT", "peft"), "optuna": ("Optuna", "search"), "ray": ("Ray", "ray"),
          "trackio": ("trackio", "trackio")}  # fmt: skip
"""Package that only an extra brings -> its name in words, and the extra."""


def not_installed(package: str) -> UserError:
    """The error for a package of `EXTRAS` that cannot be imported, to be raised by the caller."""
    name, extra = EXTRAS[package]
    return UserError(f'{name} is not installed: pip install "peftzoo[{extra}]"')


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`did you mean "lora"?` with the closest name of `known`, or "" if none is close."""
    known = sorted(set(known))
    matches = difflib.get_close_matches(wrong.lower(), known, n=1, cutoff=0.5)
    matches = matches or [name for name in known if wrong and name.startswith(wrong.lower())][:1]
    return f'did you mean "{matches[0]}"?' if matches else ""


def unknown(what: str, wrong: str, known: Iterable[str], see: str = "") -> UserError:
    """The error for an unknown name, to be raised by the caller.

    `what` is the kind of name, such as "method", `wrong` the name that was given, `see` a command that lists
    the allowed names. The message suggests the closest name of `known`, else it lists the first twelve.
    """
    known = list(known)
    hint = nearest(wrong, known) or (f"known: {', '.join(sorted(known)[:12])}" if known else "none is known")
    return UserError(f'unknown {what} "{wrong}": {hint}' + (f" (see `{see}`)" if see else ""))
