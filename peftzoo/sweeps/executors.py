"""Jobs, their results, and the executor that runs them in worker processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported later: a worker sets the number of threads before it imports torch
    from peftzoo.records.schema import Record
    from peftzoo.runs.plan import Request

ProgressCallback = Callable[[int, "Job", str, int, int, dict[str, float]], None]
"""on_progress(worker, job, stage, done, total, values); the last four as in `runner.Progress`."""


@dataclass(frozen=True)
class Job:
    """One run, or several runs of one model and task in packs, for a worker to do."""

    number: int
    request: Request
    out: Path
    """Folder for records, checkpoints and adapters."""
    lock_timeout: float = 0
    """Seconds to wait while another program does the run."""
    attempts: int = 0
    """How often the job was begun before."""
    companions: tuple[Request, ...] = ()
    """Other runs of the same model and task, done together with `request` in packs."""
    pack: tuple[int | None, int | None] = (1, None)
    """Size of a pack, as `packs.parse_pack_size` returns it: most runs, or most bytes."""
    jobs_per_device: int = 1
    """Jobs that run on one device at once and share its memory."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """All runs of the job, `request` first."""
        return (self.request, *self.companions)


@dataclass
class JobResult:
    """The result of a job: its record, or `busy`, or `died`."""

    job: Job
    record: Record | None = None
    """The record of `job.request`."""
    new: bool = True
    """Whether the run was done now; False: it was on record already."""
    companion_results: list[tuple[Record | None, bool]] = field(default_factory=list)
    """Record and `new` of each companion."""
    busy: bool = False
    """Whether another program is doing the run."""
    failure: str | None = None
    """Why there is no record, such as the signal that ended the worker."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The run's files by path relative to `job.out`, from a worker that does not see this folder."""


def execute(job: Job, on_progress: Callable[..., None] | None = None) -> JobResult:
    """Do the job in this process; a run that raises is recorded with status `failed`."""
    from peftzoo.runs.run import Busy, describe_failure, record_failure, run

    if job.companions:
        return _execute_in_packs(job, on_progress)
    try:
        record, _, new = run(job.request, job.out, progress=on_progress, lock_timeout=job.lock_timeout)
    except Busy:
        return JobResult(job, busy=True)
    except Exception as error:
        reason = describe_failure(error)[1]
        try:
            record, new = record_failure(job.request, job.out, reason)[0], True
        except Exception:  # the request cannot be resolved, so its record has no name
            return JobResult(job, failure=reason)
    if job.request.hold_out:  # the adapter of a trial is not needed
        shutil.rmtree(job.out / "adapters" / f"{record.id}-s{record.seed}", ignore_errors=True)
    return JobResult(job, record, new)


def _execute_in_packs(job: Job, on_progress: Callable[..., None] | None) -> JobResult:
    """Do a job's runs in packs, or one by one if that fails."""
    from peftzoo.runs.packs import run_packs

    size, memory_budget = job.pack
    try:
        results = run_packs(
            [*job.requests],
            job.out,
            size=size,
            memory_budget=memory_budget,
            progress=on_progress,
            jobs_per_device=job.jobs_per_device,
        )
        records = [(record, new) for record, _, new in results]
    except Exception:
        single_results = [
            execute(replace(job, request=r, companions=(), lock_timeout=-1), on_progress)
            for r in job.requests
        ]
        records = [(result.record, result.new) for result in single_results]
    return JobResult(job, *records[0], records[1:])


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as entries of `CUDA_VISIBLE_DEVICES`."""
    import torch

    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = setting.split(",") if setting else [str(i) for i in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def default_worker_count(devices: list[str]) -> int:
    """Workers by default: one per GPU, or without a GPU one per four cores."""
    return len(devices) or max(available_cores() // 4, 1)


class _Worker:
    """A process that does one job at a time, and ends with its parent.

    `plugins` are files to load, `start_method` is one of `multiprocessing`.
    """

    def __init__(
        self, number: int, threads: int, device: str | None, plugins: list[str], start_method: str
    ) -> None:
        self.number, self.job = number, None
        context = multiprocessing.get_context(start_method)
        self.pipe, worker_pipe = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(worker_pipe, threads, plugins), daemon=True)
        inherited = {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        before = {k: os.environ.get(k) for k in inherited}
        os.environ.update(inherited)
        # the worker inherits the handler: only the parent reacts to Ctrl-C
        previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, previous_handler)
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        worker_pipe.close()

    def start_job(self, job: Job) -> None:
        """Send a job to the idle worker. Raises `OSError` if the process is dead."""
        self.job = job
        self.pipe.send(job)

    def dismiss(self) -> None:
        """Tell an idle worker to exit."""
        with suppress(OSError):
            self.pipe.send(None)

    def stop(self, grace: float) -> None:
        """Terminate the process if it is at work; kill it if it has not ended after `grace` seconds."""
        if self.process.is_alive() and self.job is not None:
            self.process.terminate()
        self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _worker_main(pipe: Any, threads: int, plugins: list[str]) -> None:
    """The main function of a worker process.

    It ignores Ctrl-C. The parent sends SIGTERM instead, which is raised here as `KeyboardInterrupt`.
    """
    signal.signal(signal.SIGTERM, _raise_interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # libraries print to standard error, which keeps the JSON apart
    try:
        import torch

        from peftzoo.contract import registry

        torch.set_num_threads(threads)
        for file in plugins:
            registry.add_file(file)
        while True:
            if (job := pipe.recv()) is None:
                return
            result = execute(job, lambda *progress: _send(pipe, progress))
            _send(pipe, result)
    except (KeyboardInterrupt, EOFError):
        os._exit(0)  # the run is recorded as cancelled


def _send(pipe: Any, message: Any) -> None:
    """Send a message to the parent; exit if it has ended."""
    try:
        pipe.send(message)
    except OSError:  # the parent has ended, which must not be recorded as a failure of the run
        os._exit(1)


def _raise_interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Wait for the parent process to end, then exit at once."""
    multiprocessing.parent_process().join()
    os._exit(1)


