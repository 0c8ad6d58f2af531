"""Files on disk: atomic, honest about damage, and free of code."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tests.samples import RECORD
from torch import nn

from advalign.errors import UserError
from advalign.runs import append_records, read_records
from advalign.runs.checkpoint import load_into, load_state, load_weights, save_state, save_weights
from advalign.runs.formats import LogRow, RunFile, read_checked_json, read_checked_lines, write_checked_lines
from advalign.runtime.files import remove_leftovers, write_atomically, write_json
from advalign.runtime.sealed import Owner


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_litter(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":

        class Full:
            write = full

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                return None

        monkeypatch.setattr(os, "fdopen", lambda handle, mode: (os.close(handle), Full())[1])
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(
        UserError, match=r"cannot write .*state: no space left on the disk; what was there is unchanged"
    ):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_as_readable_as_the_umask_says(umask: int, tmp_path: Path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "page.html", "text")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), rename(a, b))[1])
    write_atomically(tmp_path / "file", "text")
    assert calls == ["fsync", "replace"]


def test_json_round_trips_and_damage_is_named(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, None]}
    rows = [{"epoch": epoch, "lr": 0.1, "loss": 1.5, "terms": {"adv": 1.5}} for epoch in (1, 2)]
    write_checked_lines(tmp_path / "b.jsonl", rows)
    assert read_checked_lines(tmp_path / "b.jsonl", LogRow, "remove it") == rows
    assert read_checked_lines(tmp_path / "none.jsonl", LogRow, "remove it") == []
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.jsonl, line 2 is damaged .*: remove it"):
        read_checked_lines(tmp_path / "b.jsonl", LogRow, "remove it")
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        read_checked_json(tmp_path / "none.json", RunFile, "remove it")


def test_records_round_trip_and_a_new_measurement_replaces_the_old(tmp_path: Path):
    from dataclasses import replace

    path = tmp_path / "records.jsonl"
    attacked = replace(RECORD, attack="fgsm", accuracy=0.5)
    append_records(path, [RECORD, attacked])
    append_records(path, [replace(attacked, accuracy=0.4)])
    assert read_records(path) == [RECORD, replace(attacked, accuracy=0.4)]
    elsewhere = [replace(RECORD, data="npz"), replace(RECORD, precision="bf16"), replace(RECORD, attack="worst(fgsm)")]
    append_records(path, elsewhere)
    assert len(read_records(path)) == 5
    path.write_text('{"accuracy": 1.0}\n')
    with pytest.raises(UserError, match=r"records\.jsonl, line 1 is damaged or not of advalign"):
        read_records(path)


def test_weights_round_trip_with_their_card(tmp_path: Path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_weights(tmp_path / "a.safetensors", net, {"model": "mine", "classes": 4})
    state, card = load_weights(tmp_path / "a.safetensors")
    assert card == {"model": "mine", "classes": 4}
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, None),
        ({"weight": torch.zeros(2, 3)}, "has no 'bias'"),
        ({"weight": torch.zeros(4, 3), "bias": torch.zeros(2)}, r"'weight' is \(4, 3\), not \(2, 3\)"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "gain": torch.zeros(1)}, "no 'gain'"),
    ],
)
def test_state_that_does_not_fit_is_named_and_nothing_is_loaded(state: dict, words: str | None):
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    if words is None:
        load_into(net, state, "file")
        assert not net.weight.any()
    else:
        with pytest.raises(UserError, match=words):
            load_into(net, state, "file")
        assert torch.equal(net.weight, before)


def test_wrappers_of_a_state_dict_are_taken_off_where_there_is_one_meaning(tmp_path: Path):
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped = nn.DataParallel(net).state_dict()
    assert all(name.startswith("module.") for name in wrapped)
    for key in ("model", "net", "state_dict"):
        torch.save({key: wrapped, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "checkpoint.pt")
        load_into(other, load_weights(tmp_path / "checkpoint.pt")[0], "checkpoint.pt")
        assert torch.equal(other.weight, net.weight)
        nn.init.zeros_(other.weight)
    own = nn.ModuleDict({"module": other})  # a network that has a layer of that name keeps it
    load_into(own, wrapped, "file")
    assert torch.equal(other.weight, net.weight)


def test_a_pickled_network_is_answered_in_one_line_of_ours(tmp_path: Path):
    torch.save(nn.Linear(3, 2), tmp_path / "net.pt")
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "net.pt")
    assert str(error.value).endswith(
        "holds more than tensors (torch.nn.modules.linear.Linear); to keep a network, save `model.state_dict()`"
    )
    assert "weights_only" not in str(error.value)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (builtins.exec, ("raise SystemExit('executed')",))


def test_a_pickle_with_code_is_refused_unexecuted(tmp_path: Path):
    torch.save({"weight": _Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(tmp_path / "bomb.pt")


def test_what_a_kill_leaves_of_a_write_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill before the rename, and so without the clean-up."""
    path = tmp_path / "state.pt"
    write_atomically(path, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(path)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    assert path.read_bytes() == b"old"


KILLED = """
import os, sys
from pathlib import Path
from advalign.runtime.files import written_atomically
with written_atomically(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_the_next_write_in_a_folder_removes_what_dead_processes_have_left_and_no_more(tmp_path: Path):
    others = {".profile.original", ".notes.12345678", ".state.pt.abcdefgh.swp", "x.abcdefgh.draft"}
    for name in others:
        (tmp_path / name).touch()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("killed.state", "alive.state")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
    killed, alive = writers
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.glob(".*.draft"))) == 2
    write_atomically(tmp_path / "other.json", b"{}")
    (left,) = tmp_path.glob(".*.draft")
    assert left.name.startswith(".alive.state.")
    alive.communicate(b"")
    assert {file.name for file in tmp_path.iterdir()} == others | {"other.json", "alive.state"}
    assert (tmp_path / "alive.state").read_bytes() == b"half"


@pytest.mark.parametrize("line", ["3", "[]", "null", '"text"'])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path):
    write_checked_lines(tmp_path / "b.jsonl", [asdict(RECORD)])
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text() + line + "\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 2 is damaged or not of advalign: it is no JSON object"):
        read_records(tmp_path / "b.jsonl")


@pytest.mark.parametrize("state", [{}, [], 3, {"objective": {}}, {"optimizer": {}}, torch.zeros(2)], ids=repr)
def test_a_state_of_something_else_is_refused(state: object, tmp_path: Path):
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt is damaged or no state to go on from"):
        load_state(tmp_path / "state.pt")


def test_a_state_round_trips(tmp_path: Path):
    state = {"objective": {"weight": torch.arange(3.0)}, "optimizer": {"lr": 0.1}, "epoch": 2}
    owner = Owner("0123456789", "remove it")
    save_state(tmp_path / "state.pt", state, owner)
    with pytest.raises(UserError, match=r"state\.pt belongs to 0123456789, not to 9876543210: remove it"):
        load_state(tmp_path / "state.pt", owner=Owner("9876543210", "remove it"))
    loaded = load_state(tmp_path / "state.pt", owner=owner)
    assert torch.equal(loaded["objective"].pop("weight"), torch.arange(3.0))
    assert loaded == {"objective": {}, "optimizer": {"lr": 0.1}, "epoch": 2}
