"""The plain loops that advalign is measured against, as the methods' authors and their successors write them.

`authors`: eager, NCHW, the clean logits recomputed with their graph at each attack step, `backward()` in AT's attack,
a forward of its own for each term of TRADES' loss: 23 student forwards for its step. No code of VFD's authors is known:
theirs is TRADES' loop with the term. `once`: the clean logits computed once and shared, as MAIR does: 13. `once, best`:
the same with the two lines that anybody may add, channels_last and bf16 autocast. Evaluation is that of torchattacks:
every image, to the last step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
BETA, WEIGHT = 6.0, 0.02
Step = Callable[[Tensor, Tensor], None]


def sgd(*networks: nn.Module) -> torch.optim.SGD:
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def natural(student: nn.Module) -> Step:
    """Natural training."""
    optimizer = sgd(student)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()

    return step


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images that a loader's workers shift over a border of 4 pixels, mirror and scale, one at a time."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = F.pad(self.pixels[index], (4, 4, 4, 4))
        top, left, mirrored = (int(torch.randint(n, ())) for n in (9, 9, 2))
        image = image[:, top : top + 32, left : left + 32]
        return (image.flip(2) if mirrored else image).float() / 255, self.labels[index]


def epoch(student: nn.Module, pixels: Tensor, labels: Tensor, size: int, workers: int) -> Callable[[], None]:
    """An epoch of natural training with torch's loader."""
    step, device = natural(student), next(student.parameters()).device
    loader = DataLoader(
        Augmented(pixels, labels), size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip

    def run() -> None:
        for x, y in loader:
            step(x.to(device, non_blocking=True), y.to(device, non_blocking=True))

    return run


def at(student: nn.Module, *, authors: bool) -> Step:
    """PGD-10 adversarial training; the authors' attack computes the weights' gradients as well, and drops them."""
    optimizer = sgd(student)

    def step(x: Tensor, y: Tensor) -> None:
        student.eval()
        x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            loss = F.cross_entropy(student(x_adv), y, reduction="sum")
            if authors:
                loss.backward()
                assert x_adv.grad is not None
                grad = x_adv.grad
            else:
                (grad,) = torch.autograd.grad(loss, [x_adv])
            x_adv = x_adv.detach() + STEP * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        student.train()
        optimizer.zero_grad()
        F.cross_entropy(student(x_adv), y).backward()
        optimizer.step()

    return step


def trades_attack(student: nn.Module, x: Tensor, *, authors: bool) -> Tensor:
    """Return the examples of TRADES' inner maximisation."""
    student.eval()
    clean = None
    if not authors:
        with torch.no_grad():
            clean = student(x).softmax(1)
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        target = student(x).softmax(1) if clean is None else clean
        loss = F.kl_div(student(x_adv).log_softmax(1), target, reduction="sum")
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    student.train()
    return x_adv


def trades(student: nn.Module, vanilla: nn.Module | None = None, *, authors: bool) -> Step:
    """TRADES, and with a vanilla model VFD on it."""
    optimizer = sgd(student)
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: object, output: Tensor) -> None:
        seen[module] = output

    networks = [student] if vanilla is None else [student, vanilla]
    layers = [network.get_submodule("layer4") for network in networks]
    for layer in layers if vanilla is not None else []:
        layer.register_forward_hook(keep)

    def step(x: Tensor, y: Tensor) -> None:
        x_adv = trades_attack(student, x, authors=authors)
        loss = torch.zeros((), dtype=x.dtype, device=x.device)
        clean = student(x)
        clean_features = seen[layers[0]].flatten(1) if vanilla is not None else None
        adv = student(x_adv)
        if vanilla is not None and clean_features is not None:
            adv_features = seen[layers[0]].flatten(1)
            with torch.no_grad():
                vanilla(x)
            target = seen[layers[1]].flatten(1)
            distances = (clean_features - target).norm(dim=1) + (adv_features - target).norm(dim=1)
            loss = loss + WEIGHT * distances.mean()
        towards = student(x) if authors else clean
        kl = F.kl_div(adv.log_softmax(1), towards.softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        (loss + F.cross_entropy(clean, y) + BETA * kl).backward()
        optimizer.step()

    return step


def lbgat(student: nn.Module, guide: nn.Module, *, authors: bool) -> Step:
    """LBGAT on TRADES: the guide learns the labels, and the student the guide; each forward once, as the authors do."""
    optimizer = sgd(student, guide)

    def step(x: Tensor, y: Tensor) -> None:
        x_adv = trades_attack(student, x, authors=authors)
        clean, adv, boundary = student(x), student(x_adv), guide(x)
        kl = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        (F.mse_loss(adv, boundary) + F.cross_entropy(boundary, y) + BETA * kl).backward()
        optimizer.step()

    return step


def pgd(net: nn.Module, x: Tensor, y: Tensor, *, steps: int = 20) -> Tensor:
    """Return which images withstand the last iterate of PGD: (N,), boolean."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), x_adv)
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    with torch.no_grad():
        return net(x_adv).argmax(1) == y


def carlini_wagner(net: nn.Module, x: Tensor, y: Tensor, *, steps: int = 100) -> Tensor:
    """Return which images withstand C&W in L2 with c=1, without the early stop that looks at the whole batch."""
    w = ((2 * x - 1) * 0.999999).atanh().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.01)
    best, nearest = x.clone(), x.new_full((len(x),), torch.inf)
    for _ in range(steps):
        x_adv = (w.tanh() + 1) / 2
        logits = net(x_adv)
        own = logits.gather(1, y[:, None])[:, 0]
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        distance = (x_adv - x).flatten(1).square().sum(1)
        optimizer.zero_grad()
        (distance + (own - others).clamp_min(0)).sum().backward()
        kept = (logits.argmax(1) != y) & (distance < nearest)
        best[kept], nearest[kept] = x_adv[kept].detach(), distance[kept].detach()
        optimizer.step()
    with torch.no_grad():
        return net(best).argmax(1) == y
