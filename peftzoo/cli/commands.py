"""The command line: one file per command, no logic here. Heavy imports happen inside the commands."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import typer

from peftzoo import __version__
from peftzoo.cli import (
    bench,
    board,
    check,
    doctor,
    export,
    generate,
    import_,
    list_,
    models,
    new_method,
    params,
    profile,
    recommend,
    show,
    sweep,
    verify,
)
from peftzoo.errors import UserError

app = typer.Typer(
    name="peftzoo",
    help="Parameter-efficient fine-tuning methods under one contract, compared fairly.",
    epilog="Start here: peftzoo bench --method unilora --task gsm8k",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"peftzoo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for module in (bench, sweep, generate, board, recommend, verify, list_, show, params, check, profile,
               export, import_, models, new_method, doctor):  # fmt: skip
    module.add(app)


def main() -> None:
    """Entry point. A user's mistake is one line on standard error and exit code 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; ours show the progress
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for noisy in ("torchao", "torch.utils._pytree"):  # they report, on import, what concerns no user of ours
        logging.getLogger(noisy).setLevel(logging.ERROR)
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False, prog_name="peftzoo")
    except UserError as error:
        _stop(str(error), 2)
    except typer.Abort:
        _stop("interrupted", 130)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _stop(f"{_usage(error)}; see `{_command(error)} --help`", 2)
    else:
        if code == 130:  # what typer makes of Ctrl-C
            _stop("interrupted; the same command goes on from here", 130)
        sys.exit(code if isinstance(code, int) else 0)


def _command(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "peftzoo"


def _usage(error: Any) -> str:
    """What the parser refused, with the value that an option could not take, which its message leaves out."""
    names, words = getattr(getattr(error, "param", None), "opts", ()), sys.argv[1:]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names and (equals or following):
            return f'{name} "{value if equals else following}": {error.message}'
    return error.format_message().rstrip(".")


def _stop(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
