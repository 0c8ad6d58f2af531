"""A model card with the fields of RobustBench's JSON, filled as far as an evaluation knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advalign.errors import require
from advalign.runs import Record
from advalign.spelling import spell_number
from advalign.threats import parse_threat


def robustbench_card(records: Sequence[Record], *, extra_data: bool) -> dict[str, Any]:
    """Return the fields of a RobustBench entry; fields that only the authors know are None.

    Args:
        records: of one evaluation, with `clean` and `autoattack` among its attacks.
        extra_data: whether the model was trained on more than the data set.

    Raises:
        UserError: AutoAttack was not run.
    """
    accuracies = {record.attack: record for record in records}
    require("autoattack" in accuracies, "RobustBench's card needs an evaluation with --attacks autoattack")
    clean, robust = accuracies["clean"], accuracies["autoattack"]
    threat = parse_threat(robust.threat)
    return {
        "link": None,
        "name": robust.method,
        "authors": None,
        "additional_data": extra_data,
        "number_forward_passes": 1,
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
