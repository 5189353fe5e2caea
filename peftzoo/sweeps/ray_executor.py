"""Runs as tasks of a Ray cluster: Ray places them, this gives back what became of each."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import uuid
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peftzoo.adapters import write_atomically
from peftzoo.contract import registry
from peftzoo.errors import UserError
from peftzoo.records import store
from peftzoo.runs.plan import Plan
from peftzoo.runs.run import new_record
from peftzoo.sweeps.executors import Done, Job, cores, execute

CORES = 4
"""Cores of a run where there are no GPUs, unless told how many runs at once."""
GRACE = 20
"""Seconds that cancelled runs have to record it."""


class RayExecutor:
    """A Ray of this machine alone, or the one at `address`; each run has its cores, a GPU if there is one.

    Workers that see the results folder (a shared file system) write there themselves, and runs go on from
    checkpoints wherever they are begun again; others send the files of a finished run back.
    """

    def __init__(self, address: str | None, count: int | None, out: Path, plugins: list[str]) -> None:
        self.ray = ray = _ray()
        try:
            if address:
                _reach(address)
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            else:
                ray.init(address="local", num_cpus=max(cores(), count or 1), include_dashboard=False,
                         log_to_driver=False, logging_level="ERROR")  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f'no Ray cluster at "{address}" ({reason}): `ray start --head` begins one; or no --address'
            ) from None
        whole = ray.cluster_resources()
        largest = max(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"])
        self.gpus = 1 if whole.get("GPU") else 0
        at_once = count or (whole["GPU"] if self.gpus else max(whole["CPU"] // CORES, 1))
        self.threads = int(max(min(whole["CPU"] // at_once, largest), 1))
        self.count, self.out, self.plugins = int(at_once), out, plugins
        self.jobs_per_device = 1 if self.gpus else self.count
        self.flag = out / f".{uuid.uuid4().hex}.sweep"
        self.flag.touch()
        self.task = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)(_execute)
        self.under_way: dict[Any, Job] = {}
        self.ready: deque[Done] = deque()

    def submit(self, job: Job) -> None:
        if _on_record(job):
            self.ready.append(execute(job))  # which finds it there
            return
        task = self.task.remote(job, self.plugins, self.threads, self.flag)
        self.under_way[task] = job

    def next(self) -> Done:
        """The next job that is done."""
        if self.ready:
            return self.ready.popleft()
        (ready,), _ = self.ray.wait([*self.under_way], num_returns=1)
        job = self.under_way.pop(ready)
        try:
            done = self.ray.get(ready)
        except self.ray.exceptions.RayError as error:
            return Done(
                job, died=f"Ray lost it: {type(error).__name__}, {' '.join(str(error).split())[:120]}"
            )
        for name, data in done.files.items():
            if not (place := job.out / name).is_file():
                write_atomically(place, data)
        return done

    def close(self) -> None:
        """Cancel what is under way, and leave the cluster."""
        for task in self.under_way:
            self.ray.cancel(task)
        if self.under_way:
            self.ray.wait([*self.under_way], num_returns=len(self.under_way), timeout=GRACE)
        self.flag.unlink(missing_ok=True)
        self.ray.shutdown()


def _on_record(job: Job) -> bool:
    try:
        return all(store.path(job.out, new_record(Plan(r))).is_file() for r in job.requests)
    except UserError:  # a trial that cannot be made: whoever does it tells
        return False


def _execute(job: Job, plugins: list[str], threads: int, flag: Path) -> Done:
    """What a Ray worker does. Without the driver's flag in sight, its folder is another one."""
    torch.set_num_threads(threads)
    for file in plugins:
        registry.add_file(file)
    if flag.is_file():
        return execute(job)
    name = hashlib.sha256(str(job.out).encode()).hexdigest()[:12]
    out = Path(tempfile.gettempdir()) / f"peftzoo-{name}"
    done = execute(replace(job, out=out))
    for record in (r for r, _ in [(done.record, done.new), *done.others] if r is not None):
        target = store.path(out, record)
        found = [target, *target.parent.glob(f"{target.stem}.examples*")]
        found += (out / "adapters" / target.stem).glob("adapter.*")
        done.files |= {str(f.relative_to(out)): f.read_bytes() for f in reversed(found)}  # the record last
    return replace(done, job=job)


def _reach(address: str) -> None:
    """Raises `OSError` at once where nobody listens, which Ray itself finds out after minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError('the Ray executor needs Ray: pip install "peftzoo[ray]"') from None
    return ray
