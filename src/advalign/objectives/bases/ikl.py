"""Improved KL: the decoupled divergence with gradient to both sides and the weights of whole classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.split_norm import using_norms
from advalign.models.taps import Tapped
from advalign.objectives.bases.trades import from_clean
from advalign.objectives.contract import ADV, CLEAN, Networks, Outputs, Term, Terms, Views
from advalign.objectives.distances import pairwise_gap
from advalign.objectives.method import Base
from advalign.runtime import ranks
from advalign.shapes import Labels, Logits, PerImage


@final
class IKL(Base):
    """CE(f(x), y) + alpha CE(p, p') + beta mean(1/4 sum_jk q_j q_k ((o_j - o_k) - (o'_j - o'_k))^2). Cui et al. 2024.

    o, o' are clean and adversarial logits, p, p' their predictions; q is the mean prediction, at the temperature, of
    the image's class. p and q are constants; the squared differences send gradient to both sides.

    q is computed before each epoch over its clean images, in eval mode, and is uniform until then. The authors
    accumulate it in train mode during the epoch before, and begin with the uniform one: no extra pass, older weights.

    Args:
        attack: what the attack maximises. `ikl`: the two parts of the divergence with weight 1 each, as three of the
            authors' four scripts do; `kl`: TRADES' divergence, as their first for CIFAR-10 does.

    Raises:
        UserError: alpha or beta is negative, or the temperature is not above 0.
    """

    name = "ikl"
    supervises = ("clean",)
    needs = (CLEAN, ADV)
    revision = 1  # until then the attack was TRADES'
    means: Tensor

    def __init__(
        self,
        alpha: float = 3.0,
        beta: float = 20.0,
        temperature: float = 4.0,
        attack: Literal["ikl", "kl"] = "ikl",
    ) -> None:
        super().__init__()
        require(alpha >= 0, lambda: f"ikl: alpha={alpha:g} must be at least 0")
        require(beta >= 0, lambda: f"ikl: beta={beta:g} must be at least 0")
        require(temperature > 0, lambda: f"ikl: temperature={temperature:g} must be above 0")
        self.alpha, self.beta, self.temperature, self.attack = alpha, beta, temperature, attack
        # (K, K), a row for each label; its size is known from logits only, so it is saved as extra state.
        self.register_buffer("means", torch.zeros(0, 0), persistent=False)

    def get_extra_state(self) -> Tensor:
        """Return the class means, for the run's state."""
        return self.means

    def set_extra_state(self, state: Tensor) -> None:
        """Take the class means back."""
        self.means = state.to(self.means.device)

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Average the clean predictions of each class; a class without images stays uniform."""
        sums = counts = torch.zeros(())
        with using_norms(student, "clean"):
            for x, y in batches:
                p = (student(x).logits / self.temperature).softmax(1)
                members = F.one_hot(y, p.shape[1]).to(p.dtype)
                sums, counts = sums + members.T @ p, counts + members.sum(0)[:, None]
        require(counts.ndim > 0, "ikl averages its predictions over the epoch's batches, and there are none")
        sums, counts = ranks.all_sum(sums), ranks.all_sum(counts)
        self.means = torch.where(counts > 0, sums / counts.clamp_min(1), 1 / len(counts))

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the divergence from the clean prediction, with weight 1 for each of its parts, or TRADES'."""
        kl = from_clean(nets["student"], views["clean"])
        if self.attack == "kl":
            return kl
        return kl._replace(loss=_divergence, target=torch.stack([kl.target, self._weights(kl.target, y)], 1))

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy on the clean images and the two parts of the divergence."""
        clean, adv = outs[CLEAN].logits, outs[ADV].logits
        return {
            "clean": Term(1.0, F.cross_entropy(clean, y), supervises="clean"),
            "soft": Term(self.alpha, F.cross_entropy(adv, clean.detach().softmax(1))),
            "pairs": Term(self.beta, pairwise_gap(clean, adv, self._weights(clean, y)).mean()),
        }

    def _weights(self, clean: Logits, y: Labels) -> Tensor:
        """Return q of each image, (N, K)."""
        return self.means[y] if len(self.means) else torch.full_like(clean, 1 / clean.shape[1])


def _divergence(adv: Logits, target: Tensor) -> PerImage:
    """Return both parts of the divergence, the first as a KL, from the clean logits and the weights: (N, 2, K)."""
    clean, q = target.unbind(1)
    return kl_divergence(adv, clean) + pairwise_gap(clean, adv, q)
