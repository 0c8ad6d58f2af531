"""An objective: a method bound to its networks. One module makes the examples and runs a whole training step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import Start, ascend
from advalign.errors import require, unknown
from advalign.models.fold import Folded
from advalign.models.modes import training
from advalign.models.taps import Out, Tapped
from advalign.objectives.parts import Base, Method, Need, PlugIn, Terms, union
from advalign.threats import Threat, check_images


@final
class Objective(nn.Module):
    """A method and its networks as one module, so that compile, autocast and DDP see one forward a step.

    Raises:
        UserError: a guest is missing, or a layer does not exist. Guests that the method does not need are left alone.
    """

    nets: nn.ModuleDict

    def __init__(self, method: Method, student: nn.Module, guests: Mapping[str, nn.Module]) -> None:
        super().__init__()
        missing = [name for name in method.guests if guests.get(name) is None]
        require(not missing, f"{method} needs {' and '.join(f'a {name} model' for name in missing)}: give {missing}")
        self._images_checked = False
        self.method = method = copy.deepcopy(method)  # learnt parts belong to one objective
        self.parts = nn.ModuleList(method.parts)
        for plugin in method.plugins:
            student = plugin.adapt(student)
        layers = union(plugin.layers(student) for plugin in method.plugins)
        self.nets = nn.ModuleDict({"student": Tapped(student, layers)})
        for name in method.guests:
            self.nets[name] = Tapped(guests[name], layers, frozen=name not in method.learners)

    @property
    def student(self) -> nn.Module:
        """The network being trained, without its taps."""
        return self.nets.get_submodule("student.net")

    def perturb(
        self,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        steps: int | None = None,
        step_size: float | None = None,
        start: Start | None = None,
        mode: Literal["eval", "train"] | None = None,
    ) -> Tensor:
        """Make the method's adversarial examples for images x (N, C, H, W) in [0, 1] with labels y (N,).

        What is not given is the method's own; the step size is then a quarter of the radius. Inputs, modes and
        gradients are left as they were; in train mode the student's BatchNorm statistics move, as in Rice et al. 2020.
        A base without adversarial examples gives x back.

        Raises:
            UserError: images outside [0, 1], on the first call; an unknown start or mode, or no steps.
        """
        craft = self.method.base.craft
        if craft is None:
            return x
        if not self._images_checked:  # once: it synchronises with the device
            check_images(x)
            self._images_checked = True
        if mode not in (None, "eval", "train"):
            raise unknown("mode", mode, ("eval", "train"))
        network = self._train_mode() if (mode or craft.mode) == "train" else self._eval_mode()
        with network as student, torch.enable_grad():
            owner = next((plugin for plugin in self.method.plugins if plugin.goal is not None), self.method.base)
            assert owner.goal is not None
            return ascend(
                owner.goal(student, x, y),
                x,
                threat,
                steps=craft.steps if steps is None else steps,
                step_size=threat.eps / 4 if step_size is None else step_size,
                start=start or craft.start,
            )

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """Run every declared pass once and return the named terms of the loss; `total` sums them."""
        views = self.method.base.views(x, x_adv)
        outs: dict[Need, Out] = {need: self.nets[need.net](views[need.view]) for need in self.method.needs}
        terms = self.method.base.terms(outs, y)
        for plugin in self.method.plugins:
            terms = plugin.reweigh(terms)
        for plugin in self.method.plugins:
            added = plugin.terms(outs, y)
            clash = sorted(terms.keys() & added.keys())
            require(not clash, f"{self.method}: {clash} named by two parts")
            terms |= added
        return terms

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the training passes and the attack's network with `torch.compile`, which takes the arguments."""
        super().compile(*args, **kwargs)
        self._folded.compile(*args, **kwargs)

    def learned_state(self) -> dict[str, Any]:
        """Return the state dict without the frozen guests, which are files of their own."""
        idle = tuple(f"nets.{name}." for name in self.nets if self._tapped(name).frozen)
        return {key: value for key, value in self.state_dict().items() if not key.startswith(idle)}

    def _tapped(self, name: str) -> Tapped:
        net = self.nets[name]
        assert isinstance(net, Tapped)
        return net

    @cached_property
    def _folded(self) -> Folded:
        return Folded(self.nets["student"])

    @contextmanager
    def _eval_mode(self):
        # The twin has BatchNorm folded into the convolutions and frozen weights; folded anew once a step.
        self._folded.refresh()
        yield self._folded

    @contextmanager
    def _train_mode(self):
        # Batch statistics cannot be folded: this is the plain path.
        with training(self.nets["student"]):
            yield self.nets["student"]


def compose(method: Method | Base, *plugins: PlugIn, student: nn.Module, **guests: nn.Module | None) -> Objective:
    """Bind a method, or a base and plug-ins, to its networks: `compose(TRADES(), VFD(), student=net, vanilla=other)`.

    Args:
        student: the network being trained; images (N, C, H, W) in [0, 1] to logits (N, K). Moved or replaced modules
            (by a plug-in that adapts it) are reached through `objective.student`.
        guests: `vanilla=`, and whatever else the method needs, as networks of the same input and output. They are
            frozen, in eval mode, unless the method trains them.

    Raises:
        UserError: the parts make no sense together, a guest is missing, or a layer does not exist.
    """
    method = Method(method) if isinstance(method, Base) else method
    for plugin in plugins:
        method = method + plugin
    given = {name: net for name, net in guests.items() if net is not None}
    require(all(net is not student for net in given.values()), "the student cannot be its own guest: copy.deepcopy it")
    return Objective(method, student, given)


def total(terms: Terms) -> Tensor:
    """Sum the weighted terms to the scalar loss."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()
