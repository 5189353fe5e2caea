"""A mistake that needs neither the method nor the model is told before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = "bench --method lora --task sst2"
TUNE = "tune --method lora --task sst2"
GENERATE = "generate --method lora-gen --tasks gsm8k"
OF_RUNS = ["--model embeded", "--model ./nowhere", "--model llama-2-7b", "--precision fp16", "--source hbu",
           "--data ./nowhere", "--batch-size 0"]  # fmt: skip
"""Wrong options that bench, tune and generate have in common."""
OF_BENCH = [
    "--seeds 1,a", "--seeds=-1", "--protocol cleen", "--steps=-1", "--epochs 0", "--micro-batch 0", "--lr=-1",
    "--head-lr 0", "--schedule liner", "--warmup 1", "--clip 0", "--max-length 2", "--max-new-tokens 0",
    "--limit 0", "--eval-batch 0", "--prune wand:0.5", "--prune wanda:2", "--retention stbs", "--pack two",
    "--track wanb", "--hold-out 0", "--set r", "--set dora.r=2", "--epochs 1 --steps 2", "--score-together",
]  # fmt: skip
OF_TUNE = ["--seeds x", "--lr-grid 1", "--trials 2 --lr-grid 3", "--space r=2", "--trials 2 --space r",
           "--hold-out 1", "--limit 0", "--pack two", "--steps 0"]  # fmt: skip
OF_GENERATE = ["--limit 0", "--lr inf", "--shots=-1", "--unseen stbs"]
SWEEPS = [
    "methods: lroa\ntasks: sst2", "methods: lora\ntasks: stt2", "methods: lora",
    "methods: lora\ntasks: sst2\nlimt: 2", "methods: lora\ntasks: sst2\nmodels: embeded",
    "methods: lora\ntasks: sst2\nprecision: fp16",
    "methods: lora\ntasks: sst2\nsource: hbu", "methods: lora\ntasks: sst2\nprune: wand:0.5",
    "methods: lora\ntasks: sst2\npack: two", "methods: lora\ntasks: sst2\ntrain: {lr: [0.1, -1]}",
    "methods: lora\ntasks: sst2\nprotocol: cleen", "methods: lora\ntasks: sst2\nseeds: [-1]",
]  # fmt: skip
OTHERS = [
    "bench --method lroa --task sst2", "bench --method lora --task stt2", "tune --method lroa --task sst2",
    "tune --method lora --task stt2", "generate --method lroa --tasks sst2",
    "generate --method lora-gen --tasks stt2", "params --method lroa",
    "params --method lora --model lama-2-7b", "params --method lora --out x.md",
    "profile --method lroa", "profile --method lora --model embeded", "profile --method lora --against peeft",
    "profile --method lora --rounds 0", "check lroa", "show lroa", "list metods", "sweep nowhere.yaml",
    "sweep nowhere.yaml --executor rai", "export here --to lroa --out x",
    "export here --to merged --rank 2 --out x",
    "export here --to merged --out x --model embeded", "import . --out x --model embeded",
    "export nowhere --to merged --out x", "import nowhere --out x", "export . --to merged --out .",
    "verify nowhere --model embeded", "verify nowhere --task stt2", "board ./nowhere", "new-method Bad_Name",
    "recommend --model embedded --task-like math --max-trainable x",
    "recommend --model x --task-like y --results ./no", "power --difference 2",
    "power --task sst2 --results ./no", "models get minilmm",
]  # fmt: skip
EXTRAS = [f"{TUNE} --trials 3", f"{BENCH} --track trackio", "profile --method lora --against peft",
          "export here --to lora --out x", "sweep nowhere.yaml --executor ray"]  # fmt: skip
"""They need a package that only an extra brings."""
PROGRAM = """
import contextlib, io, json, sys
from peftzoo import cli
told = []
sys.modules |= dict.fromkeys(("optuna", "peft", "ray", "trackio"))  # as where they are not installed
for line in json.load(sys.stdin):
    sys.argv, err, code = ["peftzoo", *line.split()], io.StringIO(), None
    with contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    heavy = [m for m in ("torch", "transformers", "datasets", "scipy", "pandas") if m in sys.modules]
    told.append([line, code, err.getvalue(), heavy])
    if heavy:
        break
json.dump(told, sys.stdout)
"""


def test_mistakes_are_told_before_heavy_imports(tmp_path: Path) -> None:
    lines = [f"{BENCH} {x}" for x in OF_RUNS + OF_BENCH] + [f"{TUNE} {x}" for x in OF_RUNS + OF_TUNE]
    lines += [f"{GENERATE} {x}" for x in OF_RUNS + OF_GENERATE] + OTHERS + EXTRAS
    for number, text in enumerate(SWEEPS):
        (tmp_path / f"{number}.yaml").write_text(text)
        lines.append(f"sweep {number}.yaml")
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(lines), cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    wrong = [t for t in told if t[1] != 2 or t[2].count("\n") != 1 or t[3]]
    assert wrong == [] and len(told) == len(lines)
    assert all(("pip install" in text) == (line in EXTRAS) for line, _, text, _ in told)
    left = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".yaml")
    assert left == [], "a mistake makes files or folders"
