"""Standard output that is closed, full, or read by nobody."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from advalign.cli.output import lasting_output
from advalign.errors import UserError
from advalign.runs import Run


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    terminal, program = pty.openpty()
    os.close(terminal)
    return program


@pytest.mark.parametrize("opened", [closed_pipe, closed_terminal])
def test_work_goes_on_when_nobody_reads_and_says_so_once(
    opened, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with os.fdopen(opened(), "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output("the work goes on"):
            for _ in range(3):
                print("x" * 100_000, flush=True)
        assert sys.stdout is stream
    assert capsys.readouterr().err == "the work goes on\n"


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with (
            pytest.raises(UserError, match="cannot write to standard output: No space left on device"),
            lasting_output(""),
        ):
            print("short enough for the buffer")


@pytest.mark.slow
def test_letters_that_a_terminal_cannot_show_are_escaped(monkeypatch: pytest.MonkeyPatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    with lasting_output(""):
        print("50 ± 2, \udcff")
    assert shown.getvalue() == b"50 \\xb1 2, \\udcff\n"


@pytest.mark.parametrize(
    "arguments",
    ["--help", *(pytest.param(each, marks=pytest.mark.slow) for each in ("list methods", "evaluate --help"))],
)
def test_a_full_standard_output_is_one_line_and_exit_code_2(arguments: str):
    command = f"{sys.executable} -m advalign {arguments} > /dev/full"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "advalign: error: cannot write to standard output: No space left on device\n"
    assert done.returncode == 2


@pytest.mark.slow
def test_training_goes_on_without_a_reader_of_its_output(tmp_path: Path):
    command = (
        f"{sys.executable} -m advalign train natural --data digits --model 'small-cnn(width=2)' --recipe digits"
        " --epochs 3 --subset 200 --validation 20 --device cpu --name run | head -1; exit ${PIPESTATUS[0]}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == "advalign: nobody reads the output any more; the work goes on\n"
    assert Run.read(tmp_path / "runs" / "run").finished
