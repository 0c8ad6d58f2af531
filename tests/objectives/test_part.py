"""PART: the map against Pillow, matplotlib and autograd by hand; the box that the attack gets; when it gets it."""

from __future__ import annotations

import copy

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from tests.networks import TinyNet, tiny
from tests.objectives.short_training import begun
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.models import build
from advalign.objectives import BASES, Objective, compose, parse, total
from advalign.objectives.plugins.part import PART, important, jet
from advalign.threats import L2, Linf, PixelLinf

EPS, LOW = 8 / 255, 7 / 255
JOINED = [
    base for base in BASES if parse(base).base.training_attack is not None and not parse(base).base.standalone_reason
]


class Spatial(TinyNet):
    """With a bend after the pooling, so that the gradients of the logits differ from image to image."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)).square())


def net_of(channels: int = 3) -> TinyNet:
    net = Spatial(channels=channels)
    net.load_state_dict(tiny(3, channels=channels).state_dict())
    return net


def images(n: int = 6, channels: int = 3, side: int = 16) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    low = torch.rand(n, channels, 4, 4, generator=draw)  # smooth, so that the maps have hills
    x = nn.functional.interpolate(low, (side, side), mode="bilinear")
    return x, torch.randint(0, 4, (n,), generator=draw)


def bound(method: str = "at+part", channels: int = 3, **arguments) -> Objective:
    guests = {name: tiny(k, channels=channels) for k, name in enumerate(("vanilla", "robust"), start=7)}
    return begun(Objective(parse(method), net_of(channels), guests, **arguments).train())


def box(objective: Objective, x: Tensor, eps: float = EPS) -> PixelLinf:
    """The threat that the plug-in makes of Linf(eps), from the network that the attack sees."""
    (plugin,) = objective.method.plugins
    with objective._twins.attacked("eval") as nets, torch.enable_grad():
        narrowed = plugin.attack_threat(nets["student"], x, Linf(eps))
    assert isinstance(narrowed, PixelLinf)
    return narrowed


def by_hand(net: TinyNet, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """One image's standardised map (H, W, colours) as the authors compute it, and the Grad-CAM that it is made of."""
    net = copy.deepcopy(net).eval().double()
    features = net.layer2(net.layer1(image[None].double())).detach()
    leaf = features.clone().requires_grad_()
    pooled = leaf.mean((2, 3)).square()
    logits = net.fc(pooled)[0]
    logits[int(logits.argmax())].backward()
    assert leaf.grad is not None
    weights = leaf.grad[0].mean((1, 2)).numpy()
    cam = np.maximum(sum(w * a for w, a in zip(weights, features[0].numpy(), strict=True)), 0)
    scaled = (cam - cam.min()) / (cam.max() - cam.min())
    size = image.shape[-1], image.shape[-2]
    large = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(size, resample=Image.Resampling.BICUBIC)) ** 2
    colours = mpl.colormaps["jet"].resampled(1 << 16)(large)[..., :3] if len(image) == 3 else large[..., None]
    return (colours - colours.mean()) / colours.std(), cam


@pytest.mark.parametrize("channels", [1, 3])
def test_the_box_is_the_authors_image_by_image(channels: int):
    x, _ = images(channels=channels)
    objective = bound(channels=channels)
    radii = box(objective, x).radii
    assert radii.shape == x.shape
    shares = []
    for image, given in zip(x, radii, strict=True):
        assert isinstance(objective.student, TinyNet)
        standardised, cam = by_hand(objective.student, image)
        assert cam.max() > cam.min()
        expected = torch.from_numpy(np.where(standardised > 1, EPS, LOW)).permute(2, 0, 1).expand_as(given)
        sure = torch.from_numpy(abs(standardised - 1) > 1e-3).permute(2, 0, 1).expand_as(given)
        assert sure.double().mean() > 0.95
        torch.testing.assert_close(given[sure], expected[sure].float())
        shares.append((given > LOW + 1e-6).double().mean().item())
    assert 0.01 < min(shares) <= max(shares) < 0.5


