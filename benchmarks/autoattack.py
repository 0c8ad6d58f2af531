"""AutoAttack's cost beside the reference's code: passes on a model that is robust half of the time.

    python benchmarks/autoattack.py

Digits, a small network trained for a few seconds, 500 test images. Needs the package `pyautoattack` (the reference,
repackaged), which the extra `dev` brings. Writes results/benchmarks/autoattack.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from advalign import models
from advalign.attacks.ensemble import AutoAttack
from advalign.data import Batches, load
from advalign.evaluation import evaluate
from advalign.objectives import compose, parse, total
from advalign.runtime import environment, one_thread, seeded
from advalign.threats import Linf

BUDGET = Linf(0.2)
OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "autoattack.json"


def half_robust() -> nn.Module:
    """Train a small network against the budget for twelve epochs."""
    data = load("digits")
    with seeded("half-robust"):
        net = models.build("small-cnn(width=8)", classes=10, channels=1)
        objective = compose(parse("at"), student=net).train()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
        batches = Batches(data.train, 64, augment="none", seed=0)
        for epoch in range(12):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / 12)
            for x, y in batches.epoch(epoch):
                total(objective(x, objective.perturb(x, y, BUDGET, steps=5), y)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return net.eval()


class Counted(nn.Module):
    """A network that counts the images that pass it, forth and back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forward_images, self.backward_images = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits, and count."""
        self.forward_images += len(x)
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, grad: Tensor) -> None:
        self.backward_images += len(grad)


def reference(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Run the reference's four attacks, each on what the ones before have left, as its standard does."""
    given: dict[str, Any] = {"norm": "Linf", "eps": BUDGET.eps, "seed": seed}
    model = Counted(net)
    attacks = {
        "apgd-ce": APGDAttack(model, n_iter=100, n_restarts=1, loss="ce", **given),
        "apgd-t": APGDAttack_targeted(model, n_iter=100, n_restarts=1, n_target_classes=9, **given),
        "fab-t": FABAttack_PT(model, n_iter=100, n_restarts=1, n_target_classes=9, targeted=True, **given),
        "square": SquareAttack(model, n_queries=5000, n_restarts=1, resc_schedule=False, **given),
    }
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y, cost = x[right], y[right], {}
    for name, attack in attacks.items():
        before, began = (model.forward_images, model.backward_images), time.perf_counter()
        found = attack.perturb(x, y)
        x_adv = found[-1] if isinstance(found, tuple) else found
        cost[name] = {
            "forward": model.forward_images - before[0],
            "backward": model.backward_images - before[1],
            "seconds": round(time.perf_counter() - began, 2),
        }
        with torch.no_grad():
            left = (net(x_adv).argmax(1) == y) | (BUDGET.distance(x_adv, x) > BUDGET.eps + 1e-6)
        x, y = x[left], y[left]
    return {"robust": len(y), "passes": cost}


def ours(net: nn.Module, images: Any, seed: int) -> dict[str, Any]:
    """Run our AutoAttack member by member, for the cost of each."""
    found = evaluate(net, images, [AutoAttack(BUDGET)], seed=seed)
    cost = {name.partition("(")[0]: counts._asdict() for name, counts in found.members["autoattack"].items()}
    return {"robust": int(found.correct["autoattack"].sum()), "passes": cost}


def main() -> None:
    """Run both three times, and write and print what they cost."""
    with one_thread():
        net, test = half_robust(), load("digits").test
        rows = []
        for seed in range(3):
            theirs = reference(net, test.floats(), test.labels, seed)
            mine = ours(net, test, seed)
            rows.append({"seed": seed, "reference": theirs, "advalign": mine})
            print(json.dumps(rows[-1]))
    sums: dict[str, dict[str, int]] = {}
    for side in ("reference", "advalign"):
        for row in rows:
            for name, cost in row[side]["passes"].items():
                sums.setdefault(name, {}).setdefault(side, 0)
                sums[name][side] += cost["forward"] + cost["backward"]
    ratios = {name: round(both["reference"] / both["advalign"], 2) for name, both in sums.items()}
    whole = {side: sum(both[side] for both in sums.values()) for side in ("reference", "advalign")}
    ratios["autoattack"] = round(whole["reference"] / whole["advalign"], 2)
    print("passes, reference / advalign:", ratios)
    content = {"images": len(test), "ratios": ratios, "runs": rows, "environment": environment()}
    OUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
