"""Makes LoraHub's table: a library of LoRA modules, then composition against zero-shot and five-shot prompts.

    python tools/make_lorahub.py                                             # embedded model and data
    python tools/make_lorahub.py --model smollm2-135m --data FOLDER          # real ones

What is on record is not run again, so an interrupted run goes on. Writes <out>/lorahub.md and the records.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path
from statistics import fmean

from peftzoo.adapters import write_atomically
from peftzoo.errors import UserError
from peftzoo.records.schema import Record
from peftzoo.runs.plan import Plan, Request
from peftzoo.runs.run import run

LIBRARY = (
    "gsm8k", "sst2", "bbh-navigate", "bbh-multistep_arithmetic_two", "bbh-word_sorting", "bbh-dyck_languages",
    "bbh-hyperbaton", "bbh-logical_deduction_three_objects", "bbh-reasoning_about_colored_objects",
)  # fmt: skip
UNSEEN = ("boolean_expressions", "web_of_lies", "object_counting", "date_understanding", "temporal_sequences",
          "tracking_shuffled_objects_three_objects")  # fmt: skip
"""No task of these families is in the library."""
MODULE = {"r": 8, "alpha": 16.0}


def library(common: dict, out: Path, steps: int, batch: int, tasks: tuple[str, ...]) -> list[Path]:
    """Folders of one LoRA module per training task, trained where there is none."""
    found = []
    for task in tasks:
        train = {"steps": steps, "batch_size": batch}
        request = Request("lora", task, options=MODULE, train=train, **common | {"limit": 16})
        record, _, _ = run(request, out)
        folder = out / "adapters" / f"{record.id}-s0"
        if not folder.is_dir():  # records travel, adapters do not
            record, _, _ = run(request, out, force=True)
        print(f"module {task}: {score(record)}", flush=True)
        found.append(folder)
    return found


def score(record: Record) -> float:
    if record.status != "ok" or record.result is None or record.result.value is None:
        raise UserError(f"{record.name}: {record.status}, {record.reason}")
    return record.result.value


def rows(common: dict, out: Path, options: dict, seeds: int, tasks: tuple[str, ...]) -> list[tuple]:
    """(task, zero-shot, five-shot, LoraHub per seed, share of the commonest answer, rows scored)"""
    found = []
    for task in tasks:
        five = f"bbh-lorahub-{task}"
        zero, few = (run(Request("none", t, **common), out)[0] for t in (five, f"bbh-fewshot-{task}"))
        asked = [Request("lorahub", five, seed=s, options=options, **common) for s in range(seeds)]
        hub = [run(request, out)[0] for request in asked]
        answers = Plan(asked[0]).eval_sets[0].rows.test["target"]
        most = Counter(answers).most_common(1)[0][1] / len(answers)
        found.append((task, score(zero), score(few), [score(r) for r in hub], most, len(answers)))
        print(f"{task}: {found[-1][1:]}", flush=True)
    return found


def table(found: list[tuple], about: str) -> str:
    """The Markdown page."""
    head = ["task", "rows", "commonest answer", "zero-shot", "5-shot in context", "LoraHub, mean",
            "LoraHub, max", "per seed"]  # fmt: skip
    numbers = [(most, zero, few, fmean(hub), max(hub)) for _, zero, few, hub, most, _ in found]
    lines = [
        [task, str(n), *map(_number, mine), " ".join(map(_number, hub))]
        for (task, _, _, hub, _, n), mine in zip(found, numbers, strict=True)
    ]
    lines.append(["average", "", *(_number(fmean(column)) for column in zip(*numbers, strict=True)), ""])
    body = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
    return f"# LoraHub on unseen BBH tasks\n\n{about}\n\n{body}\n"


def _number(x: float) -> str:
    return f"{x:.3f}"


SMALL = """The embedded model (3 million parameters) on generated problems in BBH's wording: this shows
that the method runs from end to end and what it does to so small a model. It says nothing about BBH
itself."""
REAL = "Model {model} on real BBH rows."
ABOUT = """{what} A library of {n} LoRA modules (r 8, {steps} steps of {batch} rows each): {tasks}. No
task below is of a family in it.

LoraHub: the seed draws {size} modules, nevergrad's NGOpt asks 40 times for the loss on five examples;
inference without examples. Zero-shot and 5-shot: the same model untrained, without and with these five
examples in the prompt (a prompt longer than the model's context loses its beginning). Score: exact match
after strip, lower case and removal of full stops. The mean over seeds is the result; the maximum is a
choice on the test rows, shown because the paper shows it. Commonest answer: the share of the most
frequent right answer among the scored rows, what one fixed answer would score; a method that does not
exceed it has learnt the form of the answer and not the task.

Made by `python tools/make_lorahub.py{extra}`; records in `records/bbh`."""


def about(a: argparse.Namespace, tasks: tuple[str, ...]) -> str:
    real = a.model != "embedded"
    what = REAL.format(model=a.model) if real else SMALL
    extra = f" --model {a.model} --data FOLDER" if real else ""
    facts = {"size": a.size, "steps": a.steps, "batch": a.batch, "extra": extra}
    text = ABOUT.format(what=what, n=len(tasks), tasks=", ".join(tasks), **facts)
    fill = textwrap.TextWrapper(110, break_on_hyphens=False, break_long_words=False).fill
    return "\n\n".join(fill(" ".join(part.split())) for part in text.split("\n\n"))


def main(words: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--model", default="embedded")
    p.add_argument("--data", help="folder of a local data mirror")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--size", type=int, default=6, help="modules drawn by a seed")
    p.add_argument("--steps", type=int, default=120, help="training steps of each module")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--limit", type=int, default=60, help="rows scored")
    p.add_argument("--library", default=",".join(LIBRARY))
    p.add_argument("--unseen", default=",".join(UNSEEN))
    a = p.parse_args(words)
    os.environ.setdefault("TQDM_DISABLE", "1")
    common = {"model": a.model, "data": a.data, "limit": a.limit}
    trained, unseen = tuple(a.library.split(",")), tuple(a.unseen.split(","))
    try:
        members = library(common, a.out, a.steps, a.batch, trained)
        options = {"members": ",".join(map(str, members)), "size": a.size}
        found = rows(common, a.out, options, a.seeds, unseen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    write_atomically(a.out / "lorahub.md", table(found, about(a, trained)).encode())
    print(f"wrote {a.out / 'lorahub.md'}")


if __name__ == "__main__":
    main()
