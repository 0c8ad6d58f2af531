"""The ground plan of the package: imports go one way between rooms, no file imports itself in a circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "advalign"

# Each room may import from the lines above it, and from nothing else. Rooms of one line do not know each other.
# `evaluation` comes before `training` because training validates, by the same `evaluate` that measures the result.
FLOORS = (
    ("errors",),
    ("spelling",),
    ("shapes",),
    ("runtime",),
    ("threats",),
    ("models", "data"),
    ("attacks",),
    ("objectives",),
    ("registration", "runs"),
    ("evaluation",),
    ("training",),
    ("frontier",),
    ("report",),
    ("studies",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "numpy", "matplotlib", "sklearn", "PIL", "jinja2"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the public facade `advalign` left out."""
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        named[".".join(("advalign", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    del named["advalign"]
    return named


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports: at the top, in functions, and for type checking."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return imported & set(known)


MODULES = modules()


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imports_of(path, MODULES) for name, path in MODULES.items()}


def test_every_room_has_its_floor():
    assert {name.split(".")[1] for name in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/index.md"])
def test_the_maps_show_the_rooms_from_the_top_to_the_ground(page: str):
    text = (SOURCE.parent.parent / page).read_text()
    rows = re.findall(r"^\| (`[a-z]+(?:/|\.py)`.*?) \|", text, re.MULTILINE)
    rooms = [room for row in rows for room in re.findall(r"`([a-z]+)(?:/|\.py)`", row)]
    assert set(rooms) == set(FLOOR_OF) - {"__main__"}
    floors = [FLOOR_OF[room] for room in rooms]
    assert floors == sorted(floors, reverse=True)


@pytest.mark.parametrize("room", FLOOR_OF)
def test_imports_go_one_way_between_rooms(room: str):
    upward = [
        f"{name} -> {imported}"
        for name, others in imports().items()
        for imported in others
        if name.split(".")[1] == room != imported.split(".")[1]
        and FLOOR_OF[imported.split(".")[1]] >= FLOOR_OF[room]
    ]  # fmt: skip
    assert not upward


def test_no_file_imports_itself_in_a_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_needs_no_heavy_package(arguments: list[str]):
    program = (
        "import sys; from advalign.cli.commands import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "usage" in ended.stdout
    assert not HEAVY & set(ended.stderr.split())
