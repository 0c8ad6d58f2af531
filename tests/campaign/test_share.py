"""A small share of the campaign; the whole is `python -m tests.campaign`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_small_share_of_the_campaign_finds_no_violation(tmp_path: Path):
    share = ["--kills", "3", "--flips", "10", "--inputs", "24", "--out", str(tmp_path / "campaign.json")]
    done = subprocess.run([sys.executable, "-m", "tests.campaign", *share], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads((tmp_path / "campaign.json").read_text())["kinds"]
    assert {kind: counts["tried"] for kind, counts in kinds.items() if kind != "resumed"} == {
        "kills": 3, "flips": 10, "inputs": 24,
    }  # fmt: skip
