"""Sweeps that are killed, sweeps at the same time, and records that are damaged, foreign or hostile."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftzoo.boards import formats, tables
from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.records.schema import Record
from peftzoo.runs import run
from peftzoo.runs.plan import Plan, Request
from peftzoo.training import checkpoints
from tests.records.test_store import make

FAST = {"steps": 6, "batch_size": 2}
PRELOAD = ["peftzoo.sweeps.scheduler", "peftzoo.contract.registry", "peftzoo.scoring.language_model",
           "accelerate", "datasets", "lm_eval.evaluator",
           "transformers.models.llama.modeling_llama", "transformers.generation.utils"]  # fmt: skip


def requests(seeds) -> list[Request]:
    return [
        Request("lora", "sst2", seed=s, train=dict(FAST), limit=4, precision="fp32", save_every=2)
        for s in seeds
    ]


def process(out: Path, wanted: list[Request], workers: int) -> multiprocessing.Process:
    """A sweep in a process of its own, made from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    child = context.Process(target=sweep, args=(out, wanted, workers))
    child.start()
    return child


def sweep(out: Path, wanted: list[Request], workers: int) -> None:
    import torch

    from peftzoo.sweeps.process_executor import ProcessExecutor
    from peftzoo.sweeps.scheduler import Scheduler

    torch.set_num_threads(1)
    executor = ProcessExecutor(workers, [], lambda *_: None, start_method="fork")
    executor.threads = 1
    scheduler = Scheduler(executor, out, lambda *_: None, lambda text: None)
    try:
        scheduler.run(wanted)
    finally:
        executor.close()
    (out / f"new-{os.getpid()}.txt").write_text("\n".join(r.name for r, _, new in scheduler.records if new))


