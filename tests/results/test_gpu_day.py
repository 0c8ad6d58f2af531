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
from benchmarks.__main__ import Options
from benchmarks.gpu_day import NEEDED, QUEUE, ROOT, Day, Task, work

from advalign.cli.commands import COMMANDS
from advalign.cli.parsing import parse_options

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
    run = tmp_path / "runs" / "some"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": "finished", "setting": {"method": "trades"}}))
    before = (tmp_path / "out" / "quick.log").read_text()
    assert call(1) == {**first, "slow": "done", "no run": "done"}
    assert next(iter(json.loads((tmp_path / "out" / "day.json").read_text()))) == "fails"  # tried again, in its place
    assert (tmp_path / "out" / "quick.log").read_text() == before
    assert call(0)["fails"] == "failed"


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
    tasks = json.loads((tmp_path / "out" / "day.json").read_text())
    assert {name: task["status"] for name, task in tasks.items()} == dict.fromkeys(
        ("graphs", "table1", "autoattack"), "done"
    ), {path.name: path.read_text()[-500:] for path in (tmp_path / "out").glob("*.log")}
    assert (tmp_path / "out" / "toy" / "records.jsonl").is_file()
    assert json.loads((tmp_path / "out" / "environment.json").read_text())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout == ""
