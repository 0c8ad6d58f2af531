"""Losses of the papers in numpy, image by image, and a batch with what the networks give on it."""

from __future__ import annotations

import copy

import numpy as np
import torch
from tests.networks import tiny
from tests.objectives.short_training import begun
from tests.samples import batch
from torch import Tensor

from advalign.objectives import compose, parse, total


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def ce(z: np.ndarray, y: int) -> float:
    return -np.log(softmax(z)[y])


def kl(z: np.ndarray, z_adv: np.ndarray) -> float:
    p, q = softmax(z), softmax(z_adv)
    return sum(p[k] * (np.log(p[k]) - np.log(q[k])) for k in range(len(p)))


class Case:
    """A batch, and what the networks give on it, image by image, from fresh copies in the modes of training."""

    def __init__(self) -> None:
        self.x, y = batch()
        self.x_adv = (self.x + 0.1 * torch.randn(self.x.shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1)
        self.y, self.labels = y, y.tolist()
        self.student, self.vanilla = tiny(0).double(), tiny(7).double().eval()
        self.robust, self.guide = tiny(8).double().eval(), tiny(9).double()
        self.x, self.x_adv = self.x.double(), self.x_adv.double()

    def logits(self, x: Tensor) -> np.ndarray:
        return copy.deepcopy(self.student).train()(x).detach().numpy()

    def maps(self, x: Tensor) -> np.ndarray:
        student = copy.deepcopy(self.student).train()
        return student.layer2(student.layer1(x)).detach().numpy()

    def loss(self, method: str) -> float:
        guests = {name: copy.deepcopy(getattr(self, name)) for name in ("vanilla", "robust", "guide")}
        objective = begun(compose(parse(method), student=copy.deepcopy(self.student), **guests).train())
        return total(objective(self.x, self.x_adv, self.y)).item()

    def mean(self, per_image) -> float:
        z, z_adv = self.logits(self.x), self.logits(self.x_adv)
        return float(np.mean([per_image(z[i], z_adv[i], y) for i, y in enumerate(self.labels)]))
