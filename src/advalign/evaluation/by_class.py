"""Outcomes by class: where one class has more images than another, the accuracy over all hides the small ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMBALANCED = 1.5  # images of the largest class for each of the smallest, above which accuracies are also balanced


@dataclass(frozen=True)
class ClassOutcomes:
    """How many images each class has, and how many of them are classified correctly, clean and under each attack."""

    names: Sequence[str]
    sizes: Sequence[int]
    correct: Mapping[str, Sequence[int]]
    """By `clean`, each attack's spelling, and `worst case`."""

    @classmethod
    def count(cls, names: Sequence[str], labels: Tensor, outcomes: Mapping[str, Tensor]) -> ClassOutcomes:
        """Count by class.

        Args:
            names: of the model's classes, in the order of its logits.
            labels: (N,) int64.
            outcomes: by name, (N,) bool, whether the image is classified as its label.
        """
        labels = labels.cpu()
        sizes = torch.bincount(labels, minlength=len(names)).tolist()
        return cls(
            tuple(names),
            sizes,
            {name: torch.bincount(labels[right], minlength=len(names)).tolist() for name, right in outcomes.items()},
        )

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> ClassOutcomes | None:
        """Take the counts from the content of a result file; None if it has none, as those of earlier versions."""
        if not result.get("class_sizes"):
            return None
        return cls(result["class_names"], result["class_sizes"], result["class_correct"])

    @property
    def imbalanced(self) -> bool:
        """Whether the largest class has more than 1.5 times the images of the smallest that has any."""
        present = [size for size in self.sizes if size]
        return max(present) > IMBALANCED * min(present)

    def accuracies(self, name: str) -> list[float]:
        """Return each class's accuracy in [0, 1]; NaN for a class without images."""
        return [right / size if size else math.nan for right, size in zip(self.correct[name], self.sizes, strict=True)]

    def balanced(self, name: str) -> float:
        """Return the balanced accuracy in [0, 1]: the mean over the classes that have images."""
        present = [accuracy for accuracy in self.accuracies(name) if not math.isnan(accuracy)]
        return sum(present) / len(present)
