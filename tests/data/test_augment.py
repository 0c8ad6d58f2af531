"""Augmentations: each operation against Pillow's on uint8 images, choices against the stated probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from advalign.data import AUGMENTATIONS, Batches, Images
from advalign.data.augment import autoaugment, color, geometry, idbh
from advalign.errors import UserError
from advalign.training.recipes import Recipe

N = 24


def photos(channels: int = 3, size: tuple[int, int] = (17, 14)) -> Tensor:
    """Smooth images of different contrast, some nearly flat, one constant."""
    draw = torch.Generator().manual_seed(5)
    coarse = torch.rand(N, channels, 5, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    spread = torch.linspace(0.02, 1.3, N)[:, None, None, None]
    pixels = ((smooth - 0.5) * spread + 0.5).clamp(0, 1).mul(255).to(torch.uint8)
    pixels[3] = 77
    return pixels


def pillow(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def back(image: Image.Image) -> Tensor:
    array = np.asarray(image)
    return torch.from_numpy(array.copy()).view(array.shape[0], array.shape[1], -1).permute(2, 0, 1)


def of(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, N, dtype=torch.float64)


def slanted(image: Image.Image, radians: float, axis: str) -> Image.Image:
    slope = math.tan(radians)
    x, y = image.width / 2, image.height / 2
    matrix = (1, slope, -slope * y, 0, 1, 0) if axis == "x" else (1, 0, 0, slope, 1, -slope * x)
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


CASES: dict[str, tuple[Callable, Callable, Tensor]] = {
    "saturation": (color.saturation, lambda i, s: ImageEnhance.Color(i).enhance(s), of(0.1, 1.9)),
    "brightness": (color.brightness, lambda i, s: ImageEnhance.Brightness(i).enhance(s), of(0.5, 1.9)),
    "contrast": (color.contrast, lambda i, s: ImageEnhance.Contrast(i).enhance(s), of(0.5, 1.9)),
    "sharpness": (color.sharpness, lambda i, s: ImageEnhance.Sharpness(i).enhance(s), of(0.1, 1.9)),
    "autocontrast": (lambda p, s: color.autocontrast(p), lambda i, s: ImageOps.autocontrast(i), of(0, 1)),
    "equalize": (lambda p, s: color.equalize(p), lambda i, s: ImageOps.equalize(i), of(0, 1)),
    "invert": (lambda p, s: color.invert(p), lambda i, s: ImageOps.invert(i), of(0, 1)),
    "posterize": (color.posterize, lambda i, s: ImageOps.posterize(i, int(s)), of(4, 8).round()),
    "solarize": (color.solarize, ImageOps.solarize, of(0, 256)),
    "rotate": (lambda p, s: geometry.rotate(p, s, fill=0), lambda i, s: i.rotate(s), of(-31, 31)),
    "shear x": (geometry.shear_x, lambda i, s: slanted(i, s, "x"), of(-0.35, 0.35)),
    "shear y": (geometry.shear_y, lambda i, s: slanted(i, s, "y"), of(-0.35, 0.35)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(17, 14), (32, 32), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_operations_give_pillows_result(name: str, channels: int, size: tuple[int, int]):
    ours, theirs, strength = CASES[name]
    pixels = photos(channels, size)
    expected = torch.stack([back(theirs(pillow(each), s)) for each, s in zip(pixels, strength.tolist(), strict=True)])
    most = 1 if name == "autocontrast" else 0  # which Pillow computes in floats and truncates
    assert (ours(pixels, strength).int() - expected.int()).abs().max() <= most


def uniforms(n: int, draws: int, seed: int = 0) -> Tensor:
    return torch.rand(n, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_resized_crop_is_pillows_crop_resized():
    pixels, u = photos(size=(23, 30)), uniforms(N, 22)
    sides = geometry._box(u[:, 2:], (23, 30), (23, 30), area=(0.08, 1), ratio=(3 / 4, 4 / 3))
    assert (sides > 0).all()
    expected = []
    for image, (height, width), (v, w) in zip(pixels, sides.tolist(), u[:, :2].tolist(), strict=True):
        top, left = int(v * (23 - height + 1)), int(w * (30 - width + 1))
        cut = pillow(image).crop((left, top, left + width, top + height))
        expected.append(back(cut.resize((30, 23), Image.Resampling.BILINEAR)))
    assert torch.equal(geometry.resized_crop(pixels, u), torch.stack(expected))


def test_boxes_have_the_stated_areas_and_ratios():
    height, width = geometry._box(uniforms(4000, 20), (224, 224), (224, 224), area=(0.08, 1), ratio=(3 / 4, 4 / 3)).T
    share, ratio = height * width / 224**2, height / width
    assert 0.07 < share.min() < 0.1
    assert 0.9 < share.max() <= 1
    assert 0.73 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.36
    assert abs((ratio > 1).double().mean() - (ratio < 1).double().mean()) < 0.06


def test_where_no_box_fits_the_central_one_is_taken():
    pixels = photos(size=(4, 40))
    u = torch.full((N, 22), 0.999, dtype=torch.float64)
    cut = [pillow(each).crop((17, 0, 22, 4)).resize((40, 4), Image.Resampling.BILINEAR) for each in pixels]
    assert torch.equal(geometry.resized_crop(pixels, u), torch.stack([back(each) for each in cut]))


def test_cropshift_keeps_one_window_in_order_and_black_is_around_it():
    numbered = torch.arange(1, 12 * 13 + 1).view(1, 1, 12, 13).expand(3000, 1, 12, 13)
    moved = geometry.crop_shift(numbered, uniforms(3000, 6))[:, 0]
    strengths = torch.zeros(11)
    for image in moved:
        rows, columns = (image > 0).any(1).nonzero()[:, 0], (image > 0).any(0).nonzero()[:, 0]
        window = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = window.shape
        corner = int(window[0, 0]) - 1
        top, left = divmod(corner, 13)
        assert torch.equal(window, numbered[0, 0, top : top + height, left : left + width])
        assert (image > 0).sum() == height * width
        strengths[(12 - height) + (13 - width)] += 1
    assert (strengths - 3000 / 11).abs().max() < 5 * (3000 / 11) ** 0.5


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_erasing_blackens_one_box_as_often_as_stated(p: float):
    white = torch.full((2000, 1, 32, 32), 255, dtype=torch.uint8)
    erased = geometry.erase(white, uniforms(2000, 23), p)[:, 0] == 0
    areas = erased.sum((1, 2))
    assert abs((areas > 0).double().mean() - p) < 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-9
    boxes = erased.any(1).sum(1) * erased.any(2).sum(1)
    assert torch.equal(areas, boxes)
    some = areas[areas > 0] / 1024
    assert 0.015 < some.min() < 0.03
    assert 0.31 < some.max() < 0.35


def test_each_operation_of_idbh_is_one_in_eight_and_within_its_strengths():
    u = uniforms(8000, 4)
    seen: list[Tensor] = []

    def watch(pixels: Tensor, own: Tensor) -> Tensor:
        seen.append(own)
        return pixels + 1

    pixels = torch.zeros(8000, 1, 1, 1, dtype=torch.uint8)
    assert (idbh.one_of([watch] * 8, pixels, u) == 1).all()  # exactly one each
    counts = torch.tensor([len(each) for each in seen])
    assert (counts - 1000).abs().max() < 5 * (8000 / 8 * 7 / 8) ** 0.5
    assert list(idbh.OPERATIONS) == [
        "saturation", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "shear", "rotate",
    ]  # fmt: skip


@pytest.mark.parametrize("name", idbh.OPERATIONS)
def test_operations_of_idbh_are_pillows_at_their_strengths(name: str):
    pixels, u = photos(size=(32, 32)), uniforms(N, 3, seed=1)
    bounds = {"saturation": (0.1, 1.9), "brightness": (0.5, 1.9), "contrast": (0.5, 1.9), "sharpness": (0.1, 1.9)}
    low, high = bounds.get(name, (0, 0))
    expected = []
    for image, (amount, sign, axis) in zip(pixels, u.tolist(), strict=True):
        strength, signed = low + (high - low) * amount, -1 if sign < 0.5 else 1
        if name == "rotate":
            strength = signed * (1 + int(10 * amount))
        if name == "shear":
            made = slanted(pillow(image), signed * (0.05 + 0.1 * amount), "x" if axis < 0.5 else "y")
        else:
            made = CASES[name][1](pillow(image), strength)
        expected.append(back(made))
    result = idbh.OPERATIONS[name](pixels, u)
    assert (result.int() - torch.stack(expected).int()).abs().max() <= (name == "autocontrast")


def policy_in_pillow(name: str, image: Image.Image, level: int, sign: int) -> Image.Image:
    """One operation as the port has it that DAJAT's code uses."""
    m, fill = level / 9, (128,) * len(image.getbands())
    move = {"method": Image.Transform.AFFINE, "fillcolor": fill if len(fill) > 1 else 128}
    match name:
        case "shear y":
            slope = sign * 0.3 * m
            return image.transform(image.size, data=(1, 0, 0, slope, 1, 0), resample=Image.Resampling.BICUBIC, **move)
        case "translate x":
            return image.transform(image.size, data=(1, 0, sign * 150 / 331 * m * image.width, 0, 1, 0), **move)
        case "translate y":
            return image.transform(image.size, data=(1, 0, 0, 0, 1, sign * 150 / 331 * m * image.height), **move)
        case "rotate":
            return image.rotate(30 * m, fillcolor=move["fillcolor"])
        case "posterize":
            return ImageOps.posterize(image, round(8 - 4 * m))
        case "solarize":
            return ImageOps.solarize(image, math.ceil(256 - 256 * m))  # typed as an integer
        case _:
            return CASES[name][1](image, 1 + sign * 0.9 * m)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", autoaugment.OPERATIONS)
