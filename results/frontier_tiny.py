"""Mix every row of Table 1 (tiny) with the natural network of the same table, and measure what that gives.

`python results/frontier_tiny.py WORK --data-dir DIR` copies the runs of `results/table1-tiny/` below the folder WORK,
makes the frontier of each row there, and keeps `frontier.json` and the chosen network in
`results/frontier-tiny/`. A second call goes on where the first stopped. Names of rows behind DIR measure these alone.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from advalign.errors import require
from advalign.evaluation.options import TargetOptions
from advalign.frontier.frontier import frontier
from advalign.runs import Run

HERE = Path(__file__).parent
OUT = HERE / "frontier-tiny"
FIRST = ("trades", "hat+vfd", "trades+vfd", "hat", "trades+bgat", "hat+bgat")
SETTING = {
    "points": 6,
    "give": 3.0,
    "held_out": 500,
    "curve_attack": "worst(apgd-ce(steps=30), apgd-t(steps=30, targets=3))",
    "attacks": ["autoattack"],
}


def rows(runs: Path) -> dict[str, Path]:
    """Return the folder of each method's run; those first that the pages speak of."""
    folders = {Run.read(card.parent).setting["method"]: card.parent for card in sorted(runs.glob("*/run.json"))}
    return {name: folders[name] for name in dict.fromkeys([*FIRST, *folders]) if name in folders}


def main(work: Path, data_dir: Path, chosen: list[str]) -> None:
    """Make the frontiers that are missing."""
    runs = work / "runs"
    if not runs.exists():
        shutil.copytree(HERE / "table1-tiny" / "runs", runs)
    found = rows(runs)
    natural = found.pop("natural")
    for name in chosen:
        require(name in found, lambda each=name: f"{each!r} is no row: {', '.join(found)}")
    for method, name in [*(("mix", name) for name in chosen or found), *([] if chosen else [("mixednuts", "trades")])]:
        kept, folder = OUT / f"{method}-{name}", work / f"{method}-{name}"
        if (kept / "frontier.json").exists():
            continue
        traced = frontier(
            found[name], natural, method=method, **SETTING, out=folder, runs=work / "mixes",
            target_options=TargetOptions(n=1000, data_dir=data_dir, device="cpu"), console=Console(width=120),
        )  # fmt: skip
        assert traced.run is not None
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "frontier.json", kept / "frontier.json")
        shutil.copytree(traced.run.path, kept / "run", dirs_exist_ok=True)
        print(name, method, traced, flush=True)


if __name__ == "__main__":
    where = sys.argv.index("--data-dir")
    main(Path(sys.argv[1]), Path(sys.argv[where + 1]), sys.argv[where + 2 :])
