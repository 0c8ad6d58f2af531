"""What a GPU is wanted for, in order of worth: `python -m benchmarks.gpu_day --minutes 14 --data-dir DIR`.

Each task is a command of this repository with a time limit. Its output and what it measures lie in `--out` as they
come, with `day.json`, which says how each task ended; weights lie in `--work`. The same call goes on with any number of
minutes: finished tasks are not run again; those that have used up their minutes, or failed, are tried after the others.
Studies go on where they stopped; a task of the benchmarks, which is one workload, begins anew. `--device cpu --toy`
rehearses it in toy sizes, in folders `rehearsal` of its own below `--out` and `--work`.

The machine needs the repository, Python 3.12 and torch (written for 2.13; 2.11 should do), with `PYTHONPATH=src`, and
no installation. Beside torch and NumPy the library imports, and what is missing is named before anything is run:

- of pure Python: tyro (docstring-parser, typeguard, typing-extensions), rich (markdown-it-py, mdurl, pygments),
  jaxtyping (wadler-lindig), beartype, filelock, lazy-loader, jinja2;
- compiled, as a wheel for the machine's Python: msgspec, safetensors, pillow, pyyaml, markupsafe, matplotlib
  (contourpy, cycler, fonttools, kiwisolver, packaging, pyparsing, python-dateutil, six), and scikit-learn (scipy,
  joblib, threadpoolctl) for digits;
- for the first task pytest (iniconfig, pluggy) with pytest-xdist (execnet) and hypothesis (sortedcontainers).

pooch, which downloads data, is not needed where `--data-dir` holds them. Wheels are carried by
`pip download --no-deps --only-binary=:all: --python-version 3.12 -d WHEELS NAME` and
`pip install --no-index --no-deps --target SITE WHEELS/*.whl`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "numpy", "tyro", "rich", "jaxtyping", "beartype", "filelock", "lazy_loader", "jinja2", "msgspec",
          "markupsafe", "safetensors", "PIL", "yaml", "matplotlib", "scipy", "sklearn")  # fmt: skip
PATIENCE = 45.0
"""Seconds that a task has to save its state when its time is up; within the minutes of the call."""
ROBUST, TOY_ROBUST = ("cifar10", 30), ("digits", 1)
"""Data and epochs of the runs that are attacked: those of the first study."""


@dataclass(frozen=True)
class Task:
    """A command, its words after `python`, and how long it may take in all calls before others have had their turn.

    In the words, {device}, {data}, {out}, {work}, {seconds} and {run} stand for the options, the time that is left and
    a robust run that is finished.
    """

    name: str
    minutes: float
    words: tuple[str, ...]
    toy: tuple[str, ...] = ()
    """in a rehearsal; left out if empty"""
    needs: tuple[str, ...] = ()
    """packages"""


def _study(name: str, *more: str) -> tuple[str, ...]:
    """Return the words of a study, whose results are in a folder of its own, also at another scale."""
    folder = "-".join([Path(name).stem, *more[1:2]])
    folders = ("--runs", "{work}", "--out", "{out}/" + folder, "--time-budget", "{seconds}s")
    return ("-m", "advalign", "study", name, *more, "--device", "{device}", *folders)


TIMED = ("-m", "benchmarks", "--device", "{device}", "--rounds", "3", "--steps", "20", "--images", "10000",
         "--data-dir", "{data}", "--out")  # fmt: skip
EVALUATE = ("-m", "advalign", "evaluate", "{run}", "--device", "{device}")
TESTS = ("-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/training/test_step.py", "-k")
TOY = "benchmarks/toy.yaml"
WORKLOADS = {
    "time-natural": "natural", "time-at": "at", "time-trades": "trades", "time-lbgat": "trades+lbgat",
    "time-epoch": "natural epoch", "time-attacks": "PGD-20",
}  # fmt: skip
"""Those of the benchmarks beside the headline, by the task's name; C&W comes with PGD-20."""
QUEUE = (
    Task("graphs", 2, (*TESTS, "gpu"), (*TESTS, "made_once"), needs=("pytest", "xdist", "hypothesis")),
    Task("headline", 3, (*TIMED, "{out}/headline", "--only", "trades+vfd")),
    Task("table1", 60, _study("table1", "--scale", "short", "--data-dir", "{data}"), _study(TOY)),
    Task(
        "autoattack", 10,
        (*EVALUATE, "--data-dir", "{data}", "--attacks", "autoattack"),
        (*EVALUATE, "--attacks", "fgsm"),
    ),
    *(Task(name, 4, (*TIMED, "{out}/" + name, "--only", workload)) for name, workload in WORKLOADS.items()),
    Task("precision", 30, _study("examples/precision.yaml")),
    Task("table2", 600, _study("table2", "--scale", "short", "--data-dir", "{data}")),
    Task("table1-paper", 6000, _study("table1", "--scale", "paper", "--data-dir", "{data}")),
)  # fmt: skip


