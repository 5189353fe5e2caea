"""What each command with a table prints, in a pipe and on a terminal of 80 columns, as stored text.

`python -m tests.cli.test_screens` writes the stored texts anew; read the difference before it is committed.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from peftzoo import cli
from peftzoo.cli import _run_tables, generate, output, profile, tune
from peftzoo.records import store
from tests.boards.test_tables import make

pytestmark = pytest.mark.usefixtures("checks_run_once")
SCREENS = Path(__file__).resolve().parent.parent / "fixtures" / "screens"

SWEEP = """
methods: lora, vera
tasks: gsm8k
seeds: [0, 1]
set: {lora.r: [4, 8]}
"""


def runs() -> list:
    """Runs with everything that a table of runs can show."""
    kept = {"task": "stsb", "base_loss": 3.0, "loss": 3.125, "tokens": 100}
    several = [
        make("lora", s, 0.5 + s / 10, options={"r": r}, id=f"{r:012x}") for r in (4, 8) for s in (0, 1)
    ]
    several += [
        make("unilora", s, 0.7, retention=kept, sparsity={"pruned": 0.5, "merged": 0.25}, id="a" * 12,
             prune="wanda:0.5", packed={"runs": 2, "step_ms": 41.5}, step_time={}) for s in (0, 1)
    ]  # fmt: skip
    bare = {"train": {"steps": 0}, "trainable_params": 0, "step_time": {}, "memory": {}}
    return [*several, make("none", 0, 0.25, id="b" * 12, **bare)]


def members() -> list:
    """A run on a group of tasks that one model was trained on."""
    others = {"a/acc": 0.5, "a/acc_norm": 0.6, "b/acc": 0.75, "b/acc_norm": 0.8}
    score = {"metric": "mean", "value": 0.625, "rows": 10, "others": others}
    return [make("lora", 0, task="commonsense", score=score)]


def early_stopped() -> list:
    """Runs with held-out rows: one that stopped early, and one whose loss on them rose."""
    chosen = {"by": "held-out loss", "step": 40, "stopped": 60, "scores": {"40": 0.5}}
    losses = {"rows": 9, "early_stop": 4, "start_loss": 2.0, "loss": 0.5}
    speed = {"tokens_per_second": 4321.0, "latency": {"token_ms": 1.5}}
    return [
        make("lora", 0, validation=losses, chosen=chosen, **speed),
        make("unilora", 0, 0.25, validation=losses | {"loss": 2.25}, **speed),
    ]


def print_runs() -> None:
    for records, groups in ((runs(), {"glue": ("sst2",)}), (members(), {}), (early_stopped(), {})):
        results = [(r, Path("runs/records/x.json"), True) for r in records]
        _run_tables.print_results(results, False, groups)


def print_profile() -> None:
    row = {"name": "lora", "trainable_params": 184320, "step_ms": 91.25, "floor_ratio": 1.1,
           "saved_mib": 41.0, "floor_saved_mib": 40.0, "reason": None, "peft_floor_ratio": 1.22,
           "peft_saved_mib": 55.0}  # fmt: skip
    failed = dict.fromkeys(row) | {"name": "adalora", "reason": "no such layer in this model"}
    profile._print_rows([row, failed], "peft")


def print_generate() -> None:
    score = {"value": 0.5, "stderr": 0.03, "row_ms": 12.5}
    task = {"task": "gsm8k", "seen": True, "metric": "exact_match", "rows": 200, "bare": score, "told": score,
            "written": score, "prompt_tokens": {"told": 211, "bare": 60},
            "first_token_ms": {"told": 30.5, "bare": 9.5}, "written_ms": 180.0}  # fmt: skip
    output.print_table("lora-gen on embedded", generate.COLUMNS, [generate._row(task)],
                       right=generate.COLUMNS[3:], optional=generate.OPTIONAL)  # fmt: skip


def print_tune() -> None:
    facts = {"budget": {"points": 7}, "used": {"trials": 23}, "start_loss": 1.25, "loss": 0.4375}
    records = [
        make(method, s, value + s / 10, train={"lr": lr}, id=f"{i:012x}",
             tuning=facts | {"default": {"lr": 0.003}, "chosen": {"lr": lr}, "breakdowns": broken})
        for i, (method, lr, value, broken) in enumerate([("lora", 0.009487, 0.5, 0), ("dora", 0.003, 0.4, 2)])
        for s in (0, 1, 2)
    ]  # fmt: skip
    tune.print_tuned(records, Path("runs"))


def print_verify() -> None:
    file = sorted(Path("runs/records").rglob("*.json"))[0]
    command(f"verify {file} --no-run")()


def command(line: str) -> Callable[[], None]:
    def call() -> None:
        sys.argv = ["peftzoo", *shlex.split(line)]
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, line

    return call


def cut(*names: str) -> Callable[[str], str]:
    """Leaves the title, the heading and the rows that begin with these names; new methods change nothing."""

    def keep(text: str) -> str:
        kept = (*names, "name", "method", "check", "Next:")
        lines = [n for n in text.splitlines() if n.strip().split(" ")[0] in kept]
        return "\n".join(lines) + "\n"

    return keep


def whole(text: str) -> str:
    return text


def no_digests(text: str) -> str:
    """Digests as so many `h`: they change with every field that a record gets."""
    return re.sub(r"[0-9a-f]{20,}", lambda found: "h" * len(found[0]), text)


SCREENS_OF: dict[str, tuple[Callable[[], None], Callable[[str], str]]] = {
    "bench": (print_runs, whole),
    "sweep": (command("sweep sweep.yaml --dry-run --out empty"), whole),
    "tune": (print_tune, whole),
    "generate": (print_generate, whole),
    "profile": (print_profile, whole),
    "recommend": (
        command("recommend --model embedded --task-like sst2 --results runs"),
        cut("rank", "lora", "unilora", "none", "Not"),
    ),
    "power": (command("power --seed-deviation 0.011 --rows 872 --difference 0.04"), whole),
    "verify": (print_verify, no_digests),
    "list-methods": (command("list methods"), cut("lora", "ia3", "unilora")),
    "list-tasks": (command("list tasks"), cut("gsm8k", "sst2", "stsb")),
    "list-models": (command("list models"), cut("embedded", "llama-2-7b")),
    "show-method": (command("show ia3"), whole),
    "show-task": (command("show gsm8k"), whole),
    "show-group": (command("show math"), whole),
    "params": (command("params --method lora,unilora,bitfit --model llama-2-7b"), whole),
    "check": (command("check bitfit"), cut("check_card", "check_trainable", "check_learns")),
}
"""Command -> (what prints, what of it is stored). `doctor` says what a machine has: see below."""


def written(folder: Path) -> None:
    """The files that the commands read."""
    (folder / "sweep.yaml").write_text(SWEEP)
    for record in runs():
        store.write(folder / "runs", record, [{"row": i, "acc": int(i % 2)} for i in range(10)])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(name: str, folder: Path, columns: int | None) -> str:
    """What is printed on a terminal of so many columns, or in a pipe."""
    prints, keep = SCREENS_OF[name]
    out, here, argv, saved = Terminal() if columns else io.StringIO(), Path.cwd(), sys.argv, dict(os.environ)
    os.environ |= {"COLUMNS": str(columns or 200), "TERM": "dumb", "NO_COLOR": "1"}
    os.chdir(folder)
    output.set_quiet(False)
    try:
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            prints()
    finally:
        os.chdir(here)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(saved)
    return keep("\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("screens")
    written(made)
    return made


@pytest.mark.parametrize("columns", [None, 80], ids=["pipe", "80"])
@pytest.mark.parametrize("name", SCREENS_OF)
def test_screen(name: str, columns: int | None, folder: Path) -> None:
    stored = (SCREENS / f"{name}.{columns or 'pipe'}.txt").read_text()
    assert screen(name, folder, columns) == stored, "python -m tests.cli.test_screens writes the new one"
    if columns:
        card = name == "show-method"  # a docstring keeps its lines
        assert card or all(len(line) <= columns for line in stored.splitlines() if "   " in line)


def test_every_command_that_prints_a_table_has_a_screen() -> None:
    sources = {p.stem: p.read_text() for p in Path(cli.__file__).parent.glob("*.py")}
    with_table = {name.strip("_") for name, text in sources.items() if "output.print_table" in text}
    stored = {name.partition("-")[0] for name in SCREENS_OF}
    assert with_table - {"run_tables"} == stored - {"bench", "sweep"} | {"doctor", "sweep"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        written(Path(temporary))
        for each in SCREENS_OF:
            for width in (None, 80):
                (SCREENS / f"{each}.{width or 'pipe'}.txt").write_text(screen(each, Path(temporary), width))
