"""Is a model better than always answering one class? Against scipy's binomial test and counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from advalign.evaluation.checks import NO_BETTER, beats_constant, check_clean


def labels_of(*sizes: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@pytest.mark.parametrize("sizes", [(34, 33, 33), (90, 10), (60, 25, 15), (500, 500), (10,) * 10])
def test_the_verdict_is_that_of_the_exact_one_sided_test_with_the_share_of_the_largest_class(sizes: tuple[int, ...]):
    from scipy.stats import binomtest  # takes seconds, which the collection of the tests would pay

    labels, n, largest = labels_of(*sizes), sum(sizes), max(sizes)
    for right in {0, largest - 1, largest, largest + 1, largest + n // 20, largest + n // 10, n - 1, n}:
        p = binomtest(right, n, largest / n, alternative="greater").pvalue
        assert beats_constant(right, labels) == (right > largest and p < NO_BETTER), (right, p)


def test_the_largest_class_counts_and_not_the_number_of_classes():
    labels = labels_of(90, 5, 5)
    assert not beats_constant(90, labels)  # far above a third
    assert not beats_constant(91, labels)
    assert beats_constant(95, labels)


@pytest.mark.parametrize(
    ("right", "sizes"),
    [(8, (4, 3, 3)), (8, (5, 3, 2)), (7, (4, 3, 3)), (10, (9, 1)), (3, (1, 1, 1)), (2, (1, 1)), (5, (7,)), (0, (7,))],
)
def test_few_images_are_no_reason_for_alarm(right: int, sizes: tuple[int, ...]):
    assert beats_constant(right, labels_of(*sizes))


@pytest.mark.parametrize(("right", "sizes"), [(4, (4, 3, 3)), (3, (4, 3, 3)), (9, (9, 1)), (1, (1, 1)), (0, (1, 1, 1))])
def test_few_images_do_not_hide_what_is_no_better(right: int, sizes: tuple[int, ...]):
    assert not beats_constant(right, labels_of(*sizes))


def test_the_sentence_names_both_numbers():
    labels = labels_of(90, 10)
    right = torch.zeros(100, dtype=torch.bool)
    right[:90] = True
    verdict = check_clean(right, labels)
    assert verdict.passed == "warn"
    assert verdict.sentence == (
        "Clean accuracy is 90.0 ± 3.0 %, not better than always answering the largest class, 90.0 % of these images."
    )
    right[90:92] = True
    assert "not clearly better" in check_clean(right, labels).sentence
    right[:] = True
    assert check_clean(right, labels).passed == "pass"
