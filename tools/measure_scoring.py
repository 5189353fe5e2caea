"""Times of scoring: against a bare `model.generate` over the same batches, and against lm-eval's own loop.

Makes `results/scoring.md`: python tools/measure_scoring.py --data FOLDER [--model smollm2-135m] [--rows 64]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftzoo import models
from peftzoo.scoring import evaluation
from peftzoo.scoring.language_model import LanguageModel
from peftzoo.tasks import sources, task_files

BATCH, NEW_TOKENS, ROUNDS = 16, 128, 3


def requests(name: str, mirror: Path, rows: int) -> list[Any]:
    """lm-eval's requests for the first rows of a task."""
    task = task_files.get(name)
    found = sources.load(task, "mirror", mirror, trains=False)
    found.test = found.test.select(range(rows))
    lm_task = evaluation.harness_task(task, found, NEW_TOKENS)
    lm_task.build_all_requests(limit=None, rank=0, world_size=1)
    return lm_task.instances


@torch.inference_mode()
def bare(loaded: models.Loaded, asked: list[Any]) -> None:
    """`model.generate` over the prompts in batches of like length, as long as asked for, nothing else."""
    tokenizer = loaded.tokenizer
    prompts = sorted((tokenizer.encode(r.args[0]) for r in asked), key=len, reverse=True)
    lm = LanguageModel(loaded.model, tokenizer, BATCH, None)
    for start in range(0, len(prompts), BATCH):
        rows = prompts[start : start + BATCH]
        ids, mask = (
            lm._left_padded(rows, tokenizer.pad_token_id),
            lm._left_padded([[1] * len(row) for row in rows]),
        )
        loaded.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip


def in_turn(**contenders: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, work in contenders.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


def generation(loaded: models.Loaded, asked: list[Any]) -> dict[str, float]:
    """Ours twice: as it is, and with a stop string that no answer holds: every row is as long as bare's."""
    endless = [_without_stops(r) for r in asked]
    lm, long = (LanguageModel(loaded.model, loaded.tokenizer, BATCH, None) for _ in range(2))
    long._end_tokens = set()
    return in_turn(
        bare=lambda: bare(loaded, asked),
        whole=lambda: long.generate_until(endless),
        ours=lambda: lm.generate_until(asked),
    )


def _without_stops(request: Any) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(args=(request.args[0], {**request.args[1], "until": ["\u241e\u241f\u241e"]}))


def choices(loaded: models.Loaded, asked: list[Any]) -> tuple[dict[str, float], float]:
    """Seconds of both loops, and the largest difference between their log-likelihoods."""
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=BATCH, backend="causal")
    ours = LanguageModel(loaded.model, loaded.tokenizer, BATCH, None)
    a, b = theirs.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked)
    apart = max(abs(x - y) for (x, _), (y, _) in zip(a, b, strict=True))
    return in_turn(
        theirs=lambda: theirs.loglikelihood(asked, disable_tqdm=True), ours=lambda: ours.loglikelihood(asked)
    ), apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--part", choices=("generation", "choices"), action="append")
    given = parser.parse_args()
    loaded, out = models.load(given.model), Path("results/scoring.md")
    loaded.model.eval()
    parts = {"generation": generation_part, "choices": choices_part}
    for name in given.part or parts:
        about = (
            f"{given.model}, {given.rows} rows, fp32, batches of {BATCH}, {torch.get_num_threads()} threads "
            f"of a CPU, median of {ROUNDS} rounds in which the contenders take turns: `python tools/"
            f"measure_scoring.py --data FOLDER --model {given.model} --rows {given.rows} --part {name}`."
        )
        table = ["| work | seconds | ratio |", "|---|---:|---:|"]
        table += parts[name](loaded, given.data, given.rows)
        replace(out, f"## {name.capitalize()}", "\n".join([about, "", *table]))
    print(out.read_text())


def generation_part(loaded: models.Loaded, mirror: Path, rows: int) -> list[str]:
    found = generation(loaded, requests("gsm8k", mirror, rows))
    base = found["bare"]
    return [
        f"| gsm8k, bare `model.generate`, {NEW_TOKENS} new tokens in every row | {base:.1f} | 1.00 |",
        f"| ours, as many tokens | {found['whole']:.1f} | {found['whole'] / base:.2f} |",
        f"| ours, to the stop string | {found['ours']:.1f} | {found['ours'] / base:.2f} |",
    ]


def choices_part(loaded: models.Loaded, mirror: Path, rows: int) -> list[str]:
    lines = []
    for name in ("hellaswag", "piqa", "boolq", "arc_easy"):
        seconds, apart = choices(loaded, requests(name, mirror, rows))
        lines += [
            f"| {name}, lm-eval's own loop | {seconds['theirs']:.1f} | 1.00 |",
            f"| ours; log-likelihoods differ by {apart:.0e} at most | {seconds['ours']:.1f} | "
            f"{seconds['ours'] / seconds['theirs']:.2f} |",
        ]
    return lines


def replace(page: Path, heading: str, text: str) -> None:
    """Put a section into the page in the place of the one with the same heading."""
    whole = page.read_text() if page.is_file() else "# What scoring costs\n"
    first, *sections = whole.split("\n## ")
    kept = {s.partition("\n")[0]: s.partition("\n")[2].strip() for s in sections}
    kept[heading.removeprefix("## ")] = text
    page.write_text(first.rstrip() + "\n" + "".join(f"\n## {k}\n\n{v}\n" for k, v in kept.items()))


if __name__ == "__main__":
    main()
