"""What commands print: lines in a pipe, whole numbers at 80 columns, lists on a narrow terminal."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys

import pytest

from peftzoo import cli
from peftzoo.cli import output

COLUMNS = ("method", "seeds", "trained", "options")
ROWS = [
    ["lora", 3, "1,048,576", "r=8, targets=q,k,v,o,gate,up,down, alpha=16, dropout=0.0"],
    ["none", 1, None, ""],
]
RULES = re.compile("[─━│┃┌┐└┘╭╮╰╯├┤┬┴┼╴╸]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """terminal(80, function): what the function prints on a terminal of so many columns."""

    def show(columns: int, function) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "stdout", made := Terminal())
        function()
        return made.getvalue()

    return show


def table() -> None:
    output.print_table("Two methods", COLUMNS, ROWS, right=("seeds", "trained"))


def test_in_a_pipe_a_row_is_a_line(capsys) -> None:
    table()
    assert capsys.readouterr().out == (
        "Two methods\n"
        "method  seeds    trained  options\n"
        "lora        3  1,048,576  r=8, targets=q,k,v,o,gate,up,down, alpha=16, dropout=0.0\n"
        "none        1\n\n"
    )


def test_at_80_columns_text_is_wrapped_and_numbers_are_not(terminal) -> None:
    lines = terminal(80, table).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("lora" in line and " 3 " in line and "1,048,576" in line for line in lines)
    words = " ".join(" ".join(lines).split())
    assert "targets=q,k,v,o,gate,up,down," in words and "dropout=0.0" in words


def test_a_narrow_terminal_gets_lists(terminal) -> None:
    text = terminal(30, table)
    assert max(map(len, text.splitlines())) <= 30 and not RULES.search(text)
    assert "lora\n" in text and "  trained: 1,048,576\n" in text and text.count("options:") == 1


def test_no_table_steers_the_terminal(terminal) -> None:
    text = terminal(80, lambda: output.print_table("a\x1b[2J", ("x",), [["\x1b]0;evil\x07"]]))
    assert "\x1b" not in text and "\x07" not in text


LINES = [
    "list methods", "list tasks", "list models", "show lora", "show unilora", "show gsm8k",
    "show commonsense", "params --method lora,unilora,vera --model llama-2-7b",
    "params --method all --model roberta-base",
    "recommend --model embedded --task-like gsm8k", "check bitfit",
]  # fmt: skip


def call(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peftzoo", *shlex.split(line)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


@pytest.mark.parametrize("line", LINES)
def test_every_commands_tables(line: str, terminal, monkeypatch, capsys) -> None:
    """No rules in a pipe; at 80 columns no line is longer, and every number of the piped table is whole."""
    call(line, monkeypatch)
    piped = capsys.readouterr().out
    assert not RULES.search(piped) and "…" not in piped
    shown = terminal(80, lambda: call(line, monkeypatch))
    long = [
        text for text in shown.splitlines() if len(text) > 80 and "  " in text.strip()
    ]  # prose wraps itself
    card = line.startswith("show")  # a docstring keeps its lines
    assert card or not long, long
    numbers = set(re.findall(r"(?<![\w.,-])\d{1,3}(?:,\d{3})+(?![\w,])", piped))
    assert numbers <= set(re.findall(r"(?<![\w.,-])\d{1,3}(?:,\d{3})+(?![\w,])", shown))


def test_params_of_all_gives_every_method_its_row(run_cli) -> None:
    """One that does not fit the model says why, and the others are counted."""
    code, out, _ = run_cli("params --method all --model embedded --json")
    rows = {r["method"]: r for r in json.loads(out)}
    assert code == 0 and "nothing to train" in rows["bitfit"]["reason"] and rows["lora"]["trainable_params"]
    code, _, err = run_cli("params --method bitfit --model embedded")
    assert code == 2 and "nothing to train" in err


def test_check_ends_with_a_verdict(run_cli) -> None:
    code, out, _ = run_cli("check bitfit")
    assert code == 0 and out.splitlines()[-1].startswith("bitfit passes every check. Next: peftzoo bench")


def test_bench_ends_with_means_and_the_next_command(run_cli, tmp_path) -> None:
    line = f"bench --method none --task sst2 --limit 6 --out {tmp_path}"
    code, out, _ = run_cli(f"{line} --seeds 0")
    assert code == 0 and "mean over seeds" not in out and out.splitlines()[-1].startswith("Next: --seeds")
    code, out, _ = run_cli(f"{line} --seeds 0,1,2")
    assert code == 0 and out.splitlines()[-1] == f"Next: peftzoo board {tmp_path}"
    assert re.search(r"^none +3 +0\.\d{3} +\d\.\d{3}$", out, re.MULTILINE)
