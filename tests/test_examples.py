"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"


@pytest.mark.slow
def test_own_loop_is_short_and_makes_a_robust_model():
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    vanilla, robust = (map(float, re.findall(r"([\d.]+)%", line)) for line in done.stdout.splitlines())
    (clean, attacked, _), (robust_clean, robust_attacked, _) = vanilla, robust
    assert clean > 85
    assert attacked < 20
    assert robust_clean > 80
    assert robust_attacked > 30