class Day:
    """A folder of results, and how each task ended so far."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "day.json"
        out.mkdir(parents=True, exist_ok=True)
        self.tasks: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def note(self, task: Task, status: str, seconds: float, reason: str = "") -> None:
        """Keep how a task has ended: done, stopped, failed or waiting."""
        before = self.tasks.get(task.name, {}).get("seconds", 0.0)
        self.tasks[task.name] = {"status": status, "seconds": round(before + seconds, 1), "reason": reason}
        fresh = self.file.with_suffix(".part")
        fresh.write_text(json.dumps(self.tasks, indent=1) + "\n")
        fresh.replace(self.file)
        print(f"{task.name}: {status} after {seconds:.0f} s{reason and ': '}{reason}", flush=True)

    def still_to_do(self, queue: Sequence[Task]) -> Iterator[Task]:
        """Yield what is not done, in the order of the queue; last what has failed or used up its minutes.

        Of these, what is the least above its minutes comes first.
        """
        status = {task.name: self.tasks.get(task.name, {}).get("status", "") for task in queue}
        in_time = [
            task for task in queue if status[task.name] not in ("done", "failed") and self.seconds_left(task) > 0
        ]
        last = [task for task in queue if status[task.name] != "done" and task not in in_time]
        yield from in_time
        yield from sorted(last, key=lambda task: -self.seconds_left(task) / task.minutes)

    def seconds_left(self, task: Task) -> float:
        """Return what a task has not used of its minutes."""
        return 60 * task.minutes - self.tasks.get(task.name, {}).get("seconds", 0.0)


def work(queue: Sequence[Task], day: Day, deadline: float, values: dict[str, str], *, toy: bool = False) -> None:
    """Run what is not done of a queue until the deadline, in the seconds of `time.monotonic`."""
    for task in day.still_to_do(queue):
        words, left = task.toy if toy else task.words, deadline - PATIENCE - time.monotonic()
        if not words or left <= 0:
            continue
        missing = [name for name in task.needs if find_spec(name) is None]
        values["run"] = _robust_run(Path(values["work"]), *(TOY_ROBUST if toy else ROBUST))
        absent = [name for name in ("data", "run") if f"{{{name}}}" in " ".join(words) and not values[name]]
        if missing or absent:
            reason = f"not installed: {', '.join(missing)}" if missing else f"there is no {absent[0]} yet"
            day.note(task, "waiting", 0, reason)
            continue
        own = day.seconds_left(task)
        seconds = min(left, own) if own > 0 else left
        values["seconds"] = str(max(1, int(seconds - PATIENCE / 3)))
        began = time.monotonic()
        status, reason = _run([word.format(**values) for word in words], day.out / f"{task.name}.log", seconds)
        day.note(task, status, time.monotonic() - began, reason)


def _run(words: list[str], log: Path, seconds: float) -> tuple[str, str]:
    """Run a command with its output in a file; return how it ended, and the last line if it failed."""
    with log.open("a") as output:
        print("python", *words, file=output, flush=True)
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # on which advalign saves its state
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            return "stopped", "its time was up"
        except BaseException:
            process.kill()
            raise
    written = log.read_text().strip().splitlines()
    if code == 0:  # a study that has used up its time ends well, and says so
        return ("stopped", written[-1]) if any(line.startswith("Stopped:") for line in written[-3:]) else ("done", "")
    return "failed", f"code {code}: {written[-1][:200]}"


def _robust_run(work: Path, data: str, epochs: int) -> str:
    """Return the folder of a finished run of a robust method on these data for so many epochs, or the empty string."""
    for card in sorted(work.glob("*/run.json")):
        content = json.loads(card.read_text())
        setting = content["setting"]
        found = setting["data"], setting["recipe"].get("epochs")
        if content["status"] == "finished" and setting["method"] != "natural" and found == (data, epochs):
            return str(card.parent)
    return ""


def main() -> None:
    """Run the queue for so many minutes."""
    parser = argparse.ArgumentParser(description="Run what a GPU is wanted for, in order of worth, resumable.")
    parser.add_argument("--minutes", type=float, default=14.0, help="of this call")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 and CIFAR-100 lie")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="what is to be kept")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="run folders, with weights")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--toy", action="store_true", help="a rehearsal in toy sizes, of half a minute")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(missing)}; see the head of {__file__}")
    from advalign.runtime.environment import environment

    out, work_folder = (
        folder.absolute() / ("rehearsal" if options.toy else "") for folder in (options.out, options.work)
    )
    day = Day(out)
    (day.out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    data = "" if options.data_dir is None else str(options.data_dir.absolute())
    values = {"device": options.device, "data": data, "out": str(day.out), "work": str(work_folder)}
    work(QUEUE, day, deadline, values, toy=options.toy)


if __name__ == "__main__":
    main()
