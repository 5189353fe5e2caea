"""What commands print: lines in a pipe, whole numbers at 80 columns, lists on a narrow terminal."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys

import pytest

from peftzoo import cli
from peftzoo.cli import _run_tables, commands, output
from peftzoo.records import store
from tests.boards.test_tables import make

pytestmark = pytest.mark.usefixtures("checks_run_once")
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


BENCH = "peftzoo bench --method bitfit --task gsm8k"
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
    assert code == 0 and out.splitlines()[-2:] == ["bitfit passes every check.", f"Next: {BENCH}"]


def test_bench_ends_with_means_and_the_next_command(run_cli, tmp_path) -> None:
    line = f"bench --method none --task sst2 --limit 6 --out {tmp_path}"
    code, out, _ = run_cli(f"{line} --seeds 0")
    assert code == 0 and "mean over seeds" not in out and out.splitlines()[-1].startswith("Next: --seeds")
    code, out, _ = run_cli(f"{line} --seeds 0,1,2")
    assert code == 0 and out.splitlines()[-1] == f"Next: peftzoo board {tmp_path}"
    assert re.search(r"^none +3 +0\.\d{3} +\d\.\d{3}$", out, re.MULTILINE)


def leaf_commands() -> list[list[str]]:
    """The words of every command of the program."""
    found, groups = [], [([], commands.command())]
    while groups:
        words, group = groups.pop()
        for name, child in group.commands.items():
            (groups if hasattr(child, "commands") else found).append(
                ([*words, name], child) if hasattr(child, "commands") else [*words, name]
            )
    return found


@pytest.mark.parametrize("words", leaf_commands(), ids="-".join)
def test_quiet_and_json_hold_everywhere(words: list[str], run_cli) -> None:
    code, out, _ = run_cli(" ".join([*words, "--help"]))
    assert code == 0 and {"--json", "--quiet"} <= set(re.findall(r"--[a-z]+", out))


@pytest.mark.parametrize(
    "line",
    [
        *(line for line in LINES if " all " not in line),
        "board RUNS --out OUT",
        "doctor",
        "verify RUNS-FILE --no-run",
    ],
)
def test_quiet_prints_results_only(line: str, run_cli, tmp_path) -> None:
    """Nothing on standard error, and no next step; the rest as without it."""
    if "RUNS" in line:
        file = store.write(tmp_path / "runs", make("lora"), [{"row": i, "acc": i % 2} for i in range(10)])
        line = line.replace("RUNS-FILE", str(file)).replace("RUNS", str(tmp_path / "runs"))
        line = line.replace("OUT", str(tmp_path / "board"))
    code, loud, _ = run_cli(line)
    assert code == 0 and loud.splitlines()[-1].startswith("Next: ")
    code, silent, err = run_cli(f"{line} --quiet")
    assert code == 0 and err == "" and silent.splitlines() == loud.splitlines()[:-1]
    code, again, _ = run_cli(line)  # it holds for one command
    assert again == loud


def test_errors_are_printed_all_the_same(run_cli) -> None:
    code, _, err = run_cli("show no-such-method --quiet")
    assert code == 2 and "no-such-method" in err


def test_quiet_runs_show_no_progress(run_cli, tmp_path) -> None:
    line = f"bench --method none --task sst2 --limit 6 --seeds 0,1 --out {tmp_path}"
    code, out, err = run_cli(f"{line} --quiet")
    assert code == 0 and err == "" and "none" in out and "Next" not in out


def test_the_untrained_model_stands_beside_the_means(tmp_path, capsys) -> None:
    """Where a comparable run of it is on record."""

    output.set_quiet(False)

    def shown(rows: int, seeds: int = 2) -> str:
        data = {"source": "embedded", "id": "sst2", "scored_rows": rows, "files": {"train": {"sha256": "b"}}}
        runs = [make("lora", s, 0.5, data=data) for s in range(seeds)]
        _run_tables.print_results([(r, store.path(tmp_path, r), True) for r in runs], False, {})
        return capsys.readouterr().out

    assert "untrained model" not in shown(10)
    store.write(tmp_path, make("none", 0, 0.25, train={"steps": 0}, trainable_params=0))
    assert re.search(r"^untrained model +1 +0\.250 +on record$", shown(10), re.MULTILINE)
    assert "untrained model, on record: acc 0.250" in shown(10, seeds=1)
    assert "untrained model" not in shown(11), "other rows"


def test_no_color(terminal, monkeypatch) -> None:
    """On a terminal that has colours, NO_COLOR keeps them out."""
    with_colour = terminal(80, lambda: monkeypatch.setenv("TERM", "xterm-256color") or table())
    assert not re.search(r"\x1b\[\d*(;\d+)*3\dm", with_colour)
