"""One command for a GPU day: it keeps its time, goes on after a failure, resumes, and its commands are well-formed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
import yaml
from benchmarks.__main__ import Options
from benchmarks.gpu_day import NEEDED, PATIENCE, QUEUE, ROBUST, ROOT, TOY_ROBUST, Day, Task, work

from advalign.cli.commands import COMMANDS
from advalign.cli.parsing import parse_options
from advalign.training.recipes import short

STUBBORN = """
import signal, sys, time
from pathlib import Path
mark = Path(sys.argv[1]) / "stopped-before"
if mark.exists():
    sys.exit()
def save(*_):
    mark.touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
time.sleep(60)
"""


def write_run(folder: Path, data: str, epochs: int) -> None:
    folder.mkdir(parents=True)
    setting = {"method": "trades", "data": data, "recipe": {"epochs": epochs}}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "setting": setting}))


def test_a_day_keeps_its_time_goes_on_after_a_failure_and_resumes(tmp_path: Path):
    queue = (
        Task("fails", 1, ("-c", "import sys; print('why'); sys.exit(3)")),
        Task("slow", 0.01, ("-c", STUBBORN, "{out}")),
        Task("quick", 1, ("-c", "print('{seconds} s left')")),
        Task("no run", 1, ("-c", "pass", "{run}")),
        Task("no package", 1, ("-c", "pass"), needs=("there_is_no_such_package",)),
        Task("real alone", 1, (), toy=("-c", "pass")),
    )
    values = {"out": str(tmp_path / "out"), "work": str(tmp_path / "runs"), "data": "", "device": "cpu"}

    def call(minutes: float) -> dict[str, str]:
        day = Day(tmp_path / "out")
        work(queue, day, time.monotonic() + 60 * minutes, dict(values))
        return {name: task["status"] for name, task in json.loads(day.file.read_text()).items()}

    first = {"fails": "failed", "slow": "stopped", "quick": "done", "no run": "waiting", "no package": "waiting"}
    assert call(1) == first
    assert "why" in json.loads((tmp_path / "out" / "day.json").read_text())["fails"]["reason"]
    write_run(tmp_path / "runs" / "a", "digits", 1)  # of a rehearsal
    write_run(tmp_path / "runs" / "b", "cifar10", 200)  # of another scale
    assert call(1)["no run"] == "waiting"
    write_run(tmp_path / "runs" / "c", *ROBUST)
    before = (tmp_path / "out" / "quick.log").read_text()
    assert call(1) == {**first, "slow": "done", "no run": "done"}
    assert (tmp_path / "out" / "no run.log").read_text().split()[-1] == str(tmp_path / "runs" / "c")
    assert next(iter(json.loads((tmp_path / "out" / "day.json").read_text()))) == "fails"  # tried again, in its place
    assert (tmp_path / "out" / "quick.log").read_text() == before
    assert call(0)["fails"] == "failed"


def test_what_has_used_up_its_minutes_comes_last(tmp_path: Path):
    """What it used in earlier calls counts, and it waits for what is in time, whatever its worth."""
    first, second, third, failed = queue = [Task(name, 2, ("-c", "pass")) for name in ("a", "b", "c", "d")]
    day = Day(tmp_path)
    day.note(first, "stopped", 100)
    assert day.seconds_left(first) == 20
    assert list(day.still_to_do(queue)) == queue
    day.note(failed, "failed", 1)
    day.note(second, "stopped", 130)
    day.note(first, "stopped", 50)
    assert list(Day(tmp_path).still_to_do(queue)) == [third, failed, second, first]
    day.note(third, "done", 1)
    day.note(failed, "done", 1)
    assert list(Day(tmp_path).still_to_do(queue)) == [second, first]


def test_a_call_ends_in_its_time_whether_or_not_a_task_stops_in_time(tmp_path: Path):
    """Nothing is begun in the seconds that are kept for saving."""
    values = {"out": str(tmp_path), "work": str(tmp_path), "data": "", "device": "cpu"}
    day = Day(tmp_path)
    work([Task("a", 1, ("-c", "pass"))], day, time.monotonic() + PATIENCE - 1, values)
    assert not day.tasks


def test_the_runs_that_are_attacked_are_those_of_the_first_study():
    by_name = {task.name: task for task in QUEUE}
    assert by_name["table1"].words[3:6] == ("table1", "--scale", "short")
    assert ("cifar10", short().epochs) == ROBUST
    toy = yaml.safe_load((ROOT / by_name["table1"].toy[3]).read_text())
    assert (toy["data"], toy["recipe"]["epochs"]) == TOY_ROBUST


@pytest.mark.parametrize("task", QUEUE, ids=lambda task: task.name)
@pytest.mark.parametrize("toy", [False, True])
def test_the_commands_are_well_formed(task: Task, toy: bool):
    values = {"out": "o", "work": "w", "data": "d", "device": "cpu", "seconds": "5", "run": "r"}
    words = [word.format(**values) for word in (task.toy if toy else task.words)]
    if words[1:2] == ["advalign"]:
        options = COMMANDS[words[2]][0]
        parsed = parse_options(options, "advalign", words[3:])
        assert parsed.device == "cpu"
        study = getattr(parsed, "study", "")
        assert not study.endswith(".yaml") or (ROOT / study).is_file()
    elif words[1:2] == ["benchmarks"]:
        tyro.cli(Options, args=words[2:])
    elif words:
        assert words[1] == "pytest"
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))


def test_the_queue_of_the_results_is_that_of_the_command():
    queue = (ROOT / "results" / "README.md").read_text().partition("## Queue for a GPU")[2]
    listed = [line.split("`")[1] for line in queue.splitlines() if line[:1].isdigit()]
    assert listed == [task.name for task in QUEUE]


def test_all_that_the_library_imports_is_looked_for():
    """But for what few need: downloads, Parquet files, Ray, TensorBoard."""
    imported = re.compile(r"^\s*(?:from (\w+)[\w.]* import|import (\w+))", re.MULTILINE)
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    found = {"".join(names) for source in sources for names in imported.findall(source)}
    assert found - sys.stdlib_module_names - {"advalign", "_typeshed", "pooch", "pyarrow", "ray", "tensorboard"} <= set(
        NEEDED
    )


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--device", "cpu", "--toy", "--minutes", "9"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "day.json").exists()  # which says what is done in earnest
    out = tmp_path / "out" / "rehearsal"
    tasks = json.loads((out / "day.json").read_text())
    assert {name: task["status"] for name, task in tasks.items()} == dict.fromkeys(
        ("graphs", "table1", "autoattack"), "done"
    ), {path.name: path.read_text()[-500:] for path in out.glob("*.log")}
    assert (out / "toy" / "records.jsonl").is_file()
    assert json.loads((out / "environment.json").read_text())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout == ""
