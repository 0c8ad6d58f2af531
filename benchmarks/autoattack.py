"""AutoAttack's cost and strength beside the reference's code, on a model of which half of the right answers withstand.

    python benchmarks/autoattack.py --data-dir DIR      # CIFAR-10; about half an hour on one core

A small network is trained against the budget on 5,000 training images, and 200 test images are attacked in three ways:
by advalign; by the reference as its standard does, each attack on what the ones before have left; and plainly, each of
the reference's attacks on every image to its last step, which is what a loop does that drops nothing. Needs the package
`pyautoattack` (the reference, repackaged), which the extra `dev` brings. Writes results/benchmarks/autoattack.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from advalign import models
from advalign.attacks.ensemble import AutoAttack
from advalign.data import Batches, Dataset, Images, load, stratified_subset
from advalign.evaluation.accuracy import evaluate
from advalign.objectives import compose, parse, total
from advalign.runtime.device import one_thread
from advalign.runtime.environment import environment
from advalign.runtime.seeds import seeded
from advalign.threats import Linf

BUDGET = Linf(8 / 255)
OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "autoattack.json"
EPOCHS = 8


def half_robust(data: Dataset) -> nn.Module:
    """Train a small network against the budget for a few epochs."""
    with seeded("half-robust"):
        net = models.build("small-cnn(width=16)", classes=data.classes)
        objective = compose(parse("at"), student=net).train()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
        batches = Batches(stratified_subset(data.train, 5000, 0), 128, augment="flip-crop", seed=0)
        for epoch in range(EPOCHS):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / EPOCHS)
            for x, y in batches.epoch(epoch):
                total(objective(x, objective.perturb(x, y, BUDGET, steps=5), y)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return net.eval()


class PassCounter(nn.Module):
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


def theirs(net: nn.Module, images: Images, seed: int, *, plain: bool) -> dict[str, Any]:
    """Run the reference's four attacks: on what the ones before have left, or plainly on every image to the end."""
    given: dict[str, Any] = {"norm": "Linf", "eps": BUDGET.eps, "seed": seed}
    model = PassCounter(net)
    ce = APGDAttack(model, n_iter=100, n_restarts=1, loss="ce", **given)
    targeted = APGDAttack_targeted(model, n_iter=100, n_restarts=1, n_target_classes=9, **given)
    fab = FABAttack_PT(model, n_iter=100, n_restarts=1, n_target_classes=9, targeted=True, **given)
    square = SquareAttack(model, n_queries=5000, n_restarts=1, resc_schedule=False, **given)
    standard: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "apgd-ce": ce.perturb, "apgd-t": targeted.perturb, "fab-t": fab.perturb, "square": square.perturb,
    }  # fmt: skip
    everything: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "apgd-ce": lambda x, y: _single(ce, x, y),
        "apgd-t": lambda x, y: _each_target(targeted, x, y, 9),
        "fab-t": lambda x, y: _each_target(fab, x, y, 9),
        "square": square.perturb,  # queries stop at a fooled image in any case
    }
    x, y = images.floats(), images.labels
    with torch.no_grad():
        train_state = net(x).argmax(1) == y
    cost = {}
    for name, attack in (everything if plain else standard).items():
        rows = torch.arange(len(x)) if plain else train_state.nonzero()[:, 0]
        before, began = (model.forward_images, model.backward_images), time.perf_counter()
        found = attack(x[rows], y[rows])
        cost[name] = {
            "forward": model.forward_images - before[0],
            "backward": model.backward_images - before[1],
            "seconds": round(time.perf_counter() - began, 2),
        }
        for x_adv in found if isinstance(found, list) else [found[-1] if isinstance(found, tuple) else found]:
            inside = BUDGET.distance(x_adv, x[rows]) <= BUDGET.eps + 1e-6
            with torch.no_grad():
                train_state[rows] &= (net(x_adv).argmax(1) == y[rows]) | ~inside
    return {"robust": int(train_state.sum()), "passes": cost}


def _single(attack: Any, x: Tensor, y: Tensor) -> Tensor:
    """Run the reference's one pass over all images; what it fooled them with, or their last best."""
    attack.init_hyperparam(x)
    return attack.attack_single_run(x, y)[-1]


def _each_target(attack: Any, x: Tensor, y: Tensor, targets: int) -> list[Tensor]:
    found = []
    for k in range(2, targets + 2):
        attack.target_class = k
        if hasattr(attack, "y_target"):
            attack.init_hyperparam(x)
            with torch.no_grad():
                attack.y_target = attack.model(x).sort(dim=1)[1][:, -k]
            found.append(attack.attack_single_run(x, y)[-1])
        else:
            found.append(attack.attack_single_run(x, y, use_rand_start=False, is_targeted=True))
    return found


def ours(net: nn.Module, images: Images, seed: int) -> dict[str, Any]:
    """Run our AutoAttack member by member, for the cost of each."""
    found = evaluate(net, images, [AutoAttack(BUDGET)], seed=seed)
    cost = {name.partition("(")[0]: counts._asdict() for name, counts in found.members["autoattack"].items()}
    return {
        "clean": int(found.correct["clean"].sum()),
        "robust": int(found.correct["autoattack"].sum()),
        "seconds": round(found.seconds["autoattack"], 2),
        "passes": cost,
    }


def ratios(rows: list[dict[str, Any]], side: str) -> dict[str, float]:
    """Return how many times more passes one way takes than advalign, by attack and in all, over the same seeds."""
    sums: dict[str, list[int]] = {}
    for row in (row for row in rows if side in row):
        for k, way in enumerate((side, "advalign")):
            for name, cost in row[way]["passes"].items():
                for key in (name, "autoattack"):
                    sums.setdefault(key, [0, 0])[k] += cost["forward"] + cost["backward"]
    return {name: round(more / fewer, 2) for name, (more, fewer) in sums.items()}


def main(data_dir: Annotated[Path | None, tyro.conf.arg(help="where CIFAR-10 lies")] = None, seeds: int = 5) -> None:
    """Run all three, the plain way with the first seed only, and write and print what they cost and break."""
    with one_thread():
        data = load("cifar10", directory=data_dir)
        net, test = half_robust(data), stratified_subset(data.test, 200, 0)
        rows: list[dict[str, Any]] = []
        for seed in range(seeds):
            row = {"seed": seed, "reference": theirs(net, test, seed, plain=False), "advalign": ours(net, test, seed)}
            if seed == 0:
                row["plain"] = theirs(net, test, seed, plain=True)
            rows.append(row)
            print(json.dumps(row), flush=True)
    content = {
        "images": len(test),
        "training_epochs": EPOCHS,
        "withstand, mean": {way: sum(row[way]["robust"] for row in rows) / seeds for way in ("reference", "advalign")},
        "passes, reference / advalign": ratios(rows, "reference"),
        "passes, plain / advalign": ratios(rows, "plain"),
        "runs": rows,
        "environment": environment(),
    }
    print(json.dumps({name: value for name, value in content.items() if name != "runs"}, indent=1))
    OUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
