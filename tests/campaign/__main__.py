"""`python -m tests.campaign`: one table of what was tried, and `results/campaign.json` with every violation's seed."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch
import tyro

from advalign.runtime.environment import environment
from tests.campaign.flips import flip_bits
from tests.campaign.inputs import malform
from tests.campaign.kills import kill_commands
from tests.campaign.tally import KINDS, Tally

# Imported once and not by each command, which is forked.
_HEAVY = (
    "advalign.cli.commands", "advalign.report", "advalign.report.evaluation", "advalign.evaluation.transfer_matrix",
    "advalign.studies", "advalign.training.train", "advalign.runs.tensorboard", "matplotlib.backends.backend_pdf",
    "matplotlib.backends.backend_svg", "matplotlib.backends.backend_agg", "sklearn.manifold", "scipy.stats",
)  # fmt: skip


def campaign(
    kills: int = 200,
    flips: int = 500,
    inputs: int = 1000,
    minutes: float | None = None,
    seed: int = 0,
    add: bool = False,
    out: Path = Path("results/campaign.json"),
) -> int:
    """Try the promises that nothing is lost, nothing corrupt is believed, and nothing ends in a traceback.

    Args:
        kills: commands to stop by SIGKILL, SIGTERM, SIGINT, SIGHUP or a full disk, and to let go on.
        flips: files to damage: see `tests.campaign.damage`.
        inputs: malformed spellings, flags, paths, arrays, images, YAML files and weights to refuse.
        minutes: stop after this long.
        seed: of all that is drawn; a violation names the seed that repeats it.
        add: to the counts that the file holds, such as those of another seed, tried on another core.
        out: the file of the counts and the violations.
    """
    began, tally = time.monotonic(), Tally()

    def out_of_time() -> bool:
        return minutes is not None and time.monotonic() - began > 60 * minutes

    for module in _HEAVY:
        import_module(module)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for trial, number in ((malform, inputs), (flip_bits, flips), (kill_commands, kills)):
            if number:
                trial(number, seed, Path(folder), tally, out_of_time)
    about = {
        "command": shlex.join(["python", "-m", "tests.campaign", *sys.argv[1:]]),
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "commit": environment()["commit"],
    }
    runs, machine = [about], {key: value for key, value in environment().items() if key not in ("command", "commit")}
    if add and out.exists():
        earlier = json.loads(out.read_text())
        runs = [*earlier["runs"], about]
        tally.add(earlier)
    content = {"runs": runs, **tally.content(), "environment": machine}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'':10} {'tried':>6} {'violated':>9}")
    for kind, what in KINDS.items():
        print(f"{kind:10} {tally.tried(kind):6} {tally.violated(kind):9}   {what}")
    for each in tally.violations:
        print(f"{each['kind']}, {each['name']}, seed {each['seed']}: {each['violation']}")
    print(f"Written: {out}")
    return int(bool(tally.violations))


if __name__ == "__main__":
    sys.exit(tyro.cli(campaign))
