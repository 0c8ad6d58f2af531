"""AR-AT: whose norms run, where gradient stops, what is exported; the formula again in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import ce
from tests.objectives.short_training import begun
from tests.samples import batch
from torch import nn

from advalign import models
from advalign.errors import UserError
from advalign.models.fold import Folded
from advalign.models.split_norm import SplitNorm, merged, split_norms, using_norms
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.plugins.ar_at import ARAT
from advalign.threats import L2, Linf


def bound(method: str = "at+ar-at") -> Objective:
    guests = {"vanilla": tiny(7)}
    return begun(Objective(parse(method), tiny(0), guests).train())


def norms(net: nn.Module) -> list[SplitNorm]:
    return [module for module in net.modules() if isinstance(module, SplitNorm)]


def statistics(net: nn.Module, view: str) -> list[torch.Tensor]:
    return [b.clone() for norm in norms(net) for b in getattr(norm, view).buffers()]


def test_each_view_moves_its_own_statistics_only(x_y):
    x, _ = x_y
    objective = bound()
    clean, adv = (statistics(objective.student, view) for view in ("clean", "adv"))
    with using_norms(objective.student, "clean"):
        objective.student(x)
    assert all(map(torch.equal, statistics(objective.student, "adv"), adv))
    assert not any(map(torch.equal, statistics(objective.student, "clean"), clean))
    clean = statistics(objective.student, "clean")
    objective.student(x)  # where nobody says, the adversarial norms run
    assert all(map(torch.equal, statistics(objective.student, "clean"), clean))
    assert not any(map(torch.equal, statistics(objective.student, "adv"), adv))


def test_the_loss_is_the_papers():
    """Two plain networks, one with each set of norms, give in numpy what the split network gives."""
    x, y = batch()
    x, x_adv = x.double(), (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).double()
    objective = bound("at+ar-at(weight=7)").double()
    with torch.no_grad():
        for norm in norms(objective.student):
            norm.adv.weight.uniform_(0.5, 1.5)  # else both views have one affine map
    plugin = objective.method.plugins[0]
    assert isinstance(plugin, ARAT)
    objective.start_epoch([(x, y)], 0.0)
    nets = {view: merged(objective.student, view) for view in ("clean", "adv")}
    a = (nets["clean"].eval()(x).argmax(1) == y).double().mean().item()
    z, z_adv = nets["clean"].train()(x).detach().numpy(), nets["adv"].train()(x_adv).detach().numpy()

    def pooled(net, images):
        return torch.relu(net.layer2[:2](net.layer1(images))).mean((2, 3))

    predictor = copy.deepcopy(plugin.predictors[0]).train()
    h, target = predictor(pooled(nets["adv"], x_adv)).detach().numpy(), pooled(nets["clean"], x).detach().numpy()
    labels = y.tolist()
    cosine = [h[i] @ target[i] / np.linalg.norm(h[i]) / np.linalg.norm(target[i]) for i in range(len(labels))]
    expected = (
        a * np.mean([ce(z_adv[i], k) for i, k in enumerate(labels)])
        + (1 - a) * np.mean([ce(z[i], k) for i, k in enumerate(labels)])
        + 7 * (1 - np.mean(cosine))
    )
    assert total(objective(x, x_adv, y)).item() == pytest.approx(expected, rel=1e-6)


def test_a_is_measured_by_the_clean_path_on_the_first_eight_batches_and_leaves_no_trace(x_y):
    x, y = x_y
    objective = bound()
    plugin = objective.method.plugins[0]
    assert plugin.share == 0.5
    before = copy.deepcopy(objective.state_dict())
    right = (merged(objective.student, "clean").eval()(x).argmax(1) == y).float().mean()
    wrong_later = [(x, y)] * 8 + [(x, (y + 1) % 4)] * 8
    objective.start_epoch(wrong_later, 0.0)
    torch.testing.assert_close(plugin.share, right)
    changed = {key for key, value in objective.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= {"parts.1.share"}
    assert objective.student.training


def test_gradient_stops_at_the_clean_features(x_y):
    x, y = x_y
    objective = bound()
    invariance = objective(x, (x + 0.02).clamp(0, 1), y)["ar-at_invariance"].value
    invariance.backward()
    for norm in norms(objective.student):
        assert norm.clean.weight.grad is None
        assert norm.adv.weight.grad is not None
    symmetric = bound("at+ar-at(symmetric=true)")
    symmetric(x, (x + 0.02).clamp(0, 1), y)["ar-at_invariance"].value.backward()
    assert all(norm.clean.weight.grad is not None for norm in norms(symmetric.student))


@pytest.mark.parametrize("base", ["at", "alp", "trades", "mart", "hat"])
def test_what_is_learnt_gets_gradient_on_every_base(base: str, x_y):
    x, y = x_y
    objective = bound(f"{base}+ar-at")
    objective.start_epoch([(x, y)], 0.0)
    total(objective(x, objective.perturb(x, y, Linf()), y)).backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["small-cnn", "resnet18", "preact-resnet18", "vgg16"])
def test_the_export_is_the_plain_network_and_gives_the_same_to_the_bit(name: str):
    x = torch.rand(4, 3, 32, 32)
    plain = models.build(f"{name}(width=4)", classes=10)
    objective = begun(compose(parse("at+ar-at"), student=copy.deepcopy(plain)).train())
    objective(x, x.flip(3), torch.arange(4))  # moves the statistics apart
    export = objective.exported_student()
    assert list(export.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(export.state_dict())
    assert torch.equal(plain.eval()(x), objective.eval().student(x))
    assert norms(objective.student)


def test_the_folded_attack_runs_through_the_adversarial_norms():
    x, _ = batch()
    net = split_norms(tiny(0)).eval()
    for norm in norms(net):
        assert norm.adv.running_mean is not None
        norm.adv.running_mean.add_(0.3)
    twin = Folded(net)
    assert twin.pairs
    torch.testing.assert_close(twin(x), merged(net, "adv")(x), atol=1e-5, rtol=1e-5)


def test_layers_are_the_papers_four_for_resnet18_and_eleven_for_wrn_34_10():
    def taps(model: str) -> tuple[str, ...]:
        objective = begun(compose(parse("at+ar-at"), student=models.build(model, classes=10)))
        return objective.method.plugins[0].layers(objective.student)

    assert taps("resnet18(width=4)") == ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")
    wide = taps("wide-resnet-34-10(width=4)")
    assert len(wide) == 11
    assert wide[-1] == "bn"
    assert all(name.startswith("layer3.") for name in wide[:-1])


def test_noisy_clean_is_the_authors_code(x_y):
    """The clean pass sees noise, the ball lies around the noisy image, and without the flag neither is so."""
    x, y = x_y
    objective = bound("at+ar-at(noisy_clean=true)")
    seen = []
    objective.student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x_adv = objective.perturb(x, y, Linf(0.1))
    seen.clear()
    objective(x, x_adv, y)
    noisy = next(images for images in seen if not torch.equal(images, x_adv))
    assert 0.05 < (noisy - x).abs().max() <= 0.1 + 1e-6
    assert (x_adv - noisy).abs().max() <= 0.1 + 1e-6 or x_adv.min() == 0 or x_adv.max() == 1
    assert (x_adv - x).abs().max() > 0.1
    with pytest.raises(UserError, match="linf"):
        objective.perturb(x, y, L2(0.5))


def test_refusals():
    with pytest.raises(UserError, match="no BatchNorm"):
        compose(parse('at+ar-at(layer="1")'), student=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(UserError, match="must be a BatchNorm"):
        compose(parse("at+ar-at(layer=layer2)"), student=tiny(0))
    with pytest.raises(UserError, match=r"'ar-at' and|ar-at and"):
        parse("at+ar-at+bgat")


def test_a_network_is_split_once():
    student = tiny(0)
    compose(parse("at+ar-at"), student=student)
    with pytest.raises(UserError, match="split by view already"):
        compose(parse("at+ar-at"), student=student)
