"""A run's folder: its name, what is accepted as one, and what damage is refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from advalign import models
from advalign.errors import UserError
from advalign.runs import Run, load
from advalign.runs.checkpoint import save_weights

SETTING = {"method": "trades", "data": "digits", "model": "small-cnn(width=4)", "recipe": {"eps": 0.2}}
CARD = {"model": "small-cnn(width=4)", "classes": 10, "channels": 1}


def made(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("data", "start"),
    [
        ("digits", "trades-digits-small-cnn_width=4"),
        ("folder:/home/me/pictures/tex", "trades-folder-tex-small-cnn_width=4"),
        ("folder:/home/me/v1.2", "trades-folder-v1.2-small-cnn_width=4"),
        ("npz:/home/me/good.npz", "trades-npz-good-small-cnn_width=4"),
        ("npz:/home/me/a b:c.npz", "trades-npz-a_b_c-small-cnn_width=4"),
        ("folder:/", "trades-folder-small-cnn_width=4"),
    ],
)
def test_a_folder_is_named_by_kind_and_last_part_of_the_data(data: str, start: str, tmp_path: Path):
    run = Run.at(tmp_path, {**SETTING, "data": data})
    assert run.path == tmp_path / f"{start}-{run.id}"
    assert not run.path.exists()


OWN = {**SETTING, "images": "0123", "class_names": ["cat", "dog"]}
"""A setting with data of the user's own."""


def test_data_of_one_name_with_other_content_are_two_runs(tmp_path: Path):
    runs = [Run.at(tmp_path, {**OWN, "data": "npz:/a/good.npz", "images": images}) for images in ("0123", "4567")]
    runs.append(Run.at(tmp_path, {**OWN, "data": "npz:/a/good.npz", "class_names": ["dog", "cat"]}))
    runs.append(Run.at(tmp_path, {**OWN, "data": "folder:/a/good.npz"}))
    assert len({run.path for run in runs}) == len({run.id for run in runs}) == 4


def test_without_names_of_classes_the_path_counts_as_in_earlier_versions(tmp_path: Path):
    a, b = (Run.at(tmp_path, {**SETTING, "data": f"npz:/{place}/good.npz"}) for place in "ab")
    assert a.path != b.path


@pytest.mark.parametrize("name", [None, "mine"])
@pytest.mark.parametrize("moved", ["folder:/elsewhere/photos", "folder:/photos/renamed", "folder-splits:/photos"])
def test_data_that_have_moved_are_the_same_run(moved: str, name: str | None, tmp_path: Path):
    run = Run.at(tmp_path, {**OWN, "data": "folder:/photos"}, name)
    run.write_card("finished", {}, {})
    again = Run.at(tmp_path, {**OWN, "data": moved}, name)
    assert (again.path, again.id, again.finished) == (run.path, run.id, True)
    again.write_card("finished", {}, {})
    assert Run.read(run.path).setting["data"] == moved


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_run_of_an_earlier_version_is_found_by_the_path_of_its_data(name: str | None, tmp_path: Path):
    before = {**SETTING, "data": "folder:/photos", "images": "0123"}
    run = Run.at(tmp_path, before, name)
    run.write_card("running", {}, {})
    again = Run.at(tmp_path, {**OWN, "data": "folder:/photos"}, name)
    assert (again.path, again.id, again.setting) == (run.path, run.id, before)
    again.write_card("finished", {}, {})
    assert Run.read(run.path).finished
    other = {**OWN, "data": "folder:/photos", "images": "4567"}
    if name is None:
        assert Run.at(tmp_path, other).path != run.path
    else:
        with pytest.raises(UserError, match="holds another run"):
            Run.at(tmp_path, other, name)


def test_a_name_is_taken_as_it_is(tmp_path: Path):
    assert Run.at(tmp_path, SETTING, "my run, v1.2 (é)").path == tmp_path / "my run, v1.2 (é)"


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/up", "a/", "a\\b", ".hidden", "two\nlines", "nul\0"])
def test_a_name_that_is_not_one_plain_folder_name_is_refused(name: str, tmp_path: Path):
    with pytest.raises(UserError, match="must be one plain folder name") as refusal:
        Run.at(tmp_path / "runs", SETTING, name)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("root", ["file", "file/runs", "file/deep/runs", "dangling", "dangling/runs"])
def test_a_root_that_cannot_be_a_folder_is_refused(root: str, tmp_path: Path):
    (tmp_path / "file").write_text("rain")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path}/{root.partition('/')[0]} is not a folder"):
        Run.at(tmp_path / root, SETTING)
    assert names(tmp_path) == {"file", "dangling"}
    assert (tmp_path / "file").read_text() == "rain"


def test_a_root_behind_a_link_or_still_to_be_made_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    for root in ("link", "link/deep/er", "new/er"):
        assert Run.at(Path(root), SETTING, "mine").path == Path(root, "mine")
    assert names(tmp_path) == {"there", "link"}


