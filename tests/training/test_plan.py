"""Plans: values, checked when they are made, with a trial step that equal plans make once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advalign.data import AUGMENTATIONS, load
from advalign.errors import UserError
from advalign.models import build
from advalign.objectives import parse
from advalign.training import planning
from advalign.training.announcement import guest_lines, time_line
from advalign.training.plan import Plan
from advalign.training.planning import plan
from advalign.training.recipes import Recipe, digits
from advalign.training.train import train

MODEL = "small-cnn(width=4)"
QUICK = replace(digits(), epochs=1, steps=1, batch_size=128, subset=256)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods whose step was tried."""
    tried: list[str] = []
    try_step = planning.try_step

    def counted(planned: Plan) -> None:
        tried.append(str(planned.method))
        try_step(planned)

    monkeypatch.setattr(planning, "try_step", counted)
    return tried


def planned(method: str, folder: Path, recipe: Recipe = QUICK, guests: dict[str, str | Path] | None = None, **more):
    return plan(parse(method), load("digits"), MODEL, recipe, runs=folder, guests=guests or {}, **more)


def test_a_plan_is_a_value_that_tries_nothing_by_itself(tmp_path: Path, trials: list[str]):
    made = planned("at", tmp_path)
    assert trials == ["at"]
    copy = replace(made, model="no-such-model")
    assert copy != made
    assert replace(copy, model=MODEL) == made
    assert trials == ["at"]
    assert list(tmp_path.iterdir()) == []


def test_a_corrected_method_names_its_runs_anew_and_the_others_keep_theirs(tmp_path: Path):
    settings = {method: planned(method, tmp_path).run.setting for method in ("at", "ikl", "ikl+vfd")}
    assert "revisions" not in settings["at"]
    assert settings["ikl"]["revisions"] == settings["ikl+vfd"]["revisions"] == {"ikl": 1}
    guest = planned("ikl+vfd", tmp_path).guests["vanilla"]
    assert isinstance(guest, Plan)
    assert guest.run.id == planned("at+vfd", tmp_path).run.setting["guests"]["vanilla"]


def test_a_guest_of_two_parts_is_tried_once_and_plans_share_no_trial_unless_told(tmp_path: Path, trials: list[str]):
    planned("hat+kd", tmp_path)
    assert sorted(trials) == ["hat", "hat+kd", "natural"]
    planned("hat+kd", tmp_path)
    assert len(trials) == 6


def test_equal_trials_are_made_once_where_plans_share_them(tmp_path: Path, trials: list[str]):
    tried: set[object] = set()
    for seed in range(3):
        planned("trades+vfd", tmp_path, replace(QUICK, seed=seed), tried=tried)
    assert sorted(trials) == ["natural", "trades+vfd"]
    planned("trades+vfd", tmp_path, replace(QUICK, batch_size=64), tried=tried)
    assert len(trials) == 4


def test_a_guest_from_a_file_is_tried_each_time_since_the_file_may_change(tmp_path: Path, trials: list[str]):
    vanilla = train("natural", data="digits", model=MODEL, recipe=QUICK, runs=tmp_path, device="cpu")
    trials.clear()
    tried: set[object] = set()
    for _ in range(2):
        planned("at+vfd", tmp_path, guests={"vanilla": vanilla.path}, tried=tried)
    assert trials == ["at+vfd", "at+vfd"]


def test_what_cannot_be_trained_is_refused_when_planned(tmp_path: Path):
    with pytest.raises(UserError, match="subset=5000 must be at most"):
        planned("at", tmp_path, replace(QUICK, subset=5000))
    with pytest.raises(UserError, match="at takes no vanilla model"):
        planned("at", tmp_path, guests={"vanilla": "nowhere"})
    assert list(tmp_path.iterdir()) == []


def test_guests_that_are_trained_first_are_announced_with_method_and_time(tmp_path: Path):
    made = planned("hat+kd", tmp_path, replace(QUICK, epochs=6, steps=9))
    robust, vanilla = (made.guests[name] for name in ("robust", "vanilla"))
    assert isinstance(robust, Plan)
    assert isinstance(vanilla, Plan)
    needed = "model, and none is given (--guest {0}=SOURCE): first {1} is trained, with the same data, model and recipe"
    natural, student = f"(6 epochs), in about 10% of the time of {{}}: {vanilla.run.path}", f"{robust.run.path}"
    assert sorted(guest_lines(made)) == sorted(
        [
            f"hat needs a vanilla {needed.format('vanilla', 'natural')} {natural.format('hat')}",
            f"hat+kd needs a robust {needed.format('robust', 'hat')} (6 epochs), in about as long as hat+kd: {student}",
            f"hat+kd needs a vanilla {needed.format('vanilla', 'natural')} {natural.format('hat+kd')}",
        ]
    )
    vanilla.run.write_card("finished", {}, {})
    lines = guest_lines(made)
    assert f"the vanilla model of hat is trained: {vanilla.run.path}" in lines
    assert not any("needs a vanilla" in line for line in lines)
    given = planned("at+vfd", tmp_path, guests={"vanilla": save_untrained(tmp_path)})
    assert guest_lines(given) == guest_lines(planned("at", tmp_path)) == []


def test_how_long_it_takes_is_said_and_what_would_be_faster(tmp_path: Path):
    long = planned("at", tmp_path, replace(QUICK, epochs=6, steps=9))
    assert time_line(long, 0.25, left=2400, steps=400) == (
        "about 10m: 0.25 s a step, 400 steps an epoch; --attack n-fgsm, which is weaker, takes about 25% of it. "
        "Validation and start-up come on top"
    )
    assert "faster" not in time_line(long, 0.01, left=2400, steps=400)
    assert "n-fgsm" not in time_line(planned("at", tmp_path, replace(QUICK, epochs=6, steps=2)), 0.25, 2400, 400)
    assert "n-fgsm" not in time_line(planned("natural", tmp_path, replace(QUICK, epochs=6)), 0.25, 2400, 400)
    # of 2, 5 and 10 steps in thirds, whose updates and attacks cost 11, 20 and 35 passes: twice what the first takes
    parts = planned("at", tmp_path, replace(QUICK, epochs=6, steps="2:5:10"))
    assert time_line(parts, 0.25, left=2400, steps=400).startswith("about 20m:")


def save_untrained(folder: Path) -> Path:
    torch.save(build(MODEL, classes=10, channels=1).state_dict(), folder / "net.pt")
    return folder / "net.pt"


def test_a_method_says_what_makes_its_further_augmentations(tmp_path: Path):
    for method, expected in (
        ("trades+dajat", "autoaugment-first"),
        ("trades+dajat(augment=flip)", "flip"),
        ("trades+consistency", "none"),
    ):
        batches = (each := planned(method, tmp_path)).batches(each.images[0])
        assert (batches.augmentation, batches.further) == (AUGMENTATIONS["none"], AUGMENTATIONS[expected])
