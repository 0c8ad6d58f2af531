"""The networks as a training attack runs them: with BatchNorm folded, in eval mode, refreshed at each attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Literal, final

from torch import Tensor, nn

from advalign.models.adapted import adapted
from advalign.models.fold import Folded
from advalign.models.modes import training
from advalign.models.taps import Output, Tapped
from advalign.objectives.contract import Network, Networks


@final
class Twins:
    """Folded twins of the student and the guests; they share the networks' weights, and hold nothing to save.

    Args:
        nets: the student and the guests by name, tapped.
    """

    def __init__(self, nets: nn.ModuleDict) -> None:
        self.nets = nets
        self.guests: dict[str, Folded] = {}

    @cached_property
    def student(self) -> Folded:
        """The student's twin, made at first use."""
        return Folded(self.nets["student"])

    @contextmanager
    def attacked(self, mode: Literal["eval", "train"]) -> Iterator[Networks]:
        """Yield the networks by name with frozen weights as they are now; `mode` is the student's.

        In train mode it is the network itself: batch statistics cannot be folded. Guests give logits alone.
        """
        networks: dict[str, Network] = {}
        for name in self.nets.keys() - {"student"}:
            networks[name] = partial(self._guest, name)
        with self._in_train_mode() if mode == "train" else self._in_eval_mode() as student, self._fresh_guests():
            yield {"student": student, **networks}

    @contextmanager
    def _in_train_mode(self) -> Iterator[nn.Module]:
        with training(self.nets["student"]):
            yield self.nets["student"]

    @contextmanager
    def _in_eval_mode(self) -> Iterator[nn.Module]:
        self.student.refresh()
        try:
            yield self.student
        finally:
            self.student.release()

    @contextmanager
    def _fresh_guests(self) -> Iterator[None]:
        for guest in self.guests.values():
            guest.refresh()
        try:
            yield
        finally:
            for guest in self.guests.values():
                guest.release()

    def _guest(self, name: str, x: Tensor) -> Output:
        """Run a guest on images that the attack moves: with gradient to them, also through a frozen one."""
        if name not in self.guests:
            net = self.nets[name]
            assert isinstance(net, Tapped)
            self.guests[name] = Folded(adapted(net.net))
        return Output(self.guests[name](x), {})