def test_a_name_too_long_for_the_disk_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="File name too long"):
        Run.at(tmp_path, SETTING, 300 * "a")


def test_a_folder_that_a_kill_left_before_its_first_run_json_is_accepted(tmp_path: Path):
    folder = made(tmp_path / "mine", ".lock", ".run.json.ab12_xyz")
    run = Run.at(tmp_path, SETTING, "mine")
    run.write_card("running", {}, {})
    assert Run.read(folder).setting == SETTING


@pytest.mark.parametrize("what", ["monday.txt", "run.jsonl", "state.pt"])
def test_a_folder_with_files_of_others_is_refused(what: str, tmp_path: Path):
    made(tmp_path / "mine", ".lock", what)
    with pytest.raises(UserError, match="mine exists and is no run of advalign"):
        Run.at(tmp_path, SETTING, "mine")
    made(tmp_path / "repository" / ".git")
    with pytest.raises(UserError, match="repository exists and is no run of advalign"):
        Run.at(tmp_path, SETTING, "repository")


def test_leftovers_of_training_are_removed_and_nothing_else(tmp_path: Path):
    ours = {"run.json", "log.jsonl", "state.pt", "best.safetensors", "last.safetensors", "records.jsonl"}
    # An evaluation writes its records without the lock: its temporary file may be in use.
    others = {".lock", ".records.jsonl.ab12_xyz", ".log.jsonl.swp", ".gitignore", "notes.txt", "state.pt.ab12_xyz"}
    left = {f".{name}.{end}" for name in ours - {"records.jsonl"} for end in ("ab12_xyz", "00000000")}
    folder = made(tmp_path / "mine", *ours, *others, *left)
    elsewhere = made(tmp_path / "other", ".state.pt.ab12_xyz")
    Run(folder, SETTING).remove_leftovers()
    assert names(folder) == ours | others
    assert all((folder / name).read_text() == name for name in ours | others)
    assert names(elsewhere) == {".state.pt.ab12_xyz"}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        3,
        None,
        {"status": "finished"},
        {"setting": SETTING},
        {"setting": {}, "status": "finished"},
        {"setting": [], "status": "finished"},
    ],
    ids=repr,
)
def test_a_run_json_of_something_else_is_refused(content: Any, tmp_path: Path):
    (made(tmp_path / "mine") / "run.json").write_text(json.dumps(content))
    for use in (
        lambda: Run.read(tmp_path / "mine"),
        lambda: Run.at(tmp_path, SETTING, "mine"),
        lambda: Run(tmp_path / "mine", SETTING).finished,
        lambda: load(tmp_path / "mine"),
    ):
        with pytest.raises(UserError, match=r"mine/run\.json is damaged or not of advalign"):
            use()


def test_whole_cards_are_read(tmp_path: Path):
    run = Run.at(tmp_path, SETTING, "mine")
    assert not run.finished
    for status, finished in (("running", False), ("finished", True)):
        run.write_card(status, {}, {})
        assert Run.at(tmp_path, SETTING, "mine").finished is finished
        assert Run.read(run.path).finished is finished
    with pytest.raises(UserError, match=r"recipe\.eps is 0\.2 there and 0\.1 here"):
        Run.at(tmp_path, {**SETTING, "recipe": {"eps": 0.1}}, "mine")


def test_a_folder_of_runs_is_none_and_one_in_it_is_named(tmp_path: Path):
    run = Run.at(tmp_path, SETTING)
    with pytest.raises(UserError, match=r"is no run folder: it has no run.json$"):
        Run.read(tmp_path)
    run.write_card("running", {}, {})
    with pytest.raises(
        UserError, match=r"it has no run.json; did you mean a run in it, such as '.*trades-digits-.*'\?$"
    ):
        load(tmp_path)
    with pytest.raises(
        UserError, match=r"no run folder or weights file '.*/trades'; did you mean '.*trades-digits-.*'\?$"
    ):
        load(tmp_path / "trades")


def test_weights_are_loaded_by_their_card(tmp_path: Path):
    torch.manual_seed(0)
    net = models.build(CARD["model"], classes=10, channels=1)
    save_weights(tmp_path / "a.safetensors", net, CARD)
    loaded = load(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("key", ["model", "classes", "channels"])
def test_a_weights_card_without_the_architecture_is_refused(key: str, tmp_path: Path):
    net = models.build(CARD["model"], classes=10, channels=1)
    for card in ({k: v for k, v in CARD.items() if k != key}, {**CARD, key: None}):
        save_weights(tmp_path / "a.safetensors", net, card)
        with pytest.raises(
            UserError, match=rf"a\.safetensors is damaged .*: its card (does not tell {key}|is wrong .*{key})"
        ):
            load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("card", ["[]", "3", "null", '"small-cnn"'])
def test_a_weights_card_that_is_no_object_is_refused(card: str, tmp_path: Path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"card": card})
    with pytest.raises(UserError, match=r"a\.safetensors is damaged .*: its card is no JSON object"):
        load(tmp_path / "a.safetensors")
