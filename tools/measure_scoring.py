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

from peftzoo import data, evaluate, models, suite
from peftzoo.lm import LanguageModel

BATCH, NEW_TOKENS, ROUNDS = 16, 128, 3


def requests(name: str, mirror: Path, rows: int) -> list[Any]:
    """lm-eval's requests for the first rows of a task."""
    task = suite.get(name)
    found = data.load(task, "mirror", mirror, trains=False)
    found.test = found.test.select(range(rows))
    lm_task = evaluate.harness_task(task, found, NEW_TOKENS)
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
        ids, mask = lm._padded(rows, tokenizer.pad_token_id), lm._padded([[1] * len(row) for row in rows])
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
    long._ends = set()
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
    given = parser.parse_args()
    loaded = models.load(given.model)
    loaded.model.eval()
    found = generation(loaded, requests("gsm8k", given.data, given.rows))
    threads, turns = torch.get_num_threads(), f"median of {ROUNDS} rounds in which the contenders take turns"
    base = found["bare"]
    lines = [
        "# What scoring costs",
        "",
        f"{given.model}, {given.rows} rows, fp32, batches of {BATCH}, {threads} thread(s) of a CPU, {turns}.",
        f"Made by `python tools/measure_scoring.py --data FOLDER --model {given.model} --rows {given.rows}`.",
        "",
        "| work | seconds | ratio |",
        "|---|---:|---:|",
        f"| gsm8k, bare `model.generate`, {NEW_TOKENS} new tokens in every row | {base:.1f} | 1.00 |",
        f"| ours, as many tokens | {found['whole']:.1f} | {found['whole'] / base:.2f} |",
        f"| ours, to the stop string | {found['ours']:.1f} | {found['ours'] / base:.2f} |",
    ]
    for name in ("hellaswag", "piqa", "boolq", "arc_easy"):
        seconds, apart = choices(loaded, requests(name, given.data, given.rows))
        lines += [
            f"| {name}, lm-eval's own loop | {seconds['theirs']:.1f} | 1.00 |",
            f"| ours; log-likelihoods differ by {apart:.0e} at most | {seconds['ours']:.1f} | "
            f"{seconds['ours'] / seconds['theirs']:.2f} |",
        ]  # fmt: skip
    out = Path("results/scoring.md")
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
