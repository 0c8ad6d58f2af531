"""The loss of a step: the terms of a method's parts, and the labels that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.errors import require, shorten
from advalign.models.taps import Output
from advalign.objectives.contract import Need, Term, Terms
from advalign.objectives.method import Method


def method_terms(
    method: Method, outs: Mapping[Need, Output], y: Tensor, rows: Tensor | None, label_smoothing: float
) -> Terms:
    """Return the terms of all parts on the passes of a step: the base's reweighed, all with their soft labels.

    Raises:
        UserError: a part returns something else than terms, two parts name the same term, or one supervises a view that
            the student does not see.
    """
    terms = method.base.terms(outs, y)
    _check(method.base.name, terms)
    for plugin in method.plugins:
        terms = plugin.reweigh(terms)
    for plugin in method.plugins:
        added = plugin.terms(outs, y)
        _check(plugin.name, added)
        clash = sorted(terms.keys() & added.keys())
        require(not clash, lambda: f"{method}: {clash} named by two parts")
        terms |= added
    require("loss" not in terms, lambda: f"{method}: a term is called 'loss', which is the name of their sum")
    softener = method.replacing("targets")
    if softener is None and not label_smoothing:
        return terms
    if softener is None:
        return {name: _smoothed(method, term, outs, label_smoothing) for name, term in terms.items()}
    with torch.no_grad():
        targets = softener.soft_targets(outs, y, rows if softener.reads_rows else None)
    return {name: _softened(method, term, outs, y, targets) for name, term in terms.items()}


def total(terms: Terms) -> Tensor:
    """Sum the weighted terms to the scalar loss.

    Example:
        >>> import torch, advalign as aa
        >>> from advalign.objectives.contract import Term
        >>> aa.total({"clean": Term(1.0, torch.tensor(2.0)), "kl": Term(6.0, torch.tensor(0.5))})
        tensor(5.)
    """
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def check_smoothing(method: Method, label_smoothing: float) -> None:
    """Refuse a share that is out of range, and smoothed labels where no cross entropy reads them as they are.

    Raises:
        UserError: the reason.
    """
    require(0 <= label_smoothing < 1, lambda: f"label_smoothing={label_smoothing:g} must be in [0, 1)")
    softener = method.replacing("targets")
    reason = (
        f"{softener.name!r} replaces the labels by soft targets"
        if softener is not None
        else ""
        if method.base.cross_entropy
        else f"{method.base.name!r} has no cross entropy"
    )
    require(
        not (label_smoothing and reason),
        lambda: f"{shorten(str(method))}: {reason}: label_smoothing={label_smoothing:g} must be 0",
    )


def _softened(method: Method, term: Term, outs: Mapping[Need, Output], y: Tensor, targets: Tensor) -> Term:
    """Put soft targets (N, K) in the place of the hard labels of a term: its cross entropy is linear in them."""
    if not term.supervises:
        return term
    log_p = F.log_softmax(_supervised(method, term, outs).logits, 1)
    moved = targets - F.one_hot(y, log_p.shape[1])
    return term._replace(value=term.value - (moved * log_p).sum(1).mean())


def _smoothed(method: Method, term: Term, outs: Mapping[Need, Output], share: float) -> Term:
    """Mix a uniform label into a term that supervises hard ones: Szegedy et al. 2016, for any label term."""
    if not term.supervises:
        return term
    uniform = -F.log_softmax(_supervised(method, term, outs).logits, 1).mean()
    return term._replace(value=(1 - share) * term.value + share * uniform)


def _supervised(method: Method, term: Term, outs: Mapping[Need, Output]) -> Output:
    """Return the student's pass whose hard labels a term fits."""
    assert term.supervises is not None
    need = Need("student", term.supervises)
    require(need in outs, lambda: f"{method}: a term supervises {term.supervises!r}, which the student does not see")
    return outs[need]


def _check(name: str, terms: Any) -> None:
    """Refuse terms of a wrong type or shape."""
    require(
        isinstance(terms, dict),
        lambda: f"{name}: terms() must return a dict of Terms by name, not {type(terms).__name__}",
    )
    for key, term in terms.items():
        require(
            isinstance(term, Term),
            lambda: f"{name}: term {key!r} must be Term(weight, value), not {type(term).__name__}",
        )
        require(
            term.value.ndim == 0,
            lambda: f"{name}: term {key!r} has shape {tuple(term.value.shape)}, not that of a scalar",
        )
