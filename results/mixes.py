"""Tables of frontiers: what mixing gives each robust network, and what it gives at the accuracy of trained ones."""

from __future__ import annotations

from pathlib import Path

from advalign.frontier.result import FILE, StoredFrontier, read_frontier
from advalign.report.frontier_words import percent
from advalign.report.same_clean import robust_at
from advalign.report.tables import Table
from advalign.runs import read_records

_CLEAN = (96.5, 97.5)
TABLE1 = Path(__file__).parent / "table1-tiny" / "records.jsonl"


def mixes(folder: Path) -> Table:
    """Tabulate of each frontier the robust network alone and every setting, the chosen one marked."""
    stored = _read(folder)
    rows = []
    for each in stored:
        name = f"{each.content['robust']['method']} and {each.content['accurate']['method']}"
        for number, point in enumerate(each.test.points):
            floor = "–" if point.floor is None else f"{percent(point.floor):.1f}"
            marked = f"{point.setting}{' (chosen)' if number == each.chosen else ''}"
            accuracies = (f"{percent(point.clean):.1f}", f"{percent(point.robust):.1f}", floor)
            rows.append((name if not number else "", each.content["method"], marked, *accuracies))
    columns = ("networks", "method", "setting", "clean", "robust", "floor")
    return Table(columns, tuple(rows), frozenset(), _caption(stored))


def same_clean(folder: Path) -> Table:
    """Tabulate the trained rows of Table 1 (tiny) beside the mix of TRADES at the same clean accuracy."""
    (mix,) = (
        each for each in _read(folder) if (each.content["method"], each.file.parent.name) == ("mix", "mix-trades")
    )
    records, rows = read_records(TABLE1), []
    for attacked in (record for record in records if record.attack == "autoattack"):
        every = (record for record in records if (record.method, record.attack) == (attacked.method, "clean"))
        clean = 100 * max(every, key=lambda record: record.n).accuracy
        ours = robust_at(mix.test, clean)
        cells = (f"{clean:.1f}", f"{100 * attacked.accuracy:.1f}", "–" if ours is None else f"{ours:.1f}")
        rows.append((attacked.method, *cells))
    caption = (
        f"Accuracy in %. Trained: clean on 10,000 test images, AutoAttack on 250 of them, one standard error up to 3 "
        f"points. The mix: {mix.content['robust']['method']} with {mix.content['accurate']['method']} on "
        f"{mix.test.images} test images, read off the line between two settings, robust under all examples made; – "
        "outside its range. A mix costs two forward passes."
    )
    columns = ("method", "clean", "AutoAttack", "mix at this clean accuracy, robust")
    return Table(columns, tuple(sorted(rows, key=lambda row: -float(row[1]))), frozenset(), caption)


def aware(folder: Path) -> Table:
    """Tabulate digits: each robust network alone, and its mix with the natural one at two clean accuracies."""
    stored, rows = [each for each in _read(folder) if each.content["data"] == "digits"], []
    for each in stored:
        alone, seed = each.test.points[-1], each.file.parent.name.rpartition("-")[2]
        found = (robust_at(each.test, clean) for clean in _CLEAN)
        mixed = ("–" if robust is None else f"{robust:.1f}" for robust in found)
        accuracies = (f"{percent(alone.clean):.1f}", f"{percent(alone.robust):.1f}")
        rows.append((each.content["robust"]["method"], seed, *accuracies, *mixed))
    columns = (
        "robust network",
        "seed",
        "clean, alone",
        "robust, alone",
        *(f"mix at {clean:g} % clean" for clean in _CLEAN),
    )
    caption = (
        f"Accuracy in % on {stored[0].test.images} test images of digits, {stored[0].content['threat']}; robust: under "
        f"{stored[0].content['curve_attack']} on every setting, and the examples made on every other. Mixed with the "
        "natural network of the same seed; read off the line between two settings; – outside the curve's range."
    )
    return Table(columns, tuple(rows), frozenset(), caption)


def _read(folder: Path) -> list[StoredFrontier]:
    return [read_frontier(file) for file in sorted(folder.glob(f"*/{FILE}"))]


def _caption(stored: list[StoredFrontier]) -> str:
    first = stored[0].content
    further = (
        f", {', '.join(first['attacks'])} on the chosen setting and the robust network" if first["attacks"] else ""
    )
    ns = sorted({each.test.images for each in stored})
    held_out = sorted({each.held_out.images for each in stored})
    return (
        f"Accuracy in % on {', '.join(map(str, ns))} test images of {first['data']}, {first['threat']}; robust: under "
        f"{first['curve_attack']} on every setting{further}, and the examples made on every other; floor: whatever the "
        f"accurate network does. Chosen on {', '.join(map(str, held_out))} training images that neither network was "
        f"trained on: {first['rule']}."
    )
