"""The transfer matrix as a table, and as files: JSON with the outcome of every image, Markdown and LaTeX."""

from __future__ import annotations

from pathlib import Path

from advalign.evaluation.results import outcome_digits
from advalign.evaluation.transfer_matrix import ATTACK_OPTIONS, TransferMatrix
from advalign.registration import source_digests
from advalign.report.tables import Table
from advalign.runtime.environment import environment
from advalign.runtime.files import digest, write_atomically, write_json


def matrix_table(matrix: TransferMatrix) -> Table:
    """Tabulate accuracies in per cent, a row for each model on which images were made, a column for each target."""
    sources = list(matrix.models)
    last = [Path(source).name for source in sources]
    names = last if len(set(last)) == len(last) else sources
    accuracies = [evaluation.accuracies() for evaluation in matrix.evaluations.values()]
    labels = dict(zip(sources, names, strict=True)) | {"clean": "(clean images)"}
    rows = tuple((label, *(f"{100 * each[outcome]:.1f}" for each in accuracies)) for outcome, label in labels.items())
    caption = (
        f"Accuracy in % of each column's model on images made by {matrix.attack}, to the last step, on each row's; "
        f"threat: {matrix.attack.threat}; data: {matrix.dataset.name}; test images: {matrix.n}."
    )
    notes = dict.fromkeys(model.note for model in matrix.models.values())
    return Table(("made on", *names), rows, frozenset(), caption).with_notes(notes)


def write_matrix(matrix: TransferMatrix, folder: str | Path) -> Path:
    """Write the matrix as JSON, Markdown and LaTeX, named by all that it depends on; return the JSON file.

    Raises:
        UserError: a file cannot be written.
    """
    setting = {
        "attack": str(matrix.attack),
        "threat": str(matrix.attack.threat),
        "data": matrix.dataset.name,
        "images": matrix.dataset.digest,
        "n": matrix.n,
        "batch_size": ATTACK_OPTIONS.batch_size,
        "models": {
            source: {
                "method": model.method,
                "model": model.model,
                "weights": model.digest,
                "run": model.card.get("run"),
            }
            for source, model in matrix.models.items()
        },
    }
    if user_sources := source_digests([matrix.attack]):
        setting["own"] = user_sources
    outcomes = {target: outcome_digits(evaluation) for target, evaluation in matrix.evaluations.items()}
    file = Path(folder) / f"matrix-{digest(repr(setting), digits=8)}.json"
    about = {
        "notes": {source: model.note for source, model in matrix.models.items()},
        "class_names": {source: list(model.classes.class_names) for source, model in matrix.models.items()},
        "preprocessing": dict(matrix.dataset.preprocessing),
    }
    write_json(file, {**setting, "outcomes": outcomes, **about, "environment": environment()})
    table = matrix_table(matrix)
    write_atomically(file.with_suffix(".md"), table.markdown() + "\n")
    write_atomically(file.with_suffix(".tex"), table.latex() + "\n")
    return file
