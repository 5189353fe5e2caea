"""The command line: help, mistakes, what goes to standard output and what to standard error."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftzoo.cli import commands
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs import run
from peftzoo.runs.plan import Plan
from peftzoo.tasks import _includes, task_files


def all_commands() -> dict[str, object]:
    """Every command by what is typed for it, such as `models get`."""
    found, left = {}, dict(commands.command().commands)
    while left:
        name, command = left.popitem()
        below = {f"{name} {k}": c for k, c in getattr(command, "commands", {}).items()}
        left |= below
        found |= {} if below else {name: command}
    return dict(sorted(found.items()))


COMMANDS = all_commands()
WITH_JSON = [name for name, c in COMMANDS.items() if any("--json" in p.opts for p in c.params)]


def one_document(text: str):
    """The JSON on standard output: one document, and nothing around it."""
    document, end = json.JSONDecoder().raw_decode(text)
    assert text[end:].strip() == ""
    return document


QUICK = "--steps 2 --batch-size 2 --limit 2 --precision fp32"


# -- help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(run_cli, command: str) -> None:
    code, out, err = run_cli(f"{command} --help")
    assert code == 0 and err == ""
    last = out.rstrip().splitlines()[-1].strip()
    assert last.startswith("Example: peftzoo ") and last.split()[2] == command.split()[0]
    assert all(len(line) <= 80 for line in out.splitlines())


def joined(text: str) -> str:
    """The text without spaces and line breaks, which may be anywhere on a narrow terminal."""
    return "".join(text.split())


@pytest.mark.parametrize("columns", [80, 50])
def test_nothing_in_a_help_is_cut(run_cli, monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    overview = joined(run_cli("--help")[1])
    for name, command in COMMANDS.items():
        first = re.split(r"(?<=\.)\s", command.help)[0]
        shown = joined(run_cli(f"{name.rpartition(' ')[0]} --help")[1]) if " " in name else overview
        assert joined(name.split()[-1] + first) in shown, name
        page = joined(run_cli(f"{name} --help")[1])
        told = [command.help, *(p.help for p in command.params if getattr(p, "help", None))]
        assert [t for t in told if joined(t) not in page] == [], name


@pytest.mark.parametrize("line", ["--help", "-h", ""])
def test_the_overview_fits_a_terminal(run_cli, line: str) -> None:
    code, out, err = run_cli(line)
    assert code == 0 and err == ""
    lines = out.rstrip().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    assert all(f"  {c.split()[0]} " in out for c in COMMANDS)
    assert "peftzoo bench --method unilora --task gsm8k" in lines[-1]


def test_a_group_without_a_command_shows_its_help(run_cli) -> None:
    code, out, err = run_cli("models")
    assert code == 0 and "get" in out and err == ""


def test_the_version(run_cli) -> None:
    from peftzoo import __version__

    assert run_cli("--version") == (0, f"peftzoo {__version__}\n", "")


# -- mistakes -------------------------------------------------------------------------------------------

MISTAKES = [
    ("bench --method loraa --task sst2", '"loraa"', '"lora"'),
    ("bench --method lora,unilra --task sst2", '"unilra"', '"unilora"'),
    ("bench --method lora --task stt2", '"stt2"', '"sst2"'),
    ("bench --method lora --task sst2 --model embeded", '"embeded"', '"embedded"'),
    ("bench --method lora --task sst2 --model ./nowhere", '"./nowhere"', "config.json"),
    ("bench --method lora --task sst2 --set rr=4", '"rr"', '"r"'),
    ("bench --method lora --task sst2 --set zzz=4", '"zzz"', "it has: targets, r"),
    ("bench --method lora --task sst2 --set dropuot=0", '"dropuot"', '"dropout"'),
    ("bench --method lora --task sst2 --set r=0", "r='0'", "greater than or equal to 1"),
    ("bench --method lora --task sst2 --set r=four", "r='four'", "integer"),
    ("bench --method lora,dora --task sst2 --set dor.r=4", '"dor"', '"dora"'),
    ("profile --method lora --set dora.r=4", '"dora"', "lora"),
    ("bench --method lora --task sst2 --set r", '"r"', "KEY=VALUE"),
    ("bench --method unilora --task sst2 --set d=999999999", "d=999999999", "lower d"),
    ("bench --method lora --task sst2 --set targets=qq", "qq", "q"),
    ("bench --method bitfit --task gsm8k", "bitfit", ""),
    ("bench --method lora --task sst2 --stepz 4", "--stepz", "--steps"),
    ("bench --method lora --task sst2 --steps x", '--steps "x"', "integer"),
    ("bench --method lora --task sst2 --steps=-1", "--steps -1", "greater than or equal to 0"),
    ("bench --method lora --task sst2 --lr 0", "--lr 0", "greater than 0"),
    ("bench --method lora --task sst2 --lr inf", "--lr inf", "finite"),
    ("bench --method lora --task sst2 --schedule liner", "liner", "linear"),
    ("bench --method lora --task sst2 --warmup 1", "--warmup 1", "less than 1"),
    ("bench --method lora --task sst2 --max-length 2", "--max-length 2", "greater than or equal to 8"),
    ("bench --method lora --task sst2 --precision fp16", '"fp16"', "auto, fp32, bf16"),
    ("bench --method lora --task sst2 --seeds 1,a", '"1,a"', "0,1,2"),
    ("bench --method lora --task sst2 --seeds=-1", '"-1"', "from 0"),
    ("bench --method lora --task sst2 --limit 0", '--limit "0"', "greater than or equal to 1"),
    ("bench --method lora --task sst2 --max-new-tokens 0", '--max-new-tokens "0"', "equal to 1"),
    ("bench --method lora --task sst2 --eval-batch 0", '--eval-batch "0"', "greater than or equal to 1"),
    ("bench --method lora --task sst2 --source hbu", '"hbu"', '"hub"'),
    ("bench --method lora --task sst2 --source mirror", "mirror", "PEFTZOO_DATA"),
    ("bench --method lora --task sst2 --data ./nowhere", '"./nowhere"', "no such folder"),
    ("bench --method lora --task sst2 --track wanb", '"wanb"', '"wandb"'),
    ("bench --method lora --task sst2 --plugin nowhere.py", '"nowhere.py"', "no such file"),
    ("bench --method lora --task nowhere.yaml", '"nowhere.yaml"', "No such file"),
    ("bench --method lora --task sst2 --out /dev/null/x", "/dev/null/x", "Not a directory"),
    ("bench --method lora --task sst2 --epochs 1 --batch-size 0", "--batch-size 0", "greater than"),
    ("bench --method lora --task sst2 --epochs 0", "--epochs 0", "above 0"),
    ("bench --method lora --task sst2 --epochs 1 --steps 2", "--steps 2", "keep one of them"),
    ("board . --out /dev/null/x", "/dev/null/x", "Not a directory"),
    ("board . --html /dev/null/x", "--html", "Not a directory"),
    ("bench --method , --task sst2", "--method", "all"),
    ("bench --method lora", "--task", "peftzoo bench --help"),
    ("bench lora --method lora --task sst2", "lora", "peftzoo bench --help"),
    ("benhc", "'benhc'", "'bench'"),
    ("list metods", '"metods"', '"methods"'),
    ("show loraa", '"loraa"', '"lora"'),
    ("check loraa", '"loraa"', '"lora"'),
    ("params --method loraa", '"loraa"', '"lora"'),
    ("params --method lora --model lama-2-7b", '"lama-2-7b"', '"llama-2-7b"'),
    ("params --method lora --set q=1", '"q"', "targets"),
    ("profile --method lora --against peeft", '"peeft"', '"peft"'),
    ("profile --method loraa", '"loraa"', '"lora"'),
    ("board ./nowhere", '"nowhere"', "no such folder"),
    ("new-method Bad_Name", '"Bad_Name"', "a-z"),
    ("models get minilmm", '"minilmm"', '"minilm"'),
]


@pytest.mark.parametrize(("line", "value", "way"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_that_names_it_and_the_way_out(
    run_cli, tmp_path, monkeypatch, line, value, way
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PEFTZOO_DATA", raising=False)
    code, out, err = run_cli(line)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert value in err and way in err and "Traceback" not in err
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "a mistake leaves files"


def test_an_empty_results_folder_says_how_to_fill_it(run_cli, tmp_path) -> None:
    code, out, err = run_cli(f"board {tmp_path}")
    assert (code, out) == (2, "") and "peftzoo bench" in err and err.count("\n") == 1


@pytest.mark.parametrize("line", ["bench --method lroa --task sst2", "benhc"])
def test_mistakes_in_a_process_of_its_own(line: str) -> None:
    done = subprocess.run([sys.executable, "-m", "peftzoo", *line.split()], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_is_a_json_document_too(run_cli, tmp_path, monkeypatch, command: str) -> None:
    """Of the parser and of the command itself, for every command: all have --json."""
    assert [*COMMANDS] == WITH_JSON
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(f"{command} --jsno --json")
    assert code == 2 and err == f"error: {one_document(out)['error']}\n" and "--jsno" in err
    lines = {
        "bench": "--method lroa --task sst2", "board": "./no", "check": "lroa",
        "export": "no --to lroa --out x", "generate": "--method lroa --tasks sst2",
        "import": "no --out x --model lroa", "list": "lroa", "models get": "lroa", "new-method": "A",
        "params": "--method lora,dora --model lroa", "power": "--difference 2", "profile": "--method lroa",
        "recommend": "--model lroa --task-like x --results no", "show": "lroa", "sweep": "no.yaml",
        "tune": "--method lroa --task sst2", "verify": "lroa", "doctor": "--no-such-option",
    }  # fmt: skip
    code, out, err = run_cli(f"{command} {lines[command]} --json")
    assert code == 2 and err == f"error: {one_document(out)['error']}\n"


# -- what goes where ------------------------------------------------------------------------------------


def test_bench_gives_one_json_document_and_progress_apart(run_cli, tmp_path) -> None:
    code, out, err = run_cli(f"bench --method lora,none --task sst2 {QUICK} --out {tmp_path} --json")
    assert code == 0, err
    records = one_document(out)
    for record, method in zip(records, ("lora", "none"), strict=True):
        assert record["name"] == f"{method}/sst2/embedded/s0" and record["status"] == "ok"
        assert (record["method"], record["task"], record["seed"]) == (method, "sst2", 0)
        Record.model_validate(record)
        file = next(tmp_path.rglob(f"{record['id']}-s0.json"))
        assert json.loads(file.read_text()) == record, "the document differs from the record on disk"
    assert records[0]["trainable_params"] > 0 == records[1]["trainable_params"]
    assert records[0]["examples"]["sha256"] and records[0]["merged_score"] and not records[1]["merged_score"]
    assert "lora on sst2, seed 0" in err


def test_a_record_is_not_made_twice_unless_forced(run_cli, tmp_path, monkeypatch) -> None:
    line = f"bench --method lora --task sst2 {QUICK} --out {tmp_path}"
    assert run_cli(line)[0] == 0
    (file,) = (tmp_path / "records").rglob("*.json")
    before = file.stat().st_mtime_ns
    with monkeypatch.context() as patched:  # attaching would import the code of the model, for nothing
        patched.setattr(Plan, "attach_to_shapes", lambda _: pytest.fail("attached"))
        code, out, err = run_cli(line)
    assert code == 0 and "on record" in err and file.stat().st_mtime_ns == before
    assert run_cli(f"{line} --force")[0] == 0 and file.stat().st_mtime_ns != before
    assert "acc" in out and str(file) in out, "the table of a run that is on record is not shown"
    (adapter,) = (tmp_path / "adapters").iterdir()
    assert {p.name for p in adapter.iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_seeds_share_their_id_and_settings_do_not(run_cli, tmp_path) -> None:
    run_cli(f"bench --method none --task sst2 --limit 2 --precision fp32 --seeds 0,1 --out {tmp_path}")
    run_cli(f"bench --method none --task sst2 --limit 3 --precision fp32 --out {tmp_path}")
    names = sorted(p.name for p in (tmp_path / "records").rglob("*.json"))
    assert len(names) == 3 and len({n.split("-")[0] for n in names}) == 2


@pytest.mark.parametrize(
    "line",
    ["list methods", "list tasks", "list models", "show lora", "show sst2", "params --method lora,ia3",
     "doctor", "models get embedded", "board {results}", "new-method my-method --out {tmp}"],
)  # fmt: skip
def test_every_command_gives_json(run_cli, tmp_path, line: str) -> None:
    from tests.records.test_store import make

    store.write(tmp_path / "results", make())
    code, out, err = run_cli(line.format(results=tmp_path / "results", tmp=tmp_path) + " --json")
    assert code == 0 and err == "", err
    document = one_document(out)
    assert document


@pytest.mark.slow
def test_profile_and_check_give_json(run_cli) -> None:
    code, out, _ = run_cli(
        "profile --method lora --rounds 1 --batch-size 1 --length 4 --model embedded --json"
    )
    (row,) = one_document(out)
    assert code == 0 and row["floor_ratio"] > 0 and "peft_floor_ratio" in row
    assert {"name", "status", "trainable_params"} <= row.keys()
    code, out, _ = run_cli("check lora --json")
    assert code == 0 and {r["status"] for r in one_document(out)} <= {"ok", "skipped", "known"}


@pytest.mark.slow
def test_counting_a_large_model_is_exact_and_quick() -> None:
    line = "params --method unilora --model llama-2-7b --set d=524288"
    began = os.times()
    done = subprocess.run([sys.executable, "-m", "peftzoo", *line.split()], capture_output=True, text=True)
    used = os.times()
    assert done.returncode == 0 and "524,288" in done.stdout, done.stderr
    spent = used.children_user + used.children_system - began.children_user - began.children_system
    assert spent < 15, f"{spent:.1f} s of process time"


def test_counts_as_json(run_cli) -> None:
    (row,) = one_document(run_cli("params --method unilora --model llama-2-7b --set d=524288 --json")[1])
    assert row["trainable_params"] == 524288 and row["method"] == "unilora" and row["base_params"] > 6e9


def test_doctor_shows_what_a_report_needs(run_cli) -> None:
    code, out, _ = run_cli("doctor")
    assert code == 0
    for word in ("device", "threads", "torch", "transformers", "Hub", "PEFTZOO_DATA"):
        assert word in out


def test_lists_name_everything(run_cli) -> None:
    from peftzoo.contract import registry

    assert all(re.search(rf"\b{re.escape(n)}\b", run_cli("list methods")[1]) for n in registry.methods())
    shown = run_cli("list tasks")[1]
    assert all(n in shown for n in task_files.tasks())


def test_a_list_of_tasks_says_where_their_rows_may_come_from(run_cli, tmp_path, monkeypatch) -> None:
    (tmp_path / "openai__gsm8k" / "main").mkdir(parents=True)
    (tmp_path / "openai__gsm8k" / "main" / "test.jsonl").write_text("{}")
    monkeypatch.setenv("PEFTZOO_DATA", str(tmp_path))
    found = {row["name"]: row for row in one_document(run_cli("list tasks --json")[1])}
    assert found["gsm8k"]["sources"] == ["embedded", "mirror", "hub"] and found["gsm8k"]["suite"] == "gsm8k"
    assert found["sst2"]["sources"] == ["embedded", "hub"] and found["math"]["sources"] == ["embedded", "hub"]
    assert found["bbh-causal_judgement"]["sources"] == ["hub"]
    line = next(x for x in run_cli("list tasks")[1].splitlines() if x.startswith("sst2 "))
    assert re.search(r"sst2 +acc +last-step.* 300 *$", line), line
    line = next(x for x in run_cli("list tasks")[1].splitlines() if x.startswith("gsm8k "))
    assert re.search(r"gsm8k +exact_match,strict +gsm8k-train +200 +yes *$", line), line


def test_a_bad_record_is_named_and_skipped(run_cli, tmp_path) -> None:
    from tests.records.test_store import make

    store.write(tmp_path, make())
    (tmp_path / "records" / "broken.json").write_text('{"a": NaN')
    code, out, err = run_cli(f"board {tmp_path}")
    assert code == 0 and "lora" in out and "skipped" in err and "broken.json" in err
    code, out, err = run_cli(f"board {tmp_path} --out {tmp_path / 'site'}")
    assert code == 0 and "| lora |" in (tmp_path / "site" / "board.md").read_text()


# -- how a run may end ----------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_record_and_exit_code_130(run_cli, tmp_path, monkeypatch) -> None:
    def stop(self, step, *_) -> None:
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Runner, "on_step", stop)
    code, out, err = run_cli(f"bench --method lora --task sst2 {QUICK} --out {tmp_path} --json")
    assert code == 130 and one_document(out)["error"].startswith("interrupted")
    assert err.splitlines()[-1].startswith("error: interrupted")
    (file,) = tmp_path.rglob("*-s0.json")
    assert file.relative_to(tmp_path).parts[0] == "cancelled"
    record = store.read(file)
    assert record.status == "cancelled" and "interrupted" in record.reason and record.score is None
    monkeypatch.undo()


def test_a_run_that_breaks_down_is_recorded_and_the_next_one_runs(run_cli, tmp_path, monkeypatch) -> None:
    whole = run.Runner.execute

    def do(self, fresh):
        if self.plan.request.method == "lora":
            raise OSError(f"cannot map {tmp_path}/secret/file.bin of 'x'")
        return whole(self, fresh)

    monkeypatch.setattr(run.Runner, "execute", do)
    code, out, _ = run_cli(f"bench --method lora,none --task sst2 {QUICK} --out {tmp_path} --json")
    failed, good = one_document(out)
    assert code == 1 and failed["status"] == "failed" and good["status"] == "ok"
    assert failed["reason"].startswith("OSError: cannot map file.bin") and "test_cli.py:" in failed["reason"]
    assert str(tmp_path) not in json.dumps(failed)
    assert [p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob(f"{failed['id']}-s0.json")] == ["failed"]


def test_a_loss_that_explodes_is_a_failed_record(run_cli, tmp_path) -> None:
    code, out, _ = run_cli(
        f"bench --method lora --task sst2 {QUICK} --lr 1e30 --warmup 0 --out {tmp_path} --json"
    )
    (record,) = one_document(out)
    assert (
        code == 1
        and record["status"] == "failed"
        and re.search(r"(loss|norm) is \S+ at step", record["reason"])
    )
    assert record["score"] is None


def test_a_run_that_was_killed_goes_on(run_cli, tmp_path, monkeypatch) -> None:
    """The second run picks up the checkpoint and gives the record of a run that was never stopped."""
    from peftzoo.training import loop

    line = f"bench --method lora --task sst2 {QUICK} --set dropout=0.2 --json".replace(
        "--steps 2", "--steps 6"
    )
    whole = one_document(run_cli(f"{line} --out {tmp_path / 'a'}")[1])[0]
    start = loop.Loop.__init__

    def often(self, *args, **kwargs) -> None:
        start(self, *args, **kwargs)
        self.save_every = 2

    monkeypatch.setattr(loop.Loop, "__init__", often)
    with monkeypatch.context() as inner:
        inner.setattr(
            run.Runner, "on_step", lambda self, step, *_: exec("raise SystemExit(9)") if step == 5 else None
        )
        assert run_cli(f"{line} --out {tmp_path / 'b'}")[0] == 9
    assert [*(tmp_path / "b").rglob("*.safetensors")], "no checkpoint"
    again = one_document(run_cli(f"{line} --out {tmp_path / 'b'}")[1])[0]
    assert again["resumed_at"] == 4 and again["id"] == whole["id"]
    assert (again["final_loss"], again["score"]["value"]) == (whole["final_loss"], whole["score"]["value"])
    assert not [*(tmp_path / "b" / "checkpoints").iterdir()], "the checkpoint stays for good"


# -- nothing of this machine in a record ----------------------------------------------------------------

PLUGIN = """
from peftzoo.methods.none import *
from peftzoo.methods import none as base


