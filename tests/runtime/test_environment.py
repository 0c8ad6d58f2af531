"""The command that a record names: as a shell reads it, and without the folders of one machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from advalign.runtime.environment import environment


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        ("trades(beta=6)", "trades(beta=6)"),
        ("pgd(steps=20, step_size=2/255)", "pgd(steps=20, step_size=2/255)"),
        ("8/255", "8/255"),
        ("it's", "it's"),
        ("runs/a b", "runs/a b"),
        ("{here}/runs/at", "runs/at"),
        ("{here}", "."),
        ("--out={here}/results", "--out=results"),
        ("npz:{here}/a.npz", "npz:a.npz"),
        ("/home/me/secret/a.npz", "DIR/a.npz"),
        ("npz:/home/me/secret/my data.npz", "npz:DIR/my data.npz"),
        ("--out=/home/me/secret", "--out=DIR/secret"),
        ("resnet18@/home/me/w.safetensors", "resnet18@DIR/w.safetensors"),
        ("../other/runs", "../other/runs"),
        ("my_nets:make", "my_nets:make"),
    ],
)
def test_commands_are_quoted_and_name_no_folder_outside(
    argument: str, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/advalign", "evaluate", argument.replace("{here}", str(tmp_path))])
    environment.cache_clear()
    try:
        assert shlex.split(environment()["command"]) == ["advalign", "evaluate", recorded]
    finally:
        environment.cache_clear()
