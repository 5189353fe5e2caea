"""The program `peftzoo`: its commands, its entry point `main`, and the printing of errors."""

from __future__ import annotations

import re
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
    output,
    params,
    power,
    profile,
    recommend,
    show,
    sweep,
    tune,
    verify,
)
from peftzoo.errors import UserError
from peftzoo.models import silence

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


def _print_version(requested: bool) -> None:
    if requested:
        print(f"peftzoo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for module in (bench, sweep, tune, generate, board, recommend, power, verify, list_, show, params, check,
               profile, export, import_, models, new_method, doctor):  # fmt: skip
    module.add(app)


def _quiet_option() -> Any:
    """The option `--quiet`, as typer makes it for a command of its own."""
    donor = typer.Typer(add_completion=False)

    @donor.command()
    def donor_command(
        quiet: bool = typer.Option(
            False, "--quiet", "-q", callback=output.set_quiet,
            help="Results and errors only: no progress, notes or next steps.",
        ),
    ) -> None:  # fmt: skip
        """Nothing: only its option is used."""

    (option,) = typer.main.get_command(donor).params
    option.expose_value = False  # the commands ask `output.quiet()`
    return option


def command() -> Any:
    """The program as a click command, with `--quiet` in each of its commands.

    Its overview has the first sentence of each command's help, whole: without `short_help` it would be cut.
    """
    root = typer.main.get_command(app)
    groups = [root]
    while groups:
        for child in groups.pop().commands.values():
            child.short_help = re.split(r"(?<=\.)\s", child.help or "", maxsplit=1)[0]
            if hasattr(child, "commands"):
                groups.append(child)
            else:
                child.params.append(_quiet_option())
    return root


def main() -> None:
    """Entry point. A user's mistake gives one line on standard error and exit code 2, Ctrl-C code 130."""
    silence.libraries()
    try:
        code = command().main(standalone_mode=False, prog_name="peftzoo")
    except UserError as error:
        _exit_with_error(str(error), 2)
    except typer.Abort:
        _exit_with_error("interrupted", 130)
    except KeyboardInterrupt:
        _exit_with_error("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _exit_with_error(f"{_usage_error(error)}; see `{_command_path(error)} --help`", 2)
    else:
        if code == 130:  # typer turns Ctrl-C into this code
            _exit_with_error(
                "interrupted; the same command goes on from the last checkpoint, if there is one yet", 130
            )
        sys.exit(code if isinstance(code, int) else 0)


def _command_path(error: Any) -> str:
    """The command in which a usage error happened, such as `peftzoo bench`."""
    context = getattr(error, "ctx", None)
    return context.command_path if context else "peftzoo"


def _usage_error(error: Any) -> str:
    """The message of a usage error; with the option's value, which the parser's own message leaves out."""
    names, arguments = getattr(getattr(error, "param", None), "opts", ()), sys.argv[1:]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in names and (equals or following):
            return f'{name} "{value if equals else following}": {error.message}'
    return error.format_message().rstrip(".")


def _exit_with_error(message: str, code: int) -> None:
    """Print the error and exit; with `--json` the error is the one document on standard output, too."""
    if "--json" in sys.argv[1:]:
        output.print_json({"error": message})
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
