"""What was tried and what went wrong, by kind."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    "kills": "commands stopped by a signal or a full disk",
    "resumed": "stopped commands that went on to the same result, to the bit",
    "flips": "damaged files: refused, remade or without effect",
    "inputs": "malformed inputs refused in one line",
}


@dataclass
class Tally:
    """Counts by kind and name, and every violation with the seed that repeats it."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[dict[str, str]] = field(default_factory=list)

    def count(self, kind: str, name: str, seed: str, wrong: str = "") -> None:
        """Count a trial; `wrong` says what was violated, if anything."""
        self.counts[kind, name] += 1
        if wrong:
            self.violations.append({"kind": kind, "name": name, "seed": seed, "violation": wrong})
            print(f"{kind}, {name}, seed {seed}: {wrong}", file=sys.stderr, flush=True)  # hours before the end

    def add(self, content: Mapping[str, Any]) -> None:
        """Add what `content` returned for another tally."""
        for row in content["counts"]:
            self.counts[row["kind"], row["name"]] += row["tried"]
        self.violations += content["violations"]

    def tried(self, kind: str) -> int:
        """Return how many trials of a kind there were."""
        return sum(number for (each, _), number in self.counts.items() if each == kind)

    def violated(self, kind: str) -> int:
        """Return how many of them went wrong."""
        return sum(each["kind"] == kind for each in self.violations)

    def content(self) -> dict[str, Any]:
        """Return what goes into JSON."""
        return {
            "kinds": {
                kind: {"what": what, "tried": self.tried(kind), "violations": self.violated(kind)}
                for kind, what in KINDS.items()
            },
            "counts": [{"kind": kind, "name": name, "tried": n} for (kind, name), n in sorted(self.counts.items())],
            "violations": self.violations,
        }
