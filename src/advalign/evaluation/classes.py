"""Which of a model's classes the images of a data set have: matched by name, where both have names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor

from advalign.data import Dataset, Images
from advalign.errors import nearly_alike, require, shorten

_LISTED = 10


@dataclass(frozen=True, eq=False)
class ClassMatch:
    """The classes of a model, and which of them a data set's labels stand for."""

    class_names: tuple[str, ...]
    """The model's classes in the order of its logits."""
    numbers: Tensor
    """(K,) int64: of each of the data set's K classes the number that the model has for it."""
    by_number: str = ""
    """What must be said where labels or classes without names are taken by their numbers."""

    def relabel(self, images: Images) -> Images:
        """Return images of the data set with the model's labels."""
        return images.relabelled(self.numbers.to(images.labels.device)[images.labels])

    @property
    def changes_labels(self) -> bool:
        """Whether some label stands for another number."""
        return not torch.equal(self.numbers, torch.arange(len(self.numbers)))

    def note(self, images: Images) -> str:
        """Say what a reader of results must know; nothing where images of the data set have all classes, as they are.

        Args:
            images: with the labels of the data set.
        """
        known, notes = self.class_names, []
        present = self.numbers[images.labels.unique().cpu()].sort().values.tolist()
        if len(present) < len(known):
            notes.append(f"{len(present)} of {len(known)} classes: {_listed([known[number] for number in present])}")
        if self.by_number:
            notes.append(self.by_number)
        if not torch.equal(self.numbers.sort().values, self.numbers):
            notes.append("the labels are in another order than the model's, and matched to it by name")
        return "; ".join(notes)


def match_classes(path: Path, card: Mapping[str, Any], dataset: Dataset, outputs: int | None = None) -> ClassMatch:
    """Match the classes of a data set to those of a model: by name, or by number where one of both has no names.

    By name, the data may have their classes in another order, and only some of the model's. By number, there must be
    equally many classes; but data without names or training images may lack some.

    Args:
        path: the model's weights file, for the errors.
        card: what the file says of itself.
        outputs: the number of the model's classes, where the card does not say it; by default that of the data.

    Raises:
        UserError: the names that the model does not know, or both numbers of classes.
    """
    names = tuple(normalize("NFC", name) for name in card.get("class_names", ()))
    count = card.get("classes", outputs or dataset.classes)
    if names and dataset.named:
        unknown = [name for name in dataset.class_names if name not in names]
        require(
            not unknown,
            lambda: (
                f"{dataset.name} has classes that {path} does not know: {_listed(unknown)}; "
                f"those of the model are {_listed(names)}{nearly_alike(unknown, names)}"
            ),
        )
        numbers = torch.tensor([names.index(name) for name in dataset.class_names])
    else:
        may_lack_classes = not dataset.named and not len(dataset.train)
        require(
            dataset.classes == count or (may_lack_classes and dataset.classes < count),
            lambda: f"wrong number of classes: {path} has {count}, the data set {dataset.name} has {dataset.classes}",
        )
        numbers = torch.arange(dataset.classes)
    known = names or (dataset.class_names if dataset.classes == count else tuple(map(str, range(count))))
    by_number = ""
    if names and not dataset.named and known != dataset.class_names:
        by_number = "the labels have no names, and are taken as the numbers of the model's classes"
    elif not names and dataset.named and dataset.sources:
        by_number = f"the model's classes have no names, and are taken in this order: {_listed(dataset.class_names)}"
    return ClassMatch(known, numbers, by_number)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return shorten(", ".join(names[:_LISTED])) + more
