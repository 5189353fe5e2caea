"""The executor that does jobs in worker processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from peftzoo.models import silence
from peftzoo.sweeps.executor import Job, JobResult, ProgressCallback, execute


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
        silence.libraries()
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