def kill(one: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        one.kill()


def records(out: Path) -> dict[int, Record]:
    """By seed; each readable, and no two of one run."""
    found = [*store.read_all(out)]
    assert not [f for f in found if isinstance(f, UserError)]
    assert len({(r.id, r.seed) for r in found}) == len(found) == len({r.seed for r in found})
    return {r.seed: r for r in found}


def reached(out: Path) -> dict[int, int]:
    """The step of each run's checkpoint."""
    found = {}
    for file in (out / "checkpoints").glob("*-s*.safetensors"):
        kept = checkpoints.read(file)
        assert kept, f"{file.name} is damaged"
        found[int(file.stem.rpartition("-s")[2])] = json.loads(kept[0])["progress"]["step"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_sweeps_and_workers_killed_at_any_moment_lose_nothing(tmp_path, kills: int) -> None:
    rng = random.Random()
    process(tmp_path, [], 1).join()  # the server of processes is there from now on
    began = time.perf_counter()
    process(tmp_path / "one", requests([99]), 1).join()
    long = 1.5 * (time.perf_counter() - began)
    out, killed = tmp_path / "out", {"sweep": 0, "worker": 0}
    finished, steps = {}, {}
    while sum(killed.values()) < kills or not any(r.resumed_at for r in finished.values()):
        going = process(out, requests(range(len(finished) + 1)), workers=1)  # one run is always left to do
        time.sleep(rng.uniform(0, long))
        try:
            whole_sweep = psutil.Process(going.pid)
        except psutil.NoSuchProcess:  # it has ended
            going.join()
            finished, steps = records(out), reached(out)
            continue
        workers = whole_sweep.children()
        kind = "worker" if workers and rng.random() < 0.5 else "sweep"
        if going.is_alive():
            killed[kind] += 1
            kill(rng.choice(workers) if kind == "worker" else whole_sweep)
        if kind == "worker":
            time.sleep(rng.uniform(0, long / 3))
            kill(whole_sweep)
        going.join()
        psutil.wait_procs(workers, timeout=30)
        now, at = records(out), reached(out)
        assert all(now[seed] == r for seed, r in finished.items()), "a finished run was lost or made again"
        assert all(at.get(s, 6) >= k for s, k in steps.items() if s not in now), "a checkpoint was lost"
        assert all(r.resumed_at >= steps.get(s, 0) for s, r in now.items()), "steps were done again"
        finished, steps = now, at
    last = process(out, requests(range(len(finished) + 1)), workers=2)
    last.join()
    assert last.exitcode == 0
    found = records(out)
    assert {*found} == {*range(len(finished) + 1)} and not reached(out)
    assert not [*out.rglob("*.tmp")] and not [*(out / "failed").rglob("*.json")]
    resumed = max(found.values(), key=lambda r: r.resumed_at)
    assert resumed.resumed_at, "no run went on from a checkpoint"
    whole, _, _ = run.run(requests([resumed.seed])[0], tmp_path / "whole")
    assert resumed.final_loss == whole.final_loss and resumed.score.value == whole.score.value


@pytest.mark.long
@pytest.mark.slow
def test_two_sweeps_on_one_folder_share_the_work(tmp_path) -> None:
    wanted = requests(range(4))
    both = [process(tmp_path, wanted, workers=1) for _ in range(2)]
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0] and {*records(tmp_path)} == {*range(4)}
    new = [f.read_text().split() for f in tmp_path.glob("new-*.txt")]
    assert len(new) == 2 and sorted(new[0] + new[1]) == [f"lora/sst2/embedded/s{s}" for s in range(4)]


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(tmp_path, run_cli) -> None:
    keys = {"methods": "lora", "tasks": "sst2", "seeds": [0, 1], "steps": 60, "limit": 4, "save_every": 5,
            "precision": "fp32", "train": {"batch_size": 2}}  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(keys))
    out = tmp_path / "out"
    line = [
        sys.executable,
        "-m",
        "peftzoo",
        "sweep",
        str(tmp_path / "s.yaml"),
        "--out",
        str(out),
        "--workers",
        "1",
    ]
    going = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip
    while not [*out.glob("checkpoints/*.safetensors")]:
        assert going.poll() is None, going.stderr.read()
        time.sleep(0.05)
    workers = psutil.Process(going.pid).children(recursive=True)
    os.killpg(going.pid, signal.SIGINT)
    _, err = going.communicate(timeout=60)
    assert (
        going.returncode == 130 and "2 runs are not done" in err and "goes on from the last checkpoint" in err
    ), err
    assert "Traceback" not in err
    assert not psutil.wait_procs(workers, timeout=10)[1], "a worker is left"
    (cancelled,) = (out / "cancelled").rglob("*.json")
    seed, step = store.read(cancelled).seed, reached(out)[store.read(cancelled).seed]
    assert step >= 5 and not records(out)
    code, _, err = run_cli(" ".join(line[3:]))  # the same command, without another import of everything
    assert code == 0, err
    assert {*records(out)} == {0, 1} and records(out)[seed].resumed_at >= step
    assert not [*(out / "cancelled").rglob("*.json")]


