"""The networks of a training: the student as its seed initialises it, and guests from files, bound to their method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from advalign import models
from advalign.data import Dataset
from advalign.errors import UserError, require
from advalign.objectives import Method, Objective
from advalign.runs import Weights, require_classes
from advalign.runs.run import data_kind
from advalign.runtime.seeds import seeded
from advalign.training.recipes import Recipe


def build_objective(
    method: Method,
    model: str,
    dataset: Dataset,
    recipe: Recipe,
    guests: Mapping[str, Weights | None],
    init: Weights | None = None,
) -> Objective:
    """Build the student and the guests for a data set, and bind the method to them; in eval mode, on the CPU.

    Args:
        model: the student's architecture, and that of the guests whose weights do not say another.
        guests: the weights by the guest's name; None for a network as the recipe's seed initialises it.
        init: what the student starts from; if None, it is as the recipe's seed initialises it.

    Raises:
        UserError: weights of another data set, number of classes or architecture, or networks that do not fit.
    """
    networks = {
        name: _network(name, model, dataset, recipe)
        if weights is None
        else load_guest(name, weights, model, dataset, recipe)
        for name, weights in guests.items()
    }
    student = _network("student", model, dataset, recipe)
    if init is not None:
        start_from(student, init, model, dataset)
    images = len(dataset.train) if method.reads_rows else 0
    return Objective(method, student, networks, recipe.label_smoothing, images).eval()


def _network(role: str, model: str, dataset: Dataset, recipe: Recipe) -> nn.Module:
    """Return a network as the recipe's seed and its role initialise it."""
    with seeded(recipe.seed, role):
        return models.build(model, classes=dataset.classes, channels=dataset.shape[0])


def start_from(student: nn.Module, init: Weights, model: str, dataset: Dataset) -> None:
    """Copy the weights that a training starts from into the student.

    Raises:
        UserError: weights for other classes, of another architecture, or that do not fit.
    """
    stored, card = init.read()
    require_classes(init.path, card, dataset)
    its = init.model or card.get("model", model)
    require(its == model, lambda: f"{init.path} is of a {its}, and the student is a {model}: name it with --model")
    init.load_into(student, stored)


def load_guest(role: str, weights: Weights, model: str, dataset: Dataset, recipe: Recipe) -> nn.Module:
    """Return a guest with the weights of a file; its architecture is the student's where nothing names another."""
    path = weights.path
    stored, card = weights.read()
    require_classes(path, card, dataset)
    data = card.get("data", dataset.name)
    require(data_kind(data) == data_kind(dataset.name), lambda: f"{path} was trained on {data}, not on {dataset.name}")
    guest = _network(role, weights.architecture(card, typed=model) or model, dataset, recipe)
    try:
        weights.load_into(guest, stored)
    except UserError as error:
        hint = f"; if the {role} model's architecture is another, write MODEL@{path.name}"
        raise UserError(f"{error}{'' if weights.model or card else hint}") from None
    models.check_output(guest, dataset.shape, dataset.classes)
    return guest