class Mine(next(c for c in vars(base).values() if getattr(c, "name", "") == "none")):
    name = "mine"
"""


def test_a_record_names_no_place(run_cli, tmp_path, monkeypatch) -> None:
    """Model folder, mirror, plugin and task file are named without their folders, and the command says so."""
    from peftzoo.models import catalogue
    from tests.tasks.test_sources import mirror

    secret = tmp_path / "very-secret"
    secret.mkdir()
    (secret / "plug.py").write_text(PLUGIN)
    (secret / "mine.yaml").write_text(
        json.dumps(_includes.read(next(task_files.folder().rglob("sst2.yaml"))))
    )
    os.symlink(catalogue.EMBEDDED, secret / "weights")
    mirror(secret, "sst2")
    line = (
        f"bench --method mine --task {secret / 'mine.yaml'} --plugin {secret / 'plug.py'} --limit 2 "
        f"--model {secret / 'weights'} --data {secret} --precision fp32 --out {tmp_path / 'out'} --json"
    )
    code, out, err = run_cli(line)
    assert code == 0, err
    (record,) = one_document(out)
    text = json.dumps(record)
    assert "very-secret" not in text and str(tmp_path) not in text and str(Path.home()) not in text
    command = record["command"]
    assert "--task mine.yaml" in command and "--plugin plug.py" in command and "--model FOLDER" in command
    assert "--source mirror --data FOLDER" in command
    assert record["data"]["source"] == "mirror"


def test_the_recorded_command_repeats_the_run(run_cli, tmp_path) -> None:
    line = f"bench --method lora --task sst2 {QUICK} --set r=2 --set targets=q,v --lr 0.002 --seeds 3"
    line += " --schedule cosine"
    (one,) = one_document(run_cli(f"{line} --out {tmp_path / 'a'} --json")[1])
    assert one["command"].startswith("peftzoo ")
    (two,) = one_document(
        run_cli(f"{one['command'].removeprefix('peftzoo ')} --out {tmp_path / 'b'} --json")[1]
    )
    for key in ("id", "seed", "final_loss", "method_config", "train_config"):
        assert one[key] == two[key], key
    assert one["score"]["value"] == two["score"]["value"]


@pytest.mark.slow
def test_other_libraries_stay_quiet(tmp_path) -> None:
    """In a process of its own, where every warning and bar of every library would show."""
    line = f"bench --method lora --task sst2 {QUICK} --out {tmp_path} --json"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "peftzoo", *shlex.split(line)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one_document(done.stdout)
    assert re.fullmatch(r"(lora on sst2, seed 0: [^\n]*\n){4}", done.stderr), done.stderr
    assert time.perf_counter() - began < 120


def test_the_package_imports_quickly_and_light() -> None:
    code = "import sys, peftzoo, peftzoo.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lm_eval", "wandb", "datasets"} & set(done.stdout.split())
    assert importlib.import_module("peftzoo").__version__


def test_an_option_for_one_of_several_methods(run_cli) -> None:
    line = "params --method lora,dora,hf:lora --set r=4 --set dora.r=2 --set hf:lora.r=3 --json"
    rows = one_document(run_cli(line)[1])
    assert [r["config"]["r"] for r in rows] == [4, 2, 3]


def test_commands_that_read_say_which_records(run_cli, tmp_path, monkeypatch) -> None:
    """`runs` of the current folder first, else the published records; nothing is said of a named folder."""
    from tests.records.test_store import make

    monkeypatch.chdir(tmp_path)
    for line in ("board --json", "recommend --model embedded --task-like gsm8k --json"):
        code, _, err = run_cli(line)
        assert code == 0 and re.match(r"reading the published records: [\d,]+ in .*results\n", err), err
    store.write(tmp_path / "runs", make())
    code, out, err = run_cli("board --json")
    assert code == 0 and len(json.loads(out)) == 1
    assert "reading the records in runs: 1 (the published ones are in " in err
    code, _, err = run_cli(f"board {tmp_path / 'runs'} --json")
    assert code == 0 and "reading" not in err
    code, _, err = run_cli("board no-such-folder")
    assert code == 2 and "no-such-folder" in err and err.count("\n") == 1


def test_runs_are_written_to_runs(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, _ = run_cli("bench --method none --task sst2 --limit 2 --json")
    assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_missing_extra_is_said_before_the_first_run(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = run_cli(f"bench --method none,hf:lora --task sst2 --limit 2 --out {tmp_path}")
    assert code == 2 and 'pip install "peftzoo[peft]"' in err.splitlines()[-1], err
    assert not list(tmp_path.rglob("*.json")), "a run was done before the mistake was told"
