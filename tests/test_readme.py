"""The commands and programs of the README run as they stand there (with fewer steps and rows)."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MIRROR = ROOT.parent / "shared" / "data"
SHORTER = {"bench": ["--steps", "2", "--limit", "4"], "profile": ["--rounds", "1", "--length", "16"]}
SHORTER["sweep"] = SHORTER["tune"] = ["--dry-run"]
SHORTER["generate"] = ["--steps", "2", "--limit", "2", "--batch-size", "2"]
"""Added to a command so that it ends soon; what the README shows stays as it is."""

EARLIER = {
    "runs/records/gsm8k/gsm8k/embedded/unilora": "bench --method unilora --task gsm8k --steps 2 --limit 4",
    "as-lora": "export unilora/gsm8k/embedded/s0 --to lora --out as-lora",
}
"""What earlier lines of the README make, for a line that runs alone."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[tuple[list[str], str]]:
    """(words, comment) of each line that runs peftzoo."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [(shlex.split(line, comments=True), line.partition("#")[2]) for line in lines]
    return [(words, comment) for words, comment in found if words and Path(words[0]).name == "peftzoo"]


def packages_of_extras(named: str) -> set[str]:
    """Import names of the packages that only an extra brings, but for the extras that a comment names."""
    wanted = set(re.findall(r"peftzoo\[(\w+)\]", named))
    brought: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("peftzoo"):
        package = re.split(r"[^\w.-]", line)[0].replace("-", "_")
        for extra in re.findall(r"extra == [\"'](\w+)", line) or ["base"]:
            brought.setdefault(package, set()).add(extra)
    engine = {"peft", "ray", "trackio", "nevergrad", "optuna"}  # torchao is looked for by PEFT itself
    return {p for p in engine if "base" not in brought[p] and not brought[p] & wanted}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


@contextmanager
def without(packages: set[str]) -> Iterator[None]:
    """Inside, these packages cannot be imported, as where they are not installed."""
    hidden = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in packages}
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(hidden)


def call(folder: Path, *words: str) -> SimpleNamespace:
    """`peftzoo WORDS` in this process, where the libraries are loaded already; with plugins in a new one."""
    if "--plugin" in words:
        return run(folder, "-m", "peftzoo", *words)
    from peftzoo import cli

    out, err, here, argv = io.StringIO(), io.StringIO(), Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["peftzoo", *words]
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(here)
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize(("words", "comment"), commands(), ids=["_".join(w[1:5]) for w, _ in commands()])
def test_command(words: list[str], comment: str, folder: Path) -> None:
    """The line works without the extras that it does not name."""
    words = words[1:] + SHORTER.get(words[1], [])
    if "FOLDER" in words:
        if not MIRROR.is_dir():
            pytest.skip("no data mirror beside the project")
        words[words.index("FOLDER")] = str(MIRROR)
    for alias in ("minilm", "smollm2-135m"):
        from peftzoo.models import catalogue

        if alias in words and not catalogue.intact(catalogue.folder(alias)):
            pytest.skip(f"{alias} is not on this machine")
    if "--plugin" in words and not (folder / words[-1]).exists():  # the line before it in the README
        call(folder, "new-method", words[1])
    if words[0] == "sweep":
        if "ray" in words:
            pytest.importorskip("ray")
        (folder / words[1]).write_text(blocks("yaml")[0])
    needed = {"export": 1, "import": 2, "board": 1, "recommend": 1}.get(words[0], 0)
    for made, command in list(EARLIER.items())[:needed]:
        if not (folder / made).exists():
            call(folder, *command.split())
    if "members=library/adapters" in words and not any((folder / "library").glob("adapters/*/adapter.json")):
        (library,) = (c[1:] for c, _ in commands() if c[-2:] == ["--out", "library"])
        made = call(folder, *library, *SHORTER["bench"])
        assert made.returncode == 0, made.stderr
    with without(packages_of_extras(comment)):
        done = call(folder, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("program", blocks("python"), ids=["loop", "trainer"])
def test_program(program: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr


def test_the_two_first_commands_are_targets() -> None:
    first = blocks("bash")[0]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [line.split()[1] for line in first.strip().splitlines()] == ["bench", "test"]
    assert {"bench", "test", "install", "lint"} <= set(targets)


@pytest.mark.parametrize(("line", "missing"), [
    ("bench --method none,hf:lora --task sst2 --limit 2", "peftzoo[peft]"),
    ("profile --method lora --against peft", "peftzoo[peft]"),
])  # fmt: skip
def test_a_line_that_does_not_name_its_extra_would_fail(line: str, missing: str, tmp_path: Path) -> None:
    """The test above can fail: without the comment, the same lines end with the extra's name."""
    with without(packages_of_extras("")):
        done = call(tmp_path, *line.split())
    assert done.returncode == 2 and missing in done.stderr and "Traceback" not in done.stderr
