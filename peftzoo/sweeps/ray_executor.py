"""The executor that does jobs as tasks of a Ray cluster."""

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
from peftzoo.errors import UserError, not_installed
from peftzoo.records import store
from peftzoo.runs.plan import Plan
from peftzoo.runs.run import is_on_record, new_record
from peftzoo.sweeps.executor import Job, JobResult, execute
from peftzoo.sweeps.process_executor import available_cores

CORES_PER_RUN = 4
"""CPU cores of a run on a cluster without GPUs, if the number of runs at once is not given."""
CANCEL_SECONDS = 20
"""Seconds in which cancelled runs can write their records."""


class RayExecutor:
    """Does jobs on the Ray cluster at `address`, or without it on a local Ray of this machine.

    Each run gets its share of the cores, and a GPU if the cluster has any. `count` is the number of runs at
    once, `plugins` are files to load. Workers that see the results folder `out` (a shared file system) write
    there, and an interrupted run resumes from its checkpoint on any of them; other workers return the files
    of a finished run. Raises `UserError` if Ray is not installed or the cluster cannot be reached.
    """

    def __init__(self, address: str | None, count: int | None, out: Path, plugins: list[str]) -> None:
        self.ray = ray = _import_ray()
        try:
            if address:
                _check_reachable(address)
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            else:
                ray.init(address="local", num_cpus=max(available_cores(), count or 1),
                         include_dashboard=False, log_to_driver=False, logging_level="ERROR")  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f'no Ray cluster at "{address}" ({reason}): `ray start --head` begins one; or no --address'
            ) from None
        resources = ray.cluster_resources()
        largest_node = max(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"])
        self.gpus = 1 if resources.get("GPU") else 0
        jobs_at_once = count or (resources["GPU"] if self.gpus else max(resources["CPU"] // CORES_PER_RUN, 1))
        self.threads = int(max(min(resources["CPU"] // jobs_at_once, largest_node), 1))
        self.count, self.out, self.plugins = int(jobs_at_once), out, plugins
        self.jobs_per_device = 1 if self.gpus else self.count
        self.marker = out / f".{uuid.uuid4().hex}.sweep"
        self.marker.touch()
        self.task = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=0)(_execute_remotely)
        self.pending: dict[Any, Job] = {}
        self.ready: deque[JobResult] = deque()

    def submit(self, job: Job) -> None:
        """Start a job on the cluster; one whose runs are all on record is answered here."""
        if _all_on_record(job):
            self.ready.append(execute(job))  # reads the records only
            return
        task = self.task.remote(job, self.plugins, self.threads, self.marker)
        self.pending[task] = job

    def next_result(self) -> JobResult:
        """Wait for the next job that ends, and return its result."""
        if self.ready:
            return self.ready.popleft()
        (ended,), _ = self.ray.wait([*self.pending], num_returns=1)
        job = self.pending.pop(ended)
        try:
            result = self.ray.get(ended)
        except self.ray.exceptions.RayError as error:
            return JobResult(
                job, failure=f"Ray lost it: {type(error).__name__}, {' '.join(str(error).split())[:120]}"
            )
        for name, data in result.files.items():
            if not (file := job.out / name).is_file():
                write_atomically(file, data)
        return result

    def close(self) -> None:
        """Cancel the pending jobs, and disconnect from the cluster."""
        for task in self.pending:
            self.ray.cancel(task)
        if self.pending:
            self.ray.wait([*self.pending], num_returns=len(self.pending), timeout=CANCEL_SECONDS)
        self.marker.unlink(missing_ok=True)
        self.ray.shutdown()


def _all_on_record(job: Job) -> bool:
    """Whether every run of the job has a record."""
    try:
        return all(is_on_record(job.out, new_record(Plan(r))) for r in job.requests)
    except UserError:  # the worker that does the job reports it
        return False


def _execute_remotely(job: Job, plugins: list[str], threads: int, marker: Path) -> JobResult:
    """The function of a Ray task: do the job on the worker.

    If the worker does not see the driver's file `marker`, it has another file system: it works in a
    temporary folder and returns the files in the result.
    """
    torch.set_num_threads(threads)
    for file in plugins:
        registry.add_file(file)
    if marker.is_file():
        return execute(job)
    name = hashlib.sha256(str(job.out).encode()).hexdigest()[:12]
    out = Path(tempfile.gettempdir()) / f"peftzoo-{name}"
    result = execute(replace(job, out=out))
    for record in (r for r, _ in [(result.record, result.new), *result.companion_results] if r is not None):
        if record.held_out is not None:
            continue  # the driver writes a trial's line
        target = store.path(out, record)
        files = [target, *target.parent.glob(f"{target.stem}.examples*")]
        files += (out / "adapters" / target.stem).glob("adapter.*")
        result.files |= {str(f.relative_to(out)): f.read_bytes() for f in reversed(files)}  # the record last
    return replace(result, job=job)


def _check_reachable(address: str) -> None:
    """Raise `OSError` at once if no program listens at the address; Ray itself would take minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _import_ray() -> Any:
    """The module `ray`. Raises `UserError` if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise not_installed("ray") from None
    return ray
