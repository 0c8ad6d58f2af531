"""Images with adversarial examples of them: every setting of a dial is shown all, whoever they were made on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from advalign.attacks.classification import in_fp32
from advalign.data import Images
from advalign.errors import UserError
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating
from advalign.runtime.files import digest
from advalign.runtime.memory import require_memory
from advalign.threats import Threat, require_inside

CLEAN = "clean"


@dataclass(eq=False)
class Evidence:
    """Images, and sets of adversarial examples inside the threat model by who made them; `clean` is one of the sets.

    Logits are kept by network, so that a network is asked once for each set.
    """

    images: Images
    threat: Threat
    batch_size: int
    sets: dict[str, Tensor] = field(default_factory=dict)
    """By name, (N, C, H, W) in [0, 1], on the CPU."""
    _logits: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _asked: dict[int, nn.Module] = field(default_factory=dict)  # kept alive, or another could get the same id

    def __post_init__(self) -> None:
        what, size = f"a dial on {len(self.images)} images", 8 * self.images.shape.numel()  # and one set of examples
        require_memory(size, torch.device("cpu"), what, "take fewer, with --n and --held-out")
        self.sets[CLEAN] = self.images.to("cpu").floats()

    @property
    def labels(self) -> Tensor:
        """(N,) int64, on the CPU."""
        return self.images.labels.cpu()

    @property
    def identity(self) -> str:
        """A digest of images and labels."""
        return digest(self.images.digests.tobytes(), self.labels.numpy().tobytes())

    def fingerprint(self, net: nn.Module) -> str:
        """Return a digest of a network's logits on the images themselves, which tells any two functions apart."""
        return digest(self._classify(net, self.sets[CLEAN]).contiguous().numpy().data)

    def __len__(self) -> int:
        return len(self.images)

    def add(self, name: str, x_adv: Tensor) -> None:
        """Add adversarial examples (N, C, H, W) of all images.

        Raises:
            UserError: they leave the threat model, or another set has the name.
        """
        if name in self.sets:
            raise UserError(f"two sets of adversarial examples are called {name!r}")
        require_inside(name, self.threat, x_adv, self.sets[CLEAN])
        self.sets[name] = x_adv

    def logits(self, net: nn.Module, name: str) -> Tensor:
        """Return a network's logits (N, K) for a set, on the CPU in the type in which the network gives them."""
        key = id(net), name
        if key not in self._logits:
            self._asked[id(net)] = net
            self._logits[key] = self._classify(net, self.sets[name])
        return self._logits[key]

    @torch.no_grad()
    def _classify(self, net: nn.Module, x: Tensor) -> Tensor:
        device, network = self.images.labels.device, adapted(net)
        with evaluating(net), in_fp32(device):
            return torch.cat([network(part.to(device)).cpu() for part in x.split(self.batch_size)])

    def withstand(self, classified: Callable[[str], Tensor]) -> Tensor:
        """Return (N,) bool: the images that are right in all sets.

        Args:
            classified: of a set's name, (N,) bool, which of its images are classified as their labels.
        """
        return torch.stack([classified(name) for name in self.sets]).all(0)
