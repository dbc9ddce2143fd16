"""Does the jobs of a plan, several at a time, each once: what is finished stays finished, whatever kills the run."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.study_plan import ONE_CPU, Job, Machine, Plan

DONE, ERROR, LOG = "done.json", "error.txt", "log.txt"


def result_of(stages: Path, key: str) -> dict[str, Any] | None:
    """`{job, result, seconds}` of a finished job, None before."""
    path = stages / key / DONE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def error_of(stages: Path, key: str) -> str | None:
    """What a job failed with, as one line; None if it did not."""
    path = stages / key / ERROR
    if result_of(stages, key) is not None or not path.is_file():
        return None
    return path.read_text(encoding="utf-8").strip().splitlines()[-1]


@contextlib.contextmanager
def locked(stages: Path) -> Iterator[None]:
    """
    Holds the folder of finished jobs for this process.

    Raises:
        ValueError: Another process holds it.
    """
    stages.mkdir(parents=True, exist_ok=True)
    with (stages / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"`stages` ({stages}) is in use by another run: wait for it, or name another.") from error
        yield


def _start_worker() -> None:
    # One core per job: results then do not depend on how many run at a time.
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _do(folder: Path, kind: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], machine: Machine) -> None:
    """In a worker: one job, from what an interrupted run left of it."""
    from lapa.evaluation.study_jobs import JOBS
    from lapa.evaluation.study_work import Work

    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    start = time.perf_counter()
    with (folder / LOG).open("a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                result = JOBS[kind](Work.of(folder, settings, inputs, machine))
            except BaseException:
                write_atomically(folder / ERROR, traceback.format_exc().encode())
                raise
    seconds = time.perf_counter() - start
    for checkpoint in folder.glob("**/checkpoint-*"):
        shutil.rmtree(checkpoint)
    done = {
        "kind": kind,
        "settings": dict(settings),
        "result": result,
        "seconds": round(seconds, 1),
        "device": machine.device,
    }
    write_atomically(folder / DONE, json.dumps(done, indent=1).encode())


class Runner:
    """
    Does a plan.

    Args:
        plan: What is to be done.
        stages: Folder of the jobs' results; several studies may share it, one at a time.
        num_workers: Jobs done at a time, each on one core.
        machine: What they are done on.
    """

    def __init__(self, plan: Plan, stages: Path, num_workers: int, machine: Machine = ONE_CPU) -> None:
        self.plan, self.stages, self.num_workers, self.machine = plan, stages, num_workers, machine
        self.failed: dict[str, str] = {}

    def finished(self, job: Job) -> bool:
        """Whether its result is there."""
        return (self.stages / job.key / DONE).is_file()

    def _executor(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.num_workers, mp_context=context, initializer=_start_worker)

    def _ready(self, waiting: list[Job]) -> Job | None:
        for job in waiting:
            if all((self.stages / key / DONE).is_file() for key in job.inputs.values()):
                return job
        return None

    def run(self) -> None:
        """
        Does what is left to do. A job that fails costs what depends on it, no more.

        Attributes:
            failed: Labels of the jobs that failed, with the last line of their error.
        """
        waiting = [job for job in self.plan.jobs.values() if not self.finished(job)]
        if not waiting:
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        executor = self._executor()
        running: dict[Future[None], Job] = {}
        # Jobs that ran when a process died, as a simulator may take its own with it; which of them it was is not said.
        suspects: set[str] = set()
        try:
            with tqdm(total=len(waiting), desc=self.plan.study.name, unit="job") as bar:
                while waiting or running:
                    while len(running) < self.num_workers and (job := self._ready(waiting)) is not None:
                        if running and suspects & {job.key, *(other.key for other in running.values())}:
                            break  # alone, so that it harms none, and is known if it was the one
                        waiting.remove(job)
                        inputs = {role: self.stages / key for role, key in job.inputs.items()}
                        arguments = (self.stages / job.key, job.kind, job.settings, inputs, self.machine)
                        try:
                            running[executor.submit(_do, *arguments)] = job
                        except BrokenProcessPool:  # since the last look at it
                            waiting.insert(0, job)
                            if running:
                                break
                            executor = self._executor()
                    if not running:
                        return  # what is left waits for what has failed
                    bar.set_postfix_str(", ".join(job.label for job in running.values()))
                    done = wait(running, return_when=FIRST_COMPLETED).done
                    if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                        executor.shutdown(wait=False, cancel_futures=True)
                        executor = self._executor()
                        again = [job for job in running.values() if not self.finished(job) and job.key not in suspects]
                        suspects |= {job.key for job in again}
                        waiting[:0] = again
                        done = {future for future, job in running.items() if job not in again}
                        running = {future: running[future] for future in done}
                    for future in done:
                        job = running.pop(future)
                        if not self.finished(job):
                            error = future.exception()
                            if not (self.stages / job.key / ERROR).is_file():  # it died before it could say so
                                (self.stages / job.key).mkdir(parents=True, exist_ok=True)
                                write_atomically(self.stages / job.key / ERROR, repr(error).encode())
                            self.failed[job.label] = f"{error!r}; see {self.stages / job.key / ERROR}"
                            tqdm.write(f"failed: {job.label}: {error!r}")
                        bar.update()
        except BaseException:
            for process in list((executor._processes or {}).values()):
                process.kill()
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


__all__ = ["Runner", "error_of", "locked", "result_of"]
