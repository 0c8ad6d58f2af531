"""A model card with the fields of RobustBench's JSON, filled as far as an evaluation knows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from advalign.attacks import ATTACKS
from advalign.attacks.spelled import benchmark_of
from advalign.errors import UserError
from advalign.runs import Record
from advalign.runs.zoo import ZooModel
from advalign.spelling import spell_number
from advalign.threats import parse_threat

BENCHMARK = "RobustBench"
_MIX = re.compile(r"(?<![\w.:-])mix\(")  # of a model's spelling; each asks one more network


def card_attack(records: Sequence[Record]) -> Record | None:
    """Return the record of the attack by which RobustBench compares models, if it was run."""
    return next((record for record in records if benchmark_of(record.attack) == BENCHMARK), None)


def published_fields(model: ZooModel) -> dict[str, Any]:
    """Return the fields of a RobustBench entry that are known of a published model."""
    return {
        "link": model.link,
        "name": model.paper,
        "authors": model.authors,
        "additional_data": model.additional_data,
        "venue": model.venue,
        "architecture": model.architecture,
        "reported": f"{model.autoattack:.2f}",
    }


def robustbench_card(records: Sequence[Record], *, extra_data: bool) -> dict[str, Any]:
    """Return the fields of a RobustBench entry; fields that only the authors know are None.

    Args:
        records: of one evaluation, `clean` and the benchmark's attack among them.
        extra_data: whether the model was trained on more than the data set.

    Raises:
        UserError: the benchmark's attack was not run.
    """
    robust = card_attack(records)
    if robust is None:
        names = " or ".join(name for name in ATTACKS if benchmark_of(name) == BENCHMARK)
        raise UserError(f"{BENCHMARK}'s card needs an evaluation with --attacks {names}")
    clean = next(record for record in records if record.attack == "clean")
    threat = parse_threat(robust.threat)
    return {
        "link": None,
        "name": robust.method,
        "authors": None,
        "additional_data": extra_data,
        "number_forward_passes": 1 + len(_MIX.findall(robust.model)),
        "dataset": robust.data,
        "venue": None,
        "architecture": robust.model,
        "threat_model": type(threat).__name__,
        "eps": spell_number(threat.eps),
        "clean_acc": f"{100 * clean.accuracy:.2f}",
        "reported": None,
        "autoattack_acc": f"{100 * robust.accuracy:.2f}",
        "unreliable": None,
        "footnote": f"{robust.n} test images, checkpoint {robust.checkpoint}; commit {robust.commit} of advalign",
    }
