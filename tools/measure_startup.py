"""How soon commands answer, beside the imports that they cannot do without.

Makes `results/startup.md`: python tools/measure_startup.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from peftzoo.measuring.counters import device_name

TORCH, LLAMA = "import torch", "from transformers import LlamaForCausalLM"
COMMANDS = {
    "list methods": TORCH,
    "list tasks": TORCH,
    "show lora": TORCH,
    "params --method unilora --model llama-2-7b": LLAMA,
}
"""Command -> the import that it is measured against."""


def seconds(*words: str) -> float:
    """Wall time of a Python process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="alternating runs of each")
    parser.add_argument("--out", type=Path, default=Path("results/startup.md"))
    args = parser.parse_args()
    runs: dict[str, list[float]] = {name: [] for name in ("import peftzoo", TORCH, LLAMA, *COMMANDS)}
    for _ in range(args.rounds + 1):  # the first round fills the file cache
        for name, times in runs.items():
            words = ("-m", "peftzoo", *name.split()) if name in COMMANDS else ("-c", name)
            times.append(seconds(*words))
    middle = {name: statistics.median(times[1:]) for name, times in runs.items()}
    lines = [
        "# How soon commands answer", "",
        f"Median of {args.rounds} alternating runs of whole processes, seconds. {device_name()}, Python "
        f"{platform.python_version()}. Made by `python tools/measure_startup.py`.", "",
        "| command | seconds | of which the import it needs | more than that |", "|---|---:|---|---:|",
    ]  # fmt: skip
    for command, needed in COMMANDS.items():
        extra = middle[command] - middle[needed]
        lines.append(
            f"| `peftzoo {command}` | {middle[command]:.2f} | `{needed}` {middle[needed]:.2f} | {extra:.2f} |"
        )
    lines += ["", f"`import peftzoo` takes {middle['import peftzoo']:.2f} s and imports no torch."]
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
