"""The embedded digits."""

from __future__ import annotations

import numpy as np
import torch

from advalign.data import load


def test_split_is_fixed_complete_and_stratified():
    data = load("digits")
    assert (len(data.train), len(data.test)) == (1297, 500)
    assert data.shape == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    everyone = torch.cat([data.train.labels, data.test.labels]).bincount()
    assert ((data.test.labels.bincount() - everyone * 500 / 1797).abs() < 1).all()
    assert data.digest == load("digits").digest == "786340870a6ab118"


def test_values_are_scikit_learns():
    from sklearn import datasets  # takes seconds, which the collection of the tests would pay

    data = load("digits")
    values, labels = datasets.load_digits(return_X_y=True)
    expected = {(tuple(np.rint(v * 255 / 16).astype(int)), int(label)) for v, label in zip(values, labels, strict=True)}
    found = {
        (tuple(image.tolist()), int(label))
        for part in (data.train, data.test)
        for image, label in zip(part.pixels.flatten(1), part.labels, strict=True)
    }
    assert found == expected
