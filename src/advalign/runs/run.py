"""A run is one training and one folder, named by what it is: method, data, model, and a digest of the whole setting."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from advalign.errors import UserError, quoted, require
from advalign.runs.formats import LogRow, RunFile, read_checked_json, read_checked_lines, write_checked_json
from advalign.runs.records import EVALUATE_AGAIN, Record, read_records
from advalign.runtime.files import digest, remove_leftovers, require_folder


@dataclass(frozen=True)
class Run:
    """A run's folder.

    It holds `run.json` (setting, environment, status), `log.jsonl` (a line an epoch), `best.safetensors` and
    `last.safetensors`, `records.jsonl` (evaluations), `trained_on.npy` (digests of its images) and `state.pt` (what it
    resumes from).
    """

    path: Path
    setting: Mapping[str, Any]

    @classmethod
    def at(
        cls, root: Path, setting: Mapping[str, Any], name: str | None = None, earlier: Sequence[Mapping[str, Any]] = ()
    ) -> Run:
        """Return the run of a setting below a root folder; nothing is written yet.

        Data of the user's own may have moved since the run was made, and their path may be part of an earlier version's
        id: such a run is found as well.

        Args:
            earlier: the same setting as earlier versions wrote it.

        Raises:
            UserError: the folder holds another setting (the first difference is named) or something else, cannot be
                made, or has a name that would lead elsewhere.
        """
        plain = name is None or re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*", name)
        require(bool(plain), lambda: f"name={quoted(name)} must be one plain folder name, and not begin with a dot")
        known = (setting, *earlier)
        run = cls(root / name, setting) if name else cls._named_by_setting(root, known)
        require_folder(run.path)
        if run._card.exists():
            there = _read_card(run._card)["setting"]
            if there in [_with_path(each) for each in known]:
                return cls(run.path, there)
            differences = [_difference(_identity(there), _identity(each)) for each in known]
            require(
                None in differences,
                lambda: f"{run.path} holds another run ({differences[0]}); choose another --name, nothing was changed",
            )
            return cls(run.path, known[differences.index(None)])
        elif run.path.exists():
            require(
                all(file.name.startswith(".") and file.is_file() for file in run.path.iterdir()),  # of a killed run
                lambda: f"{run.path} exists and is no run of advalign; choose another --name, nothing was changed",
            )
        return run

    @classmethod
    def _named_by_setting(cls, root: Path, known: Sequence[Mapping[str, Any]]) -> Run:
        """Return the run in the folder that is named by its setting; where there is none yet, an earlier one."""
        run = cls(root / _folder_name(known[0]), known[0])
        built_in = len(known) == 1 and data_kind(run.setting["data"]) == run.setting["data"]
        if built_in or run._card.exists():
            return run
        for setting in known:
            moved = (cls(path, setting) for path in sorted(root.glob(f"*-{run_id(setting)}")))
            before = cls(root / _folder_name(_with_path(setting)), setting)
            if found := next((each for each in (*moved, before) if each._card.exists()), None):
                return found
        return run

    @classmethod
    def read(cls, path: Path) -> Run:
        """Open an existing run folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if not (path / "run.json").is_file():
            inside = [repr(str(card.parent)) for card in islice(path.glob("*/run.json"), 3)]
            runs = f"; did you mean a run in it, such as {' or '.join(inside)}?" if inside else ""
            raise UserError(f"{str(path)!r} is no run folder: it has no run.json{runs}")
        return cls(path, _read_card(path / "run.json")["setting"])

    @property
    def id(self) -> str:
        """The digest of the setting, without the path of the user's own data, which are known by their content."""
        return run_id(self.setting)

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done, and the training has not diverged."""
        return self._card.exists() and _read_card(self._card)["status"] == "finished"

    @property
    def warning(self) -> str:
        """What makes the trained model doubtful, in a sentence; mostly nothing."""
        return _read_card(self._card).get("warning", "") if self._card.exists() else ""

    @property
    def environment(self) -> dict[str, str]:
        """What the run was trained with: versions, commit, hardware."""
        return _read_card(self._card)["environment"]

    @property
    def log(self) -> list[dict[str, Any]]:
        """One row an epoch: loss terms, learning rate, and validation accuracies where it was validated."""
        remedy = "remove it; the next epoch writes it anew"
        rows = read_checked_lines(self._log, LogRow, remedy, self.id)
        whole = not rows or not self.finished or len(rows) == self.setting.get("recipe", {}).get("epochs", len(rows))
        require(
            whole and [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)),
            lambda: f"{self._log} is damaged, epochs are missing: {remedy}",
        )
        return rows

    @property
    def records(self) -> list[Record]:
        """The accuracies measured so far; those of weights without a training record beside them name no run."""
        file = self.path / "records.jsonl"
        records = read_records(file)
        others = sorted({record.run for record in records} - {self.id, ""})
        require(not others, lambda: f"{file} has records of run {others[0]}, not of {self.id}: {EVALUATE_AGAIN}")
        return records

    @property
    def state(self) -> Path:
        """What the run resumes from."""
        return self.path / "state.pt"

    def weights(self, checkpoint: str) -> Path:
        """Return the weights file of `best` or `last`."""
        return self.path / f"{checkpoint}.safetensors"

    def write_card(
        self, status: str, environment: Mapping[str, str], about_data: Mapping[str, Any], warning: str = ""
    ) -> None:
        """Write run.json.

        Args:
            status: `running`, `finished`, or `diverged` after the last epoch.
            about_data: names of the classes and preprocessing of the images, which do not name the run.
            warning: what makes the trained model doubtful.
        """
        card = {"id": self.id, "status": status, "setting": self.setting, "environment": dict(environment)}
        write_checked_json(self._card, {**card, **about_data, **({"warning": warning} if warning else {})})

    @property
    def good_state(self) -> Path:
        """What a guarded training goes back to."""
        return self.path / "good.pt"

    def remove_leftovers(self) -> None:
        """Remove the temporary files that a kill has left of what training writes; for who holds the folder's lock."""
        for file in (self._card, self._log, self.state, self.good_state, self.weights("best"), self.weights("last")):
            remove_leftovers(file)

    def require_space(self, needed: int) -> None:
        """Refuse to start where the disk cannot hold the run.

        Raises:
            UserError: how much is free and how much is needed, in MiB.
        """
        folder = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
        require(
            free >= needed,
            lambda: f"no space for {self.path}: {free >> 20} MiB are free and the run needs {max(needed >> 20, 1)} MiB",
        )

    @property
    def _card(self) -> Path:
        return self.path / "run.json"

    @property
    def _log(self) -> Path:
        return self.path / "log.jsonl"


