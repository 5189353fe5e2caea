"""Steps per second of several runs in one pack against the same runs one after another.

Makes `results/packing.md`: python tools/measure_packing.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from peftzoo import models
from peftzoo.adapters import attach
from peftzoo.measuring import step_profile
from peftzoo.runs import _pack_scoring
from peftzoo.runs._pack_loop import PackLoop
from peftzoo.runs._packed_adapter import Pack
from peftzoo.scoring import evaluation
from peftzoo.tasks import sources, task_files
from peftzoo.training.batches import Example
from peftzoo.training.config import TrainConfig
from peftzoo.training.loop import Loop

METHODS = ("lora", "dora", "vera", "unilora", "ia3", "lora-xs", "melora", "loha")
STEPS = 4
ROUNDS_OF_SCORING, SCORED = 3, 16


def loops(
    model: nn.Module, names: tuple[str, ...], rows: int, tokens: int, accelerator: Accelerator
) -> list[Loop]:
    """One run per name on the common `model`, handles not installed."""
    made = []
    for seed, name in enumerate(names):
        g = torch.Generator().manual_seed(seed)
        ids = [torch.randint(3, 1000, (tokens,), generator=g).tolist() for _ in range(rows)]
        config = TrainConfig(steps=STEPS, batch_size=rows, lr=1e-3)
        member = attach(model, name, seed=seed, install=False)
        examples = [Example(row, [-100, *row[1:]]) for row in ids]
        made.append(Loop(member, examples, config, pad=0, accelerator=accelerator, seed=seed))
    return made


def one_by_one(made: list[Loop]) -> float:
    """Seconds of all runs' steps, one run after another; probing and attaching are not counted."""
    total = 0.0
    for loop in made:
        with loop.attached.on():
            total += loop.run().seconds
    return total


def together(made: list[Loop]) -> float:
    pack = PackLoop(made)
    pack.run()
    return sum(pack.step_seconds)


def scoring(names: tuple[str, ...], task_name: str, rows: int) -> dict[str, list[float]]:
    """Seconds of scoring these methods on the embedded model, one after another and in shared batches."""
    loaded, task = models.load("embedded"), task_files.get(task_name)
    found = sources.load(task, "embedded", None, trains=False)
    found.test = found.test.select(range(rows))
    members = [attach(loaded.model, name, seed=i, install=False) for i, name in enumerate(names)]
    lm_task, seconds = evaluation.harness_task(task, found), {"alone": [], "pack": []}
    for _ in range(ROUNDS_OF_SCORING):
        begin = time.perf_counter()
        for member in members:
            with member.on():
                evaluation.score_language(loaded.model.eval(), loaded.tokenizer, lm_task, rows)
        middle = time.perf_counter()
        _pack_scoring.scores(
            Pack(members), [*range(len(members))], loaded.model, loaded.tokenizer, task, found, rows
        )
        seconds["alone"].append(middle - begin)
        seconds["pack"].append(time.perf_counter() - middle)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    model = step_profile.small_llama().to(accelerator.device)
    base = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    lines = [
        "# Packs against runs one after another", "",
        f"A Llama of {base:.0f} MiB (fp32), {device}, {torch.get_num_threads()} thread(s); {STEPS} steps per "
        f"run, median of {rounds} rounds in which both take turns.",
        "Runs are of different methods in turn: " + ", ".join(METHODS) + ".",
        f"Made by `python tools/measure_packing.py --rounds {rounds}`.", "",
        "| runs | rows x tokens of each | one by one, run-steps/s | pack, run-steps/s | pack is faster by | "
        "base copies saved, MiB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for count in (4, 8):
        for rows, tokens in ((1, 32), (1, 64), (4, 128)):
            seconds: dict[str, list[float]] = {"alone": [], "pack": []}
            for _ in range(rounds):
                for name, work in (("alone", one_by_one), ("pack", together)):
                    seconds[name].append(work(loops(model, METHODS[:count], rows, tokens, accelerator)))
            alone, pack = (statistics.median(seconds[name]) for name in ("alone", "pack"))
            steps = count * STEPS
            lines.append(f"| {count} | {rows} x {tokens} | {steps / alone:.2f} | {steps / pack:.2f} | "
                         f"{alone / pack:.2f} | {(count - 1) * base:.0f} |")  # fmt: skip
            print(lines[-1], flush=True)
    lines += [
        "", f"Scoring {SCORED} rows of embedded tasks with the embedded model, unmerged, batches of {SCORED} "
        f"rows; median of {ROUNDS_OF_SCORING} rounds.", "",
        "| adapters | task | one by one, s | shared batches, s | faster by |", "|---:|---|---:|---:|---:|",
    ]  # fmt: skip
    for count in (2, 4):
        for name in ("gsm8k", "arc_easy"):
            seconds = scoring(METHODS[:count], name, SCORED)
            alone, pack = (statistics.median(seconds[k]) for k in ("alone", "pack"))
            lines.append(f"| {count} | {name} | {alone:.2f} | {pack:.2f} | {alone / pack:.2f} |")
    lines += [
        "", "Each run in a pack has the losses that it has alone (tests/runs/test_packs.py). Copies saved: "
        "against "
        "as many processes side by side, each with a base of its own.",
    ]  # fmt: skip
    out = Path("results/packing.md")
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
