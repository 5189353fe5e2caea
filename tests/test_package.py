"""A wheel built from the tree holds methods, tasks, published records and the embedded model, and works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("peftzoo", "methods", "benchmarks", "results", "pyproject.toml", "README.md", "LICENSE")


COMMANDS = (
    "list methods", "list tasks", "show lora", "check lora", "board",
    "recommend --model embedded --task-like gsm8k --max-trainable 1M",
)  # fmt: skip
"""What works away from a checkout; the records that board and recommend read come with the wheel."""


ALL_COMMANDS = """
import contextlib, io, sys
from peftzoo import cli

for line in sys.argv[1:]:
    sys.argv = ["peftzoo", *line.split()]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, line
    assert out.getvalue().strip(), line
    print(line)
"""
"""Runs the command lines one after another, so that libraries are imported once."""


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        shutil.copytree(source, tree / name, ignore=skip) if source.is_dir() else shutil.copy(
            source, tree / name
        )
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("methods", "peftzoo/methods"), ("benchmarks", "peftzoo/benchmarks")):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".yaml", ".md"}:
                assert f"{package}/{file.relative_to(ROOT / folder)}" in inside
    assert "peftzoo/assets/embedded/model.safetensors" in inside
    assert not any(name.startswith(("methods/", "benchmarks/", "results/", "tests/")) for name in inside)
    records = {p.relative_to(ROOT) for p in (ROOT / "results" / "records").rglob("*.json")}
    assert records and {f"peftzoo/{p.as_posix()}" for p in records} <= inside
    assert wheel.stat().st_size < 20_000_000

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True)
    away = tmp_path / "away"
    away.mkdir()
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        line = [sys.executable, *words]
        done = subprocess.run(line, cwd=away, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout, done.stderr
        return done.stdout

    run("-c", ALL_COMMANDS, *COMMANDS)
    bench = "bench --method unilora --task gsm8k --steps 1 --limit 2 --max-new-tokens 4 --json"
    record = json.loads(run("-m", "peftzoo", *bench.split()))[0]
    assert record["status"] == "ok" and record["environment"]["commit"] is None  # not the checkout's copy