def data_kind(name: str) -> str:
    """Return what kind of data a name stands for, without their path: `digits`, `npz`, `folder`."""
    kind = name.partition(":")[0]
    return "folder" if kind.startswith("folder-") else kind


def run_id(setting: Mapping[str, Any]) -> str:
    """Return the id of the run of a setting."""
    return setting_digest(_identity(setting))


def _identity(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a setting that names the run; a path counts in settings of earlier versions alone."""
    return {**setting, "data": data_kind(setting["data"])} if "class_names" in setting else setting


def _with_path(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a setting as earlier versions wrote it: known by the path of the data, and without names of classes."""
    return {key: value for key, value in setting.items() if key != "class_names"}


def setting_digest(setting: Mapping[str, Any]) -> str:
    """Return ten hexadecimal digits that name a setting."""
    return digest(json.dumps(setting, sort_keys=True), digits=10)


def _folder_name(setting: Mapping[str, Any]) -> str:
    return f"{_slug(setting)}-{run_id(setting)}"


def _slug(setting: Mapping[str, Any]) -> str:
    """Return a folder's name for method, data and model; of data in a path, kind and last part."""
    kind, _, path = setting["data"].partition(":")
    data = "-".join(filter(None, (kind, Path(path).name.removesuffix(".npz"))))
    label = f"{setting['method']}-{data}-{setting['model']}"
    return re.sub(r"[^\w.+=-]+", "_", label.replace("/255", "of255")).strip("_")


def _read_card(path: Path) -> dict[str, Any]:
    """Read a run.json, and refuse one whose setting is not that of its id."""
    card = read_checked_json(path, RunFile, "fetch the folder again, or remove it and train again")
    named = run_id(card["setting"])
    require(
        card["id"] == named,
        lambda: f"{path} was edited: its setting is that of run {named}, not of {card['id']}; fetch the folder again",
    )
    return card


def _difference(there: Any, here: Any, name: str = "") -> str | None:
    """Describe the first value in which two settings differ."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        inner = (_difference(there.get(k), here.get(k), f"{name}.{k}" if name else k) for k in {**there, **here})
        return next(filter(None, inner), None)
    return None if there == here else f"{name} is {there!r} there and {here!r} here"
