"""Write the tables of the README and of docs/ from the committed records and measurements: `python results/refresh.py`.

A test checks that they are current.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from claims import claims, study_in, study_table, sweep_table
from comparison import comparison
from mixes import aware, mixes, same_clean
from starts import starts

from advalign.report.tables import Table, accuracy_table
from advalign.runs import read_records

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in (
    "attacks.md", "findings.md", "evaluation.md", "speed.md", "how-to/robust-from-accurate.md",
)))  # fmt: skip
_BLOCK = re.compile(
    r"(<!-- (table|comparison|claims|study|sweep|timing|scaling|convolutions|around|fast|starts|mixes|same_clean|aware)"
    r" of (\S+) -->\n)"
    r".*?"
    r"(<!-- end of table -->)",
    re.DOTALL,
)
_OF_FOLDERS = {"starts": starts, "mixes": mixes, "same_clean": same_clean, "aware": aware}
_OF_STUDIES = {"claims": claims, "study": study_table, "sweep": sweep_table}


def timing(path: Path) -> Table:
    """Tabulate the measurements of `python -m benchmarks`."""
    content, ours, cells = json.loads(path.read_text()), ("ours", "ours, bf16"), []
    for row in content["rows"]:
        shape = f"{row['model']}, batch {row['batch']}" if "batch" in row else "small-cnn(width=16)"
        network = f"{shape}, {row['images']} images" if "images" in row else shape
        seconds = [f"{row['seconds'][way]:.2f}" if row["seconds"] else "–" for way in ours]
        faster = [
            next((f"{row['ratio'][way][other]:.2f}" for other in others if other in row["ratio"].get(way, {})), "–")
            for others in (("authors",), ("once", "plain"), ("once, best", "plain, workers"))
            for way in ours
        ]
        passes = row.get("forward", {})
        work = [f"{passes[way] + row['backward'][way]:.0f}" if way in passes else "–" for way in ("authors", "ours")]
        memory = [str(row.get("memory_mib", {}).get(way, "–")) for way in ("once", "ours")]
        cells.append((row["workload"], network, *seconds, *faster, *work, *memory))
    columns = (
        "workload", "network", "s", "s, bf16", "× authors'", "× authors', bf16", "× plain", "× plain, bf16",
        "× best plain", "× best plain, bf16",
        "passes, authors'", "passes", "MiB, plain", "MiB",
    )  # fmt: skip
    caption = (
        f"Ours: seconds, and how many times faster than the authors' loop, the plain one, and the best plain one "
        f"(training: channels_last and bf16; the epoch: a loader with workers). Medians of "
        f"{content['rounds']} rounds in turn in one process; {_machine(content)}; passes: forward and backward work of "
        "an image, in forwards."
    )
    return Table(columns, tuple(cells), frozenset(), caption)


def scaling(path: Path) -> Table:
    """Tabulate the measurements of `python -m benchmarks.scaling`."""
    content = json.loads(path.read_text())
    cells = tuple(
        (row["factor"], row["value"], f"{row['seconds']:.2f}", f"{row['times_the_first']:.2f}", str(row["forward"]),
         str(row["backward"]))
        for row in content["rows"]
    )  # fmt: skip
    around = ", ".join(f"{name} {value}" for name, value in content["around"].items())
    caption = f"Around: {around}; resnet18; medians of {content['rounds']} rounds; {_machine(content)}."
    columns = ("factor", "value", "seconds", "times the factor's first", "forwards", "backwards")
    return Table(columns, cells, frozenset(), caption)


def convolutions(path: Path) -> Table:
    """Tabulate the measurements of `python -m benchmarks.convolutions`."""
    content, cells = json.loads(path.read_text()), []
    for row in content["rows"]:
        plain, errors = row["faster_plain"], row["forward_and_gradient_error"]
        times = (row["seconds"][plain], row["seconds"]["ours"], row["transform_seconds"])
        first, second, third = (f"{1000 * seconds:.1f}" for seconds in times)
        shape = f"{row['channels']} channels, {row['side']} x {row['side']}, {row['images']} images"
        error = (f"{max(errors[way]):.0e}" for way in (plain, "ours"))
        cells.append((shape, first, second, f"{row['ratio']['ours'][plain]:.2f}", third, *error))
    columns = ("layer", "plain, ms", "Winograd, ms", "times faster", "transform, ms", "error, plain", "error, Winograd")
    caption = (
        f"Forward, and the gradient to the input; the faster memory format of the plain convolution; error: the larger "
        f"relative distance of output and gradient from float64. Medians of {content['rounds']} rounds; "
        f"{_machine(content)}."
    )
    return Table(columns, tuple(cells), frozenset(), caption)


def around(path: Path) -> Table:
    """Tabulate the measurements of `python -m benchmarks.around`."""
    content = json.loads(path.read_text())
    start, report = content["startup"], content["report"]
    torch_alone, first_step = start["import torch"], start["first step"]
    cells = [
        (f"a report over {report['runs']} runs", f"{report['seconds']:.1f} s"),
        ("`import torch`", f"{torch_alone:.1f} s"),
        ("from there to the first step of `train`, CIFAR-10", f"{first_step - torch_alone:.1f} s"),
    ]
    cells += [
        (f"validation, of a training: `{row['recipe']}`, {row['trained']:,} images", f"{100 * row['share']:.1f} %")
        for row in content["validation"]
    ]
    caption = (
        f"Rounds: {content['rounds']}; {_machine(content)}; load of the machine before: {content['load_before']:.1f}."
    )
    return Table(("what", "takes"), tuple(cells), frozenset(), caption)


def fast(path: Path) -> Table:
    """Tabulate the measurements of `python -m benchmarks.fast`."""
    content = json.loads(path.read_text())
    rows, summary = content["models"], content["summary"]
    n = rows[0]["n"]
    gap = summary["fast - autoattack, points"]
    means = (
        100 * sum(row["withstand"][name] / row["n"] for row in rows) / len(rows) for name in ("autoattack", "fast")
    )
    cells = (
        str(summary["models"]), str(summary["images"]), *(f"{mean:.2f}" for mean in means),
        f"{gap['mean']:+.2f} ({gap['least']:+.1f} to {gap['most']:+.1f})", str(summary["only autoattack breaks"]),
        str(summary["only fast breaks"]), *(f"{value:.1f}" for value in summary["autoattack / fast"].values()),
    )  # fmt: skip
    columns = (
        "models", "images in all", "autoattack, mean", "fast, mean", "fast - autoattack, mean (range)",
        "only autoattack breaks", "only fast breaks", "times fewer passes", "times faster",
    )  # fmt: skip
    caption = (
        "Accuracy in %, differences in points, by `python -m benchmarks.fast`: so many of the 21 models of Table 1 "
        f"(tiny), {n} test images each, one image being {100 / n:.1f} points; small networks, trained "
        f"for a few epochs; {content['environment']['device']}, torch {content['environment']['torch']}."
    )
    return Table(columns, (cells,), frozenset(), caption)


_OF_BENCHMARKS = {
    "around": around, "timing": timing, "scaling": scaling, "convolutions": convolutions, "fast": fast
}  # fmt: skip


def _machine(content: dict[str, dict[str, str]]) -> str:
    environment = content["environment"]
    return f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}"


def refreshed(text: str) -> str:
    """Return the text with the table of each marked block made anew from its records."""

    def table(block: re.Match[str]) -> str:
        kind, path = block[2], ROOT / block[3]
        if kind in _OF_BENCHMARKS:
            content = _OF_BENCHMARKS[kind](path)
        elif kind in _OF_STUDIES:
            content = _OF_STUDIES[kind](*study_in(path))
        elif kind in _OF_FOLDERS:
            content = _OF_FOLDERS[kind](path)
        else:
            records = [record for file in sorted(path.rglob("records.jsonl")) for record in read_records(file)]
            content = accuracy_table(records) if kind == "table" else comparison(records)
        return f"{block[1]}{content.markdown()}\n{block[4]}"

    return _BLOCK.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
