"""The attack `fast` beside AutoAttack, image by image, on the models of Table 1 at the scale `tiny`.

    python -m benchmarks.fast --data-dir DIR      # CIFAR-10; about an hour on one core

Each model is attacked by both on the same test images, by the same seed and batch size. What is compared is the
accuracy that is left, which images only one of the two breaks, passes and seconds. Writes
results/benchmarks/fast.json after every model, and goes on from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from advalign.attacks import AutoAttack, Fast
from advalign.evaluation.accuracy import evaluate
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.target import load_target
from advalign.runtime.device import one_thread
from advalign.runtime.environment import environment

RESULTS = Path(__file__).parent.parent / "results"
OUT = RESULTS / "benchmarks" / "fast.json"


def row(run: Path, n: int, data_dir: Path | None) -> dict[str, Any]:
    """Attack one model by both."""
    target = load_target(run, TargetOptions(n=n, data_dir=data_dir, device="cpu"))
    attacks = {"autoattack": AutoAttack(target.threat), "fast": Fast(target.threat)}
    found = evaluate(target.net, target.images, list(attacks.values()))
    slow, fast = (found.correct[name] for name in attacks)
    return {
        "method": target.method,
        "run": target.card["run"],
        "n": n,
        "clean": int(found.correct["clean"].sum()),
        "withstand": {name: int(found.correct[name].sum()) for name in attacks},
        "only autoattack breaks": int((fast & ~slow).sum()),
        "only fast breaks": int((slow & ~fast).sum()),
        "passes": {name: sum(found.passes[name]) for name in attacks},
        "seconds": {name: round(found.seconds[name], 1) for name in attacks},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far `fast` lies above AutoAttack, in points, and how many times fewer passes and seconds it takes."""
    gaps = [100 * (each["withstand"]["fast"] - each["withstand"]["autoattack"]) / each["n"] for each in rows]
    times = {
        key: round(sum(each[key]["autoattack"] for each in rows) / sum(each[key]["fast"] for each in rows), 2)
        for key in ("passes", "seconds")
    }
    return {
        "models": len(rows),
        "images": sum(each["n"] for each in rows),
        "fast - autoattack, points": {
            "mean": round(sum(gaps) / len(gaps), 3), "least": round(min(gaps), 2), "most": round(max(gaps), 2)
        },
        "only autoattack breaks": sum(each["only autoattack breaks"] for each in rows),
        "only fast breaks": sum(each["only fast breaks"] for each in rows),
        "autoattack / fast": times,
    }  # fmt: skip


def main(data_dir: Annotated[Path | None, tyro.conf.arg(help="where CIFAR-10 lies")] = None, images: int = 250) -> None:
    """Attack all models, and write and print what both leave."""
    rows = json.loads(OUT.read_text())["models"] if OUT.exists() else []
    done = {(each["run"], each["n"]) for each in rows}
    runs = sorted(RESULTS.glob("table1-tiny/runs/*small-cnn_width=16*"), key=lambda path: path.name[::-1])
    with one_thread():
        for run in runs:
            if (run.name.rpartition("-")[2], images) not in done:
                rows.append(row(run, images, data_dir))
                print(json.dumps(rows[-1]), flush=True)
                content = {"summary": summary(rows), "models": rows, "environment": environment()}
                OUT.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    tyro.cli(main)