def test_jet_is_matplotlibs():
    values = torch.linspace(-0.1, 1.1, 2001).view(1, 1, 1, -1)
    expected = mpl.colormaps["jet"].resampled(1 << 16)(values.clamp(0, 1).flatten().numpy())[:, :3]
    np.testing.assert_allclose(jet(values)[0, :, 0].T, expected, atol=1e-4)


def test_a_flat_map_marks_blue_alone_as_the_authors_code_does():
    """It is scaled to 0, which `jet` shows in dark blue: (0, 0, .5), whose blue lies 1.41 deviations above the mean."""
    maps = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.rand(4, 4)])
    colours = np.asarray(mpl.colormaps["jet"](0.0)[:3])
    above = (colours - colours.mean()) / colours.std() > 1
    marked = important(maps, torch.Size((3, 3, 16, 16)))
    for image in marked[:2]:
        assert image.flatten(1).all(1).tolist() == image.flatten(1).any(1).tolist() == above.tolist()
    assert important(maps, torch.Size((3, 1, 16, 16))).flatten(1).any(1).tolist() == [False, False, True]


def test_an_images_box_depends_on_that_image_alone():
    x, _ = images()
    objective = bound()
    whole = box(objective, x).radii
    for rows in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        assert torch.equal(box(objective, x[rows]).radii, whole[rows])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("base", JOINED)
