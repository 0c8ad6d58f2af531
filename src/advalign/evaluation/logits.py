"""What a model must return for its accuracy to mean anything: finite logits, one for each class."""

from __future__ import annotations

from torch import Tensor

from advalign.errors import UserError, require


def check_logits(outputs: object, labels: Tensor) -> Tensor:
    """Return a model's outputs for some images if they can be logits for labels (N,) such as these.

    Raises:
        UserError: they are no tensor, have another shape than (N, K), or too few columns.
    """
    if not isinstance(outputs, Tensor):
        raise UserError(f"the model must return logits, a tensor (N, K), not {type(outputs).__name__}")
    shape, n = tuple(outputs.shape), len(labels)
    fits = outputs.ndim == 2 and len(outputs) == n and outputs.shape[1] > 1
    require(fits, lambda: f"the model must return logits (N, K), K classes, not {shape} for {n} images")
    low, high = int(labels.min()), int(labels.max())
    classes = f"classes 0 to {shape[-1] - 1}"
    require(
        low >= 0 and high < shape[-1],
        lambda: f"the model's {shape[-1]} outputs are {classes}, but labels are {low} to {high}",
    )
    return outputs


def require_finite(logits: Tensor) -> None:
    """Refuse a model whose logits (N, K) on clean images are not all finite.

    Raises:
        UserError: on how many images they are not.
    """
    bad = int((~logits.isfinite().all(1)).sum())
    require(bad == 0, lambda: f"the model's outputs are not finite on {bad} of {len(logits)} clean images")