@pytest.mark.long
def test_a_ray_sweep_survives_its_workers(tmp_path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'peftzoo[ray]'")
    from peftzoo.sweeps.ray_executor import RayExecutor
    from peftzoo.sweeps.scheduler import Scheduler

    out, notes = tmp_path / "out", []
    out.mkdir()
    wanted = [replace(r, train={"steps": 150, "batch_size": 2}, save_every=5) for r in requests(range(3))]
    cluster = RayExecutor(None, 2, out, [])
    scheduler = Scheduler(cluster, out, lambda *_: None, notes.append)
    try:
        assert cluster.count == 2
        import threading

        killed: list[bool] = []  # whether the run had a checkpoint for certain

        def shoot() -> None:
            """Kill a worker of this Ray as soon as a run has a checkpoint."""
            while not [*out.glob("checkpoints/*.safetensors")]:
                time.sleep(0.02)
            mine = psutil.Process().children(recursive=True)
            busy = [p for p in mine if p.name().startswith("ray::_execute_remotely")]
            killed.append(len([*out.glob("checkpoints/*.safetensors")]) == len(busy))
            busy[0].kill()

        shooter = threading.Thread(target=shoot, daemon=True)
        shooter.start()
        scheduler.run(wanted)
        shooter.join(timeout=5)
    finally:
        cluster.close()
    assert killed and len(notes) == 1 and "goes on from its checkpoint" in notes[0], notes
    found = records(out)
    assert {*found} == {0, 1, 2} and [r.status for r, _, _ in scheduler.records] == ["ok"] * 3
    resumed = sum(r.resumed_at > 0 for r in found.values())
    assert resumed == 1 or (resumed == 0 and not killed[0]), "the run of the dead worker began anew"
    assert not [*out.glob(".*.sweep")]


def test_files_of_a_worker_with_another_folder_come_back(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'peftzoo[ray]'")
    import tempfile

    from peftzoo.sweeps import executor, ray_executor

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    out = tmp_path / "here"
    done = ray_executor._execute_remotely(
        executor.Job(1, requests([3])[0], out), [], 1, tmp_path / "no-marker"
    )
    assert done.job.out == out and not out.exists() and done.record.status == "ok"
    names = [Path(n) for n in done.files]
    assert names[-1].suffix == ".json" and all(not n.is_absolute() and ".." not in n.parts for n in names)
    assert {n.name for n in names} >= {"adapter.json", "adapter.safetensors"}
    made = [*(tmp_path / "node").rglob(f"{done.record.id}-s3.json")]
    assert made[0].read_bytes() == done.files[str(names[-1])]


def test_an_absent_cluster_is_named(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'peftzoo[ray]'")
    from peftzoo.sweeps.ray_executor import RayExecutor

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"no Ray cluster at .*ray start --head"):
        RayExecutor("127.0.0.1:1", None, tmp_path, [])


# -- records --------------------------------------------------------------------------------------------

GOOD = make(
    method_config={"r": 8, "targets": ["q", "v"]}, command="peftzoo bench --method lora"
).model_dump_json()
TEXT = st.text(max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", "../../x", "|", "[a](javascript:1)", "\x00"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12,
)  # fmt: skip


@st.composite
def foreign(draw) -> bytes:
    """A record with other values under some of its keys, or under keys of its own."""
    document = json.loads(GOOD)
    names = st.sampled_from(sorted(document)) | TEXT
    for key, value in draw(st.dictionaries(names, JSON, min_size=1, max_size=4)).items():
        document[key] = value
    return json.dumps(document).encode(errors="replace")


@st.composite
def damaged(draw) -> bytes:
    """A record cut off, with bytes changed, put in or left out."""
    data = bytearray(GOOD.encode())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 12))] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=foreign() | damaged() | st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_file_is_a_record_or_is_reported_by_name(tmp_path, data: bytes) -> None:
    good = store.write(tmp_path, make(seed=7))
    bad = good.parent / "bad.json"
    bad.write_bytes(data)
    found = [*store.read_all(tmp_path)]
    assert len(found) == 2
    errors = [f for f in found if isinstance(f, UserError)]
    assert all("bad.json" in str(e) and "\n" not in str(e) and len(str(e)) < 700 for e in errors)
    kept = [f for f in found if isinstance(f, Record)]
    assert any(r.seed == 7 for r in kept) and len(kept) + len(errors) == 2
    for r in kept:
        store.path(tmp_path, r).resolve().relative_to(tmp_path.resolve())
    assert "<script" not in formats.markdown(tables.tables(kept))


def test_a_damaged_record_is_named_and_the_others_are_run(tmp_path) -> None:
    from tests.sweeps.test_sweep import run_sweep

    wanted = requests([0, 1])
    bad = store.path(tmp_path, run.new_record(Plan(wanted[0])))
    bad.parent.mkdir(parents=True)
    bad.write_text(GOOD[:100])
    scheduler, _ = run_sweep(tmp_path, wanted)
    found = {r.seed: r for r, _, _ in scheduler.records}
    assert (
        found[0].status == "failed" and bad.name in found[0].reason and str(tmp_path) not in found[0].reason
    )
    assert found[1].status == "ok" and bad.read_text() == GOOD[:100], "evidence is not written over"