def test_operations_of_autoaugment_are_pillows(name: str, channels: int):
    pixels, generator = photos(channels, (32, 32)), torch.Generator().manual_seed(2)
    level, sign = torch.randint(10, (N,), generator=generator), 1 - 2 * torch.randint(2, (N,), generator=generator)
    images = zip(pixels, level.tolist(), sign.tolist(), strict=True)
    expected = torch.stack([back(policy_in_pillow(name, pillow(each), k, s)) for each, k, s in images])
    result = autoaugment.OPERATIONS[name](pixels, level.double() / 9, sign.double())
    assert (result.int() - expected.int()).abs().max() <= (name in ("autocontrast", "shear y"))


@pytest.mark.parametrize("number", [0, 1, 13, 21])
def test_steps_of_a_sub_policy_are_taken_as_often_as_stated(number: int, monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []

    def watch(pixels: Tensor, m: Tensor, s: Tensor) -> Tensor:
        taken.append(len(m))
        return pixels

    monkeypatch.setattr(autoaugment, "OPERATIONS", dict.fromkeys(autoaugment.OPERATIONS, watch))
    u = uniforms(4000, 5)
    u[:, 0] = (number + 0.5) / 25
    autoaugment.autoaugment(torch.zeros(4000, 1, 1, 1, dtype=torch.uint8), u)
    for count, (p, _, _) in zip(taken, autoaugment.POLICY[number], strict=True):
        assert abs(count - 4000 * p) < 5 * (4000 * p * (1 - p)) ** 0.5
    assert len(autoaugment.POLICY) == 25


NEW = [name for name, each in AUGMENTATIONS.items() if each.then is not None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NEW)
def test_a_batch_is_its_images_one_by_one(name: str, channels: int):
    then, u = AUGMENTATIONS[name].then, uniforms(N, AUGMENTATIONS[name].draws)
    assert then is not None
    pixels = photos(channels)
    whole = then(pixels, u)
    assert torch.equal(whole, torch.cat([then(pixels[i : i + 1], u[i : i + 1]) for i in range(N)]))
    assert not torch.equal(whole, pixels)


@pytest.mark.parametrize("name", NEW)
def test_epochs_batches_and_second_augmentations_draw_anew(name: str):
    batches = Batches(Images(photos()[:1].repeat(N, 1, 1, 1), torch.arange(N)), 12, augment=name, seed=0)
    every = [x for epoch in range(2) for view in range(3) for x, _ in batches.epoch(epoch, view=view)]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


@pytest.mark.parametrize(("name", "darkest"), [("autoaugment", 1.0), ("autoaugment-first", 0.0)])
def test_the_border_of_the_crop_stays_black_where_flip_and_crop_come_last(
    name: str, darkest: float, monkeypatch: pytest.MonkeyPatch
):
    inverting = replace(AUGMENTATIONS[name], then=lambda pixels, u: 255 - pixels)
    monkeypatch.setitem(AUGMENTATIONS, name, inverting)
    black = Images(torch.zeros(16, 3, 12, 12, dtype=torch.uint8), torch.arange(16))
    ((x, _),) = Batches(black, 16, augment=name, seed=0).epoch(0)
    assert (float(x.min()), float(x.max())) == (darkest, 1.0)


def test_further_views_are_made_by_an_augmentation_of_their_own():
    images = Images(photos(), torch.arange(N))
    batches = Batches(images, N, augment="none", seed=0, further_augment="flip")
    ((x, y),), *further = ([*batches.epoch(0, view=view)] for view in range(3))
    assert torch.equal(x, images.floats(y))
    for ((flipped, labels),) in further:
        assert torch.equal(labels, y)
        assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(flipped, x, strict=True))
        assert not torch.equal(flipped, x)
    with pytest.raises(UserError, match="unknown augmentation 'flips'"):
        Batches(images, N, augment="none", seed=0, further_augment="flips")


def test_a_recipe_knows_the_same_names():
    assert get_args(get_type_hints(Recipe, {"Literal": Literal})["augment"]) == tuple(AUGMENTATIONS)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cropshift", (3, 8, 8), "augment=cropshift needs images of at least 11 x 11 pixels, and these have 8 x 8"),
        ("idbh-weak", (4, 32, 32), "augment=idbh-weak needs images of 1 or 3 channels, and these have 4"),
        ("idbh", (3, 32, 32), "unknown augmentation 'idbh': did you mean 'idbh-weak'"),
    ],
)
def test_what_cannot_work_is_refused(name: str, shape: tuple[int, ...], message: str):
    with pytest.raises(UserError, match=message):
        Batches(Images(torch.zeros(4, *shape), torch.arange(4)), 4, augment=name, seed=0)