class ProcessExecutor:
    """Runs jobs in worker processes on this machine, among which its cores or GPUs are divided.

    `count`: jobs at once, by default one per GPU, else one per four cores. `plugins`: files to load in each
    worker. `start_method`: one of `multiprocessing`.
    """

    def __init__(
        self,
        count: int | None,
        plugins: list[str],
        on_progress: ProgressCallback,
        start_method: str = "spawn",
    ) -> None:
        devices = visible_gpus()
        self.count = count or default_worker_count(devices)
        self.plugins, self.on_progress, self.start_method = plugins, on_progress, start_method
        self.threads, self.devices = max(available_cores() // self.count, 1), devices
        self.jobs_per_device = -(-self.count // max(len(devices), 1))
        self.queue: deque[Job] = deque()
        self.workers: list[_Worker] = []

    def submit(self, job: Job) -> None:
        """Queue a job; it starts within a call of `next_result`."""
        self.queue.append(job)

    def next_result(self) -> JobResult:
        """Start queued jobs, wait for the next job that ends, and return its result."""
        while True:
            self._assign_jobs()
            ready = wait([w.pipe for w in self.workers] + [w.process.sentinel for w in self.workers])
            for worker in self.workers:
                is_ready = worker.pipe in ready or worker.process.sentinel in ready
                if is_ready and (result := self._receive(worker)):
                    return result

    def _assign_jobs(self) -> None:
        """Give queued jobs to idle workers, and start workers up to `count`."""
        idle = [w for w in self.workers if w.job is None]
        numbers_in_use = {w.number for w in self.workers}
        while self.queue and (idle or len(numbers_in_use) < self.count):
            if not idle:
                number = min({*range(self.count)} - numbers_in_use)
                device = self.devices[number % len(self.devices)] if self.devices else None
                idle.append(_Worker(number, self.threads, device, self.plugins, self.start_method))
                self.workers.append(idle[0])
                numbers_in_use.add(number)
            try:
                idle[0].start_job(self.queue[0])
                self.queue.popleft()
            except OSError:  # the idle worker has died
                self._remove_worker(idle[0])
                numbers_in_use.discard(idle[0].number)
            idle.pop(0)

    def _receive(self, worker: _Worker) -> JobResult | None:
        """Read the worker's messages: its result if there is one, or a failure if the process has ended."""
        try:
            while worker.pipe.poll():
                message = worker.pipe.recv()
                if isinstance(message, JobResult):
                    worker.job = None
                    return message
                self.on_progress(worker.number, worker.job, *message)
        except (EOFError, OSError):
            pass
        else:
            if worker.process.is_alive():
                return None
        job = worker.job
        self._remove_worker(worker)
        return JobResult(job, failure=_exit_reason(worker.process.exitcode)) if job else None

    def _remove_worker(self, worker: _Worker) -> None:
        """End a worker and drop it; `_assign_jobs` starts another one when there are jobs."""
        self.workers.remove(worker)
        worker.stop(grace=5)

    def close(self) -> None:
        """End all workers; one at work records its run as cancelled, within 20 seconds."""
        for worker in self.workers:
            if worker.job is None:
                worker.dismiss()
            elif worker.process.is_alive():
                worker.process.terminate()
        for worker in self.workers:
            worker.stop(grace=20)
        self.workers = []


def _exit_reason(code: int | None) -> str:
    """Why a worker process ended, from its exit code; negative codes are signals."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"its worker process was ended by {name}{hint}"
    return f"its worker process ended with exit code {code}"