@pytest.mark.parametrize(
    "start", ["uniform", *(pytest.param(s, marks=pytest.mark.slow) for s in ("gaussian", "clean"))]
)
def test_examples_stay_in_the_box_and_use_it(base: str, start):
    x, y = images()
    objective = bound(f"{base}+part(low=0.5)")
    radii = box(objective, x).radii
    assert sorted(set(radii.flatten().tolist())) == pytest.approx([EPS / 2, EPS])
    if start == "clean" and base in ("trades", "hat", "dkl", "ikl", "score", "mixaware"):
        with pytest.raises(UserError, match="flat at the clean images"):
            objective.perturb(x, y, Linf(EPS), start=start)
        return
    x_adv = objective.perturb(x, y, Linf(EPS), start=start)
    moved = (x_adv - x).abs()
    assert (moved <= radii + 1e-6).all()
    assert (Linf(EPS).distance(x_adv, x) <= EPS + 1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert moved[radii > 0.9 * EPS].max() > EPS - 1e-6  # all of it
    assert moved[radii < 0.9 * EPS].max() > EPS / 2 - 1e-6


def test_low_of_1_is_the_base():
    x, y = images()
    made = []
    for method in ("trades", "trades+part(low=1)"):
        objective = bound(method)
        torch.manual_seed(0)
        made.append(objective.perturb(x, y, Linf(EPS)))
    assert torch.equal(*made)


@pytest.mark.parametrize("base", JOINED)
def test_it_adds_no_term(base: str):
    x, y = images()
    x_adv = (x + 0.02).clamp(0, 1)
    losses = [total(bound(method)(x, x_adv, y)) for method in (base, f"{base}+part")]
    assert torch.equal(*losses)


def test_nothing_is_left_behind():
    x, y = images()
    objective = bound()
    before, modes = copy.deepcopy(objective.state_dict()), [m.training for m in objective.modules()]
    flags, kept = [p.requires_grad for p in objective.parameters()], x.clone()
    objective.perturb(x, y, Linf(EPS))
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    assert [m.training for m in objective.modules()] == modes
    assert [p.requires_grad for p in objective.parameters()] == flags
    assert all(p.grad is None for p in objective.parameters())
    assert torch.equal(x, kept)
    assert not x.requires_grad


def test_the_warm_up_has_the_whole_radius_and_is_in_the_state():
    x, _ = images()
    objective = bound("at+part(warmup=0.25)")
    narrow = box(objective, x).radii

    def whole(of: Objective) -> bool:
        return of.method.plugins[0].attack_threat(of._twins.student, x, Linf(EPS)) == Linf(EPS)

    for progress, expected in ((0.0, True), (0.24, True), (0.25, False), (0.9, False)):
        objective.start_epoch([], progress)
        assert whole(objective) == expected
    assert torch.equal(box(objective, x).radii, narrow)
    objective.start_epoch([], 0.0)
    resumed = bound("at+part(warmup=0.25)")
    assert not whole(resumed)
    resumed.load_state_dict(objective.state_dict())
    assert whole(resumed)


def test_a_warm_up_of_0_narrows_from_the_first_epoch_on():
    x, _ = images()
    objective = bound("at+part(warmup=0)")
    objective.start_epoch([], 0.0)
    assert (box(objective, x).radii < 0.9 * EPS + LOW * 0.1).any()


def test_bf16_and_float64():
    """Under autocast the features that come out are rounded copies: the map must not be made of them."""
    x, y = images()
    objective = bound()
    exact = box(objective, x).radii
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(box(objective, x).radii, exact)
        moved = objective.perturb(x, y, Linf(EPS)) - x
        assert moved.abs().max() > LOW + 1e-6
    objective.double()
    double = box(objective, x.double()).radii
    assert double.dtype == torch.double
    assert double.max() == EPS  # and not what float32 rounds it to
    assert (double - exact).abs().gt(1e-6).double().mean() < 0.02


def test_an_attack_in_train_mode_has_its_map_in_train_mode():
    x, y = images()
    objective = bound()
    assert ((objective.perturb(x, y, Linf(EPS), mode="train") - x).abs() > LOW + 1e-6).any()
    norm = objective.get_submodule("nets.student.net.layer1.1")
    assert norm.num_batches_tracked == 11


@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_another_layer(layer: str):
    x, _ = images()
    marked = {name: box(bound(f"at+part(layer={name})"), x).radii for name in ("layer1", "layer2")}
    assert not torch.equal(*marked.values())
    assert torch.equal(marked["layer2"], box(bound(), x).radii)


@pytest.mark.parametrize("model", ["small-cnn(width=4)", "resnet18(width=4)", "preact-resnet18(width=4)"])
def test_built_in_networks(model: str):
    x, y = images(2, side=32)
    torch.manual_seed(0)  # some networks give a map of two images that marks nothing
    objective = begun(compose(parse("at+part"), student=build(model, classes=4)).train())
    x_adv = objective.perturb(x, y, Linf(EPS), steps=1, start="clean", step_size=EPS)
    assert ((x_adv - x).abs() > LOW + 1e-6).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import of the compiler
def test_a_compiled_network_gives_the_same_box():
    x, y = images(2)
    objective = bound()
    plain = box(objective, x).radii
    objective.compile()
    assert torch.equal(box(objective, x).radii, plain)
    objective.perturb(x, y, Linf(EPS))


def test_spelling():
    assert str(parse("at+part")) == "at+part"
    assert str(parse("at+part(low=7/8, warmup=0.25)")) == "at+part"
    assert str(parse("mart+part(low=0.5, layer=layer3)")) == 'mart+part(low=0.5, layer="layer3")'
    assert parse("at+part(low=6/8)").plugins[0].low == 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 7.0}, r"part: low=7 must be in \[0, 1\], a share of the threat's eps"),
        ({"low": -0.1}, r"part: low=-0.1"),
        ({"warmup": 1.0}, r"part: warmup=1 must be in \[0, 1\), a share of the epochs"),
        ({"warmup": 20.0}, r"part: warmup=20"),
    ],
)
def test_values_out_of_range(arguments: dict[str, float], words: str):
    with pytest.raises(UserError, match=words):
        PART(**arguments)  # pyright: ignore[reportArgumentType]


def test_what_makes_no_sense_is_refused():
    x, y = images()
    with pytest.raises(UserError, match=r"part is defined for linf, not for L2\(0.5\)"):
        bound().perturb(x, y, L2(0.5))
    with pytest.raises(UserError, match="did you mean 'layer2'"):
        bound("at+part(layer=layre2)")
    for layer in ("logits", "penultimate"):
        with pytest.raises(UserError, match=rf"part: layer '{layer}' gives \(\d,\), but a map needs \(C, H, W\)"):
            bound(f"at+part(layer={layer})").perturb(x, y, Linf(EPS))
    with pytest.raises(UserError, match=r"gives \(8, 1, 1\), but a map needs .* more than one pixel"):
        bound().perturb(x[:, :, :2, :2], y, Linf(EPS))
    with pytest.raises(UserError, match="'natural' makes none"):
        parse("natural+part")
