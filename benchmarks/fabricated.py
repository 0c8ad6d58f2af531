"""Run folders by the hundred without training them: copies of a few trained ones, as other methods with other seeds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advalign.evaluation.accuracy import WORST_CASE
from advalign.runs import Run, append_records
from advalign.runs.formats import ResultFile, read_checked_json, write_checked_json, write_checked_lines
from advalign.runs.records import Record
from advalign.runs.run import run_id, setting_digest

METHODS, EPOCHS = 100, 25


def fabricate(sources: list[Run], root: Path, count: int) -> None:
    """Write `count` runs below a folder: a hundred methods, and as many seeds of each as it takes.

    Args:
        sources: finished runs of one base each, with or without plug-ins, and one evaluation each.
    """
    drawn = random.Random(0)
    for k in range(count):
        number, seed = k % METHODS, k // METHODS
        _fabricate(sources[number % len(sources)], root, 1 + number / METHODS, seed, drawn)


def _fabricate(source: Run, root: Path, beta: float, seed: int, drawn: random.Random) -> None:
    base, *plug_ins = source.setting["method"].split("+")
    method = "+".join((f"{base}(beta={beta:g})", *plug_ins))
    recipe = {**source.setting["recipe"], "seed": seed, "epochs": EPOCHS}
    setting = {**source.setting, "method": method, "recipe": recipe}
    run = Run(root / run_id(setting), setting)
    run.path.mkdir()
    run.write_card("finished", source.environment, {})
    rows = source.log
    log = [{**rows[epoch % len(rows)], "epoch": epoch + 1, "loss": drawn.uniform(2, 3)} for epoch in range(EPOCHS)]
    write_checked_lines(run.path / "log.jsonl", log, run.id)
    (run.path / "best.safetensors").write_bytes(source.weights("best").read_bytes())
    (file,) = (source.path / "evaluations").glob("*.json")
    content = _fewer_right(read_checked_json(file, ResultFile, "evaluate again"), drawn)
    names_run = {"method": method, "seed": seed, "epochs": EPOCHS, "run": run.id, "recipe": setting_digest(recipe)}
    content["records"] = [{**record, **names_run} for record in content["records"]]
    write_checked_json(run.path / "evaluations" / file.name, content)
    append_records(run.path / "records.jsonl", [Record(**record) for record in content["records"]])


def _fewer_right(content: Mapping[str, Any], drawn: random.Random) -> dict[str, Any]:
    """Return a result in which some of the images, each with a chance of a tenth, are misclassified throughout."""
    n = content["records"][0]["n"]
    kept = [drawn.random() < 0.9 for _ in range(n)]
    outcomes = {
        name: "".join(digit if keep else "0" for digit, keep in zip(digits, kept, strict=True))
        for name, digits in content["outcomes"].items()
    }
    right = {name: digits.count("1") for name, digits in outcomes.items()}
    right[WORST_CASE] = sum({*column} == {"1"} for column in zip(*outcomes.values(), strict=True))
    records = [
        {**record, "accuracy": right.get(record["attack"], right[WORST_CASE]) / n} for record in content["records"]
    ]
    return {**content, "outcomes": outcomes, "records": records}
