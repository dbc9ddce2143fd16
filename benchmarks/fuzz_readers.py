"""
Feeds damaged files to every reader: each must be read, refused with an error that names the file, or skipped.

    python benchmarks/fuzz_readers.py --cases 100000 [--targets h264.mp4 tfrecord] [--seed 0] [--findings FOLDER]
    python benchmarks/fuzz_readers.py --replay h264.mp4:0:1234

Cases are dealt evenly to the targets (`tests/fuzz_targets.py`); what a case is depends on its target, the seed and its number
only. They run in a process of their own with limits on time and memory. Findings are whatever else happens: another
exception, an error that does not say where, a case that takes too long, a process that dies or grows. A finding is
printed with what replays it, and its file is kept in `--findings`. Exit status 1 where there are any.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from fuzz_targets import TARGETS, Target

OUTCOMES = ("ok", "error", "skip")
# Processor seconds of one case, and seconds on the clock, which a busy machine may stretch.
CPU_SECONDS, WALL_SECONDS = 10.0, 120.0
# What a case may take beyond what the process had: a decoder keeps up to 17 frames of up to 4096 x 4096 pixels.
MEMORY_BYTES = 1536 << 20
# Also libav says so, where it would otherwise look like a damaged file.
NO_MEMORY = "Cannot allocate memory"
CASES_PER_PROCESS = 2000


@dataclass(frozen=True)
class Case:
    """One damaged input."""

    target: str
    seed: int
    number: int

    def __str__(self) -> str:
        return f"{self.target}:{self.seed}:{self.number}"

    def damaged(self, target: Target) -> tuple[str, bytes]:
        """Which file is damaged, and its content."""
        return target.damaged(random.Random(str(self)))


def outcome(target: Target, root: Path) -> tuple[str, str]:
    """What reading a folder comes to, and what is said."""
    try:
        skipped = target.read(root)
    except MemoryError:
        return "memory", traceback.format_exc()
    except ValueError as error:
        kind, said = "error", [str(error)]
        # A decoding error in what should be text, for one, is a ValueError by accident.
        if type(error).__module__ == "builtins" and type(error) is not ValueError:
            return "exception", traceback.format_exc()
    except Exception:
        return "exception", traceback.format_exc()
    else:
        kind, said = "skip" if skipped else "ok", skipped
    if any(str(root) not in message for message in said):
        return "unnamed", next(message for message in said if str(root) not in message)
    return kind, said[0] if said else ""


def work(target: Target, cases: Sequence[Case], out: Connection) -> None:
    """Runs cases and reports each before and after; the process that this runs in may be lost."""
    limit = _memory("VmSize") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    # libav and PIL print what they think of each file.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast_folder()) as folder:
        root = Path(folder)
        for path, content in target.files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        for case in cases:
            path, content = case.damaged(target)
            out.send((case.number, None, ""))
            (root / path).write_bytes(content)
            before = _memory("VmHWM")
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            kind, said = outcome(target, root)
            if NO_MEMORY in said:
                # libav also says so of what it refuses by its own limits: with more at hand, does it take more?
                resource.setrlimit(resource.RLIMIT_AS, (4 * limit, resource.RLIM_INFINITY))
                kind, said = outcome(target, root)
            if kind in OUTCOMES and _memory("VmHWM") - before > MEMORY_BYTES // 2:
                kind, said = "memory", f"grew by {(_memory('VmHWM') - before) >> 20} MiB"
            (root / path).write_bytes(target.files[path])
            out.send((case.number, kind, said))
    out.send(None)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _memory(key: str) -> int:
    """Bytes by a key of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(f"{key}:"))


def run_target(name: str, seed: int, count: int) -> tuple[Counter[str], list[tuple[Case, str, str]]]:
    """Runs the cases of one target; returns how often each came out, and the findings."""
    totals: Counter[str] = Counter()
    findings: list[tuple[Case, str, str]] = []
    context = multiprocessing.get_context("fork")
    # Made here, as encoders need more than the limits.
    target = TARGETS[name]()
    start = 0
    while start < count:
        numbers = range(start, min(start + CASES_PER_PROCESS, count))
        cases = [Case(name, seed, number) for number in numbers]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(target, cases, sender), daemon=True)
        process.start()
        sender.close()
        start = _collect(
            process,
            receiver,
            numbers,
            totals,
            lambda n, kind, said: findings.append((Case(name, seed, n), kind, said)),
        )
    return totals, findings


def _collect(process, receiver, numbers, totals, found) -> int:
    """Takes in what a process reports until it ends, by itself or not; returns the number of the next case to run."""
    current, began, spent = numbers.start, time.monotonic(), 0.0
    while True:
        if not receiver.poll(0.5):
            if time.monotonic() - began > WALL_SECONDS or _cpu_seconds(process.pid) - spent > CPU_SECONDS:
                kind, said = "hang", f"more than {CPU_SECONDS:g} s of processor time or {WALL_SECONDS:g} s"
                break
            continue
        try:
            message = receiver.recv()
        except EOFError:
            process.join()
            kind, said = "crash", f"the process ended by itself ({process.exitcode})"
            break
        if message is None:
            process.join()
            return numbers.stop
        number, kind, said = message
        if kind is None:
            current, began, spent = number, time.monotonic(), _cpu_seconds(process.pid)
            continue
        totals[kind] += 1
        if kind not in OUTCOMES:
            found(number, kind, said)
    process.kill()
    process.join()
    totals[kind] += 1
    found(current, kind, said)
    return current + 1


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def replay(text: str) -> int:
    """Runs one case in this process, with what it says on the screen."""
    name, seed, number = text.rsplit(":", 2)
    case, target = Case(name, int(seed), int(number)), TARGETS[name]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for path, content in target.files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(content)
        path, content = case.damaged(target)
        (Path(folder) / path).write_bytes(content)
        print(f"{path}: {len(content)} bytes")
        began = time.process_time()
        kind, said = outcome(target, Path(folder))
    print(f"{kind} after {time.process_time() - began:.2f} s of processor time: {said}")
    return int(kind not in OUTCOMES)


def print_table(results: dict[str, Counter[str]]) -> None:
    """One Markdown row per target."""
    print("| input | cases | read | refused | skipped | findings |\n|---|---|---|---|---|---|")
    for name, totals in {**results, "all": sum(results.values(), Counter())}.items():
        known = [totals[kind] for kind in OUTCOMES]
        print(f"| {name} | {totals.total()} | {' | '.join(map(str, known))} | {totals.total() - sum(known)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="damaged inputs in all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, help="folder that the files of findings are kept in")
    parser.add_argument("--replay", metavar="TARGET:SEED:NUMBER", help="run one case again")
    options = parser.parse_args(arguments)
    if options.replay:
        return replay(options.replay)
    share = -(-options.cases // len(options.targets))
    results: dict[str, Counter[str]] = {}
    failed = False
    for name in options.targets:
        began = time.monotonic()
        results[name], findings = run_target(name, options.seed, share)
        seconds = time.monotonic() - began
        print(f"{name}: {json.dumps(results[name])} in {seconds:.0f} s", file=sys.stderr, flush=True)
        for case, kind, said in findings:
            failed = True
            print(f"FINDING {kind} {case}\n{said}", file=sys.stderr, flush=True)
            if options.findings:
                path, content = case.damaged(TARGETS[name]())
                options.findings.mkdir(parents=True, exist_ok=True)
                kept = f"{str(case).replace(':', '-')}-{kind}-{path.replace('/', '-')}"
                (options.findings / kept).write_bytes(content)
    print_table(results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
