"""Trackers."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from peftzoo.errors import UserError
from peftzoo.runs import trackers
from peftzoo.runs.plan import Request
from peftzoo.runs.run import run


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B writes under tmp_path and asks no network."""
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_unknown_tracker_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r'unknown tracker "wanb": did you mean "wandb"\?'):
        trackers.make_tracker("wanb")


def test_no_tracker_does_nothing(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    none = trackers.make_tracker("none")
    none.start("x", {})
    none.log(1, {"loss": 1.0})
    none.finish({})
    assert capfd.readouterr() == ("", "") and not [*tmp_path.iterdir()]


class Listening(trackers.Tracker):
    def __init__(self) -> None:
        self.heard: list = []

    def start(self, name, config) -> None:
        self.heard.append(("start", name, config))

    def log(self, step, values) -> None:
        self.heard.append(("log", step, values))

    def finish(self, summary) -> None:
        self.heard.append(("finish", summary))


REQUEST = {"method": "lora", "task": "sst2", "precision": "fp32", "limit": 2}


def test_a_run_tells_its_tracker_everything(tmp_path) -> None:
    listening = Listening()
    record, _, _ = run(Request(**REQUEST, train={"steps": 3, "batch_size": 2}), tmp_path, tracker=listening)
    kinds = [h[0] for h in listening.heard]
    assert kinds == ["start", "log", "log", "log", "finish"]
    assert listening.heard[0][1] == record.name and listening.heard[0][2]["method_config"]["r"] == 8
    assert [h[1] for h in listening.heard[1:-1]] == [1, 2, 3] and listening.heard[1][2]["loss"] > 0
    assert listening.heard[-1][1] == {
        "status": "ok",
        "score": record.result.value,
        "trainable_params": record.trainable_params,
    }


def test_a_failed_run_ends_its_curve(tmp_path) -> None:
    listening = Listening()
    request = Request(**REQUEST, train={"steps": 3, "batch_size": 2, "lr": 1e30})
    record, _, _ = run(request, tmp_path, tracker=listening)
    assert record.status == "failed" and listening.heard[-1] == (
        "finish",
        {"status": "failed", "score": None, "trainable_params": record.trainable_params},
    )


@pytest.mark.slow
def test_wandb_works_offline_and_stays_quiet(offline, capfd) -> None:
    wandb = trackers.make_tracker("wandb")
    wandb.start("lora/sst2/embedded/s0", {"method": "lora", "seed": 0})
    for step in (1, 2, 3):
        wandb.log(step, {"loss": 1.0 / step})
    wandb.finish({"score": 0.5})
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    (folder,) = (p for p in (offline / "wandb").iterdir() if p.name.startswith("offline-run"))
    until = time.monotonic() + 60  # another process of wandb writes the file
    while time.monotonic() < until and not any(p.stat().st_size > 100 for p in folder.glob("*.wandb")):
        time.sleep(0.2)
    assert any(p.stat().st_size > 100 for p in folder.glob("*.wandb"))


def test_trackio_keeps_the_curve_in_its_folder(tmp_path) -> None:
    """In a process of its own: trackio reads its folder's name when it is imported."""
    pytest.importorskip("trackio")
    code = (
        "from peftzoo.runs.trackers import make_tracker; t = make_tracker('trackio');"
        "t.start('lora/sst2', {'method': 'lora'});"
        "[t.log(s, {'loss': 1.0 / s}) for s in (1, 2, 3)]; t.finish({'status': 'ok', 'score': 0.5})"
    )
    env = os.environ | {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    with closing(sqlite3.connect(next(tmp_path.glob("peftzoo*.db")))) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    values = [(step, json.loads(text)) for step, text in rows]
    assert [(s, v["loss"]) for s, v in values[:3]] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert values[-1][1]["summary/score"] == 0.5


def test_trackio_that_is_not_there_is_one_clear_error(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r'pip install "peftzoo\[trackio\]"'):
        trackers.make_tracker("trackio").start("x", {})


def test_wandb_without_a_key_is_one_clear_error(monkeypatch) -> None:
    import wandb

    def init(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    tracker = trackers.make_tracker("wandb")
    with pytest.raises(UserError, match=r"No API key.*`wandb login`, or set WANDB_MODE=offline") as told:
        tracker.start("x", {})
    assert "\n" not in str(told.value)
    tracker.finish({})  # nothing to end
