"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8, embedded in the package, for demo and tests."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from advalign.data.images import SPLIT_SEED, Dataset, Images, hold_out

TEST_SIZE = 500


def load_digits() -> Dataset:
    """Return the digits: 1,297 training and 500 test images, (N, 1, 8, 8), stratified, the same in every run.

    Source: the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), which has no
    official split of its own.
    """
    train, test = hold_out(Images(*_scans()), TEST_SIZE, SPLIT_SEED)
    return Dataset("digits", train, test, tuple("0123456789"))


@cache  # scikit-learn reads a text file
def _scans() -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    values, labels = datasets.load_digits(return_X_y=True)
    pixels = torch.from_numpy(values).reshape(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)  # 0..16 as scanned
    return pixels, torch.from_numpy(labels).long()
