"""Bases that learn from teachers, and the decoupled KL: their formulas in numpy, image by image, and their state."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import Case, ce, kl, softmax
from tests.objectives.short_training import begun, bound
from tests.samples import batch
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.models import Output, Tapped
from advalign.models.split_norm import SplitNorm, split_norms
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.bases.dkl import DKL
from advalign.objectives.bases.ikl import IKL
from advalign.objectives.bases.mtard import MTARD
from advalign.objectives.bases.trades import TRADES
from advalign.objectives.contract import ADV, CLEAN
from advalign.objectives.distances import pairwise_gap
from advalign.threats import Linf
from advalign.training.weight_perturbation import adversarial_weights


class Lesson(Case):
    """A case with what the teachers say of its images, and its objective, to step through a training."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.z_adv = self.logits(self.x), self.logits(self.x_adv)
        self.robust_clean, self.robust_adv = self.teacher(self.robust, self.x), self.teacher(self.robust, self.x_adv)
        self.vanilla_clean = self.teacher(self.vanilla, self.x)
        self.vanilla_adv = self.teacher(self.vanilla, self.x_adv)

    def teacher(self, net: nn.Module, x: Tensor) -> np.ndarray:
        return net(x).detach().numpy()

    def objective(self, method: str) -> Objective:
        guests = {name: copy.deepcopy(getattr(self, name)) for name in ("vanilla", "robust")}
        return begun(compose(parse(method), student=copy.deepcopy(self.student), **guests).double().train())

    def of(self, objective: Objective) -> float:
        return total(objective(self.x, self.x_adv, self.y)).item()

    def over(self, per_image) -> float:
        return float(np.mean([per_image(i, y) for i, y in enumerate(self.labels)]))


def test_ard_has_a_temperature_and_by_default_no_hard_labels():
    case = Lesson()

    def soft(i: int, t: float) -> float:
        return t**2 * kl(case.robust_clean[i] / t, case.z_adv[i] / t)

    assert case.loss("ard") == pytest.approx(case.over(lambda i, y: soft(i, 30)), rel=1e-9)
    mixed = case.over(lambda i, y: 0.7 * soft(i, 4) + 0.3 * ce(case.z[i], y))
    assert case.loss("ard(alpha=0.7, temperature=4)") == pytest.approx(mixed, rel=1e-9)


def test_rslad_compares_both_views_with_the_teacher_on_clean_images():
    case = Lesson()

    def expected(weight: float) -> float:
        adv, clean = ([kl(t, s) for t, s in zip(case.robust_clean, z, strict=True)] for z in (case.z_adv, case.z))
        return float(weight * np.mean(adv) + (1 - weight) * np.mean(clean))

    assert case.loss("rslad") == pytest.approx(expected(5 / 6), rel=1e-9)
    assert case.loss("rslad(weight=0.5)") == pytest.approx(expected(0.5), rel=1e-9)


def test_adaad_asks_the_teacher_about_each_view():
    case = Lesson()
    adv = case.over(lambda i, y: kl(case.robust_adv[i], case.z_adv[i]))
    clean = case.over(lambda i, y: kl(case.robust_clean[i], case.z[i]))
    assert case.loss("adaad") == pytest.approx(adv, rel=1e-9)
    assert case.loss("adaad(alpha=0.8)") == pytest.approx(0.8 * adv + 0.2 * clean, rel=1e-9)


def test_iad_begins_as_ard_and_then_trusts_itself_where_the_teacher_is_wrong():
    case = Lesson()
    before, after = case.objective("iad"), case.objective("iad")
    before.start_epoch([], 59 / 200)
    after.start_epoch([], 60 / 200)
    ard = case.over(lambda i, y: kl(case.robust_clean[i], case.z_adv[i]))

    def own(i: int, y: int) -> float:
        return (1 - softmax(case.robust_adv[i])[y] ** 0.1) * kl(case.z[i], case.z_adv[i])

    assert case.loss("iad") == pytest.approx(ard, rel=1e-9)
    assert case.loss("ard(temperature=1)") == pytest.approx(ard, rel=1e-9)
    assert case.of(before) == pytest.approx(ard, rel=1e-9)
    assert case.of(after) == pytest.approx(ard + case.over(own), rel=1e-9)


def test_iad2_shares_half_of_the_loss_between_the_teacher_and_itself():
    case = Lesson()
    before, after = case.objective("iad2(power=0.5)"), case.objective("iad2(power=0.5)")
    before.start_epoch([], 39 / 200)
    after.start_epoch([], 40 / 200)

    def loss(i: int, y: int, introspects: bool) -> float:
        trust = softmax(case.robust_adv[i])[y] ** 0.5 if introspects else 1
        towards = trust * kl(case.robust_adv[i], case.z_adv[i]) + (1 - trust) * kl(case.z[i], case.z_adv[i])
        return 0.25 * ce(case.z_adv[i], y) + 0.5 * towards + 0.25 * kl(case.vanilla_adv[i], case.z_adv[i])

    assert case.of(before) == pytest.approx(case.over(lambda i, y: loss(i, y, False)), rel=1e-9)
    assert case.of(after) == pytest.approx(case.over(lambda i, y: loss(i, y, True)), rel=1e-9)


def test_adaiad_has_a_temperature_and_asks_the_teacher_about_adversarial_images_alone():
    case = Lesson()
    before, after = case.objective("adaiad"), case.objective("adaiad(begin=0.2, power=0.5, temperature=4)")
    before.start_epoch([], 59 / 200)
    after.start_epoch([], 0.2)

    def soft(i: int, t: float) -> float:
        return t**2 * kl(case.robust_adv[i] / t, case.z_adv[i] / t)

    def own(i: int, y: int) -> float:
        return (1 - softmax(case.robust_adv[i])[y] ** 0.5) * kl(case.z[i], case.z_adv[i])

    assert case.of(before) == pytest.approx(case.over(lambda i, y: soft(i, 30)), rel=1e-9)
    assert case.of(after) == pytest.approx(case.over(lambda i, y: soft(i, 4) + own(i, y)), rel=1e-9)


@pytest.mark.parametrize("method", ["adaad", "adaiad", "rslad+adaad", "ard+adaad"])
def test_adaads_attack_asks_the_teacher_at_each_step(method: str):
    """Against the authors' loop (adaad_inner_loss), with gradient through both networks."""
    case, eps = Lesson(), 8 / 255
    objective = case.objective(method)
    torch.manual_seed(3)
    x_adv = objective.perturb(case.x, case.y, Linf(eps), steps=4, start="gaussian")
    student, teacher = copy.deepcopy(objective.student).eval(), copy.deepcopy(case.robust).eval()
    torch.manual_seed(3)
    plain = case.x + 0.001 * torch.randn_like(case.x)
    for _ in range(4):
        plain = plain.detach().requires_grad_()
        loss = nn.functional.kl_div(student(plain).log_softmax(1), teacher(plain).softmax(1), reduction="sum")
        (grad,) = torch.autograd.grad(loss, plain)
        plain = torch.min(torch.max(plain.detach() + eps / 4 * grad.sign(), case.x - eps), case.x + eps).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["iad", "iad2", "adaiad"])
def test_introspection_moves_the_clean_prediction_too(method: str):
    case = Lesson()
    objective = case.objective(method)
    objective.start_epoch([], 0.5)
    outs = {
        need: Output(torch.randn(8, 4, dtype=torch.double, requires_grad=True), {}) for need in objective.method.needs
    }
    terms = objective.method.base.terms(outs, case.y)
    (grad,) = torch.autograd.grad(terms["self"].value, outs[CLEAN].logits)
    assert grad.abs().max() > 0


def test_mtard_weighs_the_loss_that_has_come_down_less():
    case = Lesson()
    objective = case.objective("mtard")

    def losses(student: nn.Module) -> tuple[float, float]:
        z, z_adv = (copy.deepcopy(student).train()(x).detach().numpy() for x in (case.x, case.x_adv))
        return (
            case.over(lambda i, y: kl(case.robust_adv[i], z_adv[i])),
            case.over(lambda i, y: kl(case.vanilla_clean[i], z[i])),
        )

    adv, clean = first = losses(objective.student)
    weight = 0.5
    assert case.of(objective) == pytest.approx(0.5 * (adv + clean), rel=1e-9)
    optimizer = torch.optim.SGD(objective.student.parameters(), 0.5)
    # Epoch and rate: the drops come after 215, 260 and 285 of 300 epochs.
    for epoch, rate in ((1, 0.025), (214, 0.025), (215, 0.0025), (259, 0.0025), (260, 0.00025), (299, 0.000025)):
        objective.start_epoch([], epoch / 300)
        adv, clean = losses(objective.student)
        relative = adv / first[0], clean / first[1]
        weight = (1 - rate) * weight + rate * relative[0] / sum(relative)
        terms = objective(case.x, case.x_adv, case.y)
        assert total(terms).item() == pytest.approx(weight * adv + (1 - weight) * clean, rel=1e-7)
        assert float(terms["soft_adv"].weight) == pytest.approx(weight, rel=1e-7)
        total(terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(weight - 0.5) > 1e-4


def temperatures(objective: Objective) -> list[float]:
    assert isinstance(objective.method.base, MTARD)
    return objective.method.base.temperatures.tolist()


def test_balanced_mtard_softens_the_teacher_that_is_surer():
    """Stepped beside the authors' code (MTARD-extension), 60 momentum steps: losses and temperatures agree to 1e-15."""
    case = Lesson()
    with torch.no_grad():
        case.vanilla.fc.weight.mul_(20)
    robust, vanilla = case.teacher(case.robust, case.x_adv), case.teacher(case.vanilla, case.x)
    objective = case.objective("mtard(balanced=true, rate=0)")

    def far(t: np.ndarray, z: np.ndarray) -> float:
        return sum(t[k] * (np.log(t[k] + 1e-5) - np.log(softmax(z)[k])) for k in range(4))

    def entropy(logits: np.ndarray, t: float) -> float:
        return -float(np.mean([sum(p * np.log(p + 1e-5) for p in softmax(row / t)) for row in logits]))

    hot = [1.0, 1.0]
    for epoch, rate in ((0, 0.001), (0, 0.001), (215, 0.0001), (299, 0.000001)):
        objective.start_epoch([], epoch / 300)
        adv = case.over(lambda i, y: far(softmax(robust[i] / hot[0]), case.z_adv[i]))
        clean = case.over(lambda i, y: far(softmax(vanilla[i] / hot[1]), case.z[i]))
        assert case.of(objective) == pytest.approx(0.5 * (adv + clean), rel=1e-9)
        ahead = np.sign(entropy(robust, hot[0]) - entropy(vanilla, hot[1]))
        hot = [min(max(t - rate * sign, 1.0), 10.0) for t, sign in zip(hot, (ahead, -ahead), strict=True)]
        assert temperatures(objective) == pytest.approx(hot, rel=1e-12)
    assert hot == [1.0, pytest.approx(1.002101)]
    before = case.of(objective.eval())
    assert case.of(objective) == before
    assert temperatures(objective) == pytest.approx(hot, rel=1e-12)


def test_equal_entropies_keep_the_temperatures():
    x, y = batch()
    objective = Objective(parse("mtard(balanced=true)"), tiny(0), {"robust": tiny(8), "vanilla": tiny(8)}).train()
    objective.start_epoch([], 0.0)
    objective(x, x, y)
    assert temperatures(objective) == [1.0, 1.0]


def test_mtard_follows_in_training_only_and_once_a_step():
    case = Lesson()
    objective = case.objective("mtard(rate=0.5)")
    case.of(objective)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.mul_(1.5)
    before = copy.deepcopy(objective.method.base.state_dict())
    case.of(objective.eval())
    assert all(torch.equal(value, before[key]) for key, value in objective.method.base.state_dict().items())
    weights = copy.deepcopy(objective).train()(case.x, case.x_adv, case.y)["soft_adv"].weight
    objective.train()
    with adversarial_weights(objective, 1e-9, lambda: objective(case.x, case.x_adv, case.y)):  # AWP passes twice a step
        terms = objective(case.x, case.x_adv, case.y)
        total(terms).backward()
    assert float(terms["soft_adv"].weight) == pytest.approx(float(weights), rel=1e-6)
    assert float(weights) != pytest.approx(0.5, abs=1e-4)


def pairs(z: np.ndarray, z_adv: np.ndarray, q: np.ndarray) -> float:
    """The weighted squares over all pairs of classes, by the double loop."""
    ks = range(len(z))
    return 0.25 * sum(q[j] * q[k] * ((z[j] - z[k]) - (z_adv[j] - z_adv[k])) ** 2 for j in ks for k in ks)


def soft(z: np.ndarray, z_adv: np.ndarray) -> float:
    return -sum(softmax(z) * np.log(softmax(z_adv)))


def test_pairwise_gap_is_the_double_loop():
    generator = np.random.default_rng(0)
    z, z_adv, q = (generator.normal(0, 3, (6, 5)) for _ in range(3))
    q = np.stack([softmax(row) for row in q])
    expected = [pairs(*rows) for rows in zip(z, z_adv, q, strict=True)]
    given = pairwise_gap(*(torch.from_numpy(each) for each in (z, z_adv, q)))
    assert given.tolist() == pytest.approx(expected, rel=1e-10)


def test_dkl_weighs_pairs_by_the_images_own_prediction():
    case = Lesson()
    expected = case.mean(lambda z, q, y: ce(z, y) + 6 * soft(z, q) + 6 * pairs(z, q, softmax(z)))
    assert case.loss("dkl") == pytest.approx(expected, rel=1e-9)
    other = case.mean(lambda z, q, y: ce(z, y) + 2 * soft(z, q) + 3 * pairs(z, q, softmax(z)))
    assert case.loss("dkl(alpha=2, beta=3)") == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_dkl_has_the_gradient_of_trades(beta: float):
    torch.manual_seed(0)
    clean, adv = (3 * torch.randn(16, 10, dtype=torch.double) for _ in range(2))
    outs = {CLEAN: Output(clean.requires_grad_(), {}), ADV: Output(adv.requires_grad_(), {})}
    y = torch.randint(10, (16,))
    decoupled, trades = (
        torch.autograd.grad(total(base.terms(outs, y)), (clean, adv)) for base in (DKL(beta, beta), TRADES(beta))
    )
    torch.testing.assert_close(decoupled, trades, rtol=0, atol=1e-10)


def test_each_term_of_dkl_moves_one_side_and_the_pairs_of_ikl_both():
    torch.manual_seed(0)
    outs = {need: Output(torch.randn(4, 3, requires_grad=True), {}) for need in (CLEAN, ADV)}
    sides = outs[CLEAN].logits, outs[ADV].logits

    def moved(base: DKL | IKL, term: str) -> list[bool]:
        value = base.terms(outs, torch.tensor([0, 1, 2, 0]))[term].value
        return [grad is not None for grad in torch.autograd.grad(value, sides, allow_unused=True)]

    assert moved(DKL(), "soft") == [False, True]
    assert moved(DKL(), "pairs") == [True, False]
    assert moved(IKL(), "soft") == [False, True]
    assert moved(IKL(), "pairs") == [True, True]


def test_ikl_weighs_pairs_by_the_mean_prediction_of_the_class_once_an_epoch_has_begun():
    case = Lesson()
    objective = case.objective("ikl")
    uniform = np.full(4, 0.25)
    at_first = case.mean(lambda z, q, y: ce(z, y) + 3 * soft(z, q) + 20 * pairs(z, q, uniform))
    assert case.of(objective) == pytest.approx(at_first, rel=1e-9)
    assert case.loss("ikl") == pytest.approx(at_first, rel=1e-9)

    objective = case.objective("ikl")  # the pass above has moved the running statistics
    kept = case.y != 1
    x, y = case.x[kept], case.y[kept]
    split = [(x[:3], y[:3]), (x[3:], y[3:])]
    before = copy.deepcopy(objective.student.state_dict())
    objective.start_epoch(split, 0.0)
    assert all(torch.equal(value, before[key]) for key, value in objective.student.state_dict().items())
    assert objective.training
    z = copy.deepcopy(case.student).eval()(x).detach().numpy()
    rows = {k: [softmax(z[i] / 4) for i, label in enumerate(y.tolist()) if label == k] for k in range(4)}
    means = {k: np.mean(of_class, 0) if of_class else uniform for k, of_class in rows.items()}
    assert not rows[1]
    expected = case.mean(lambda z, q, y: ce(z, y) + 3 * soft(z, q) + 20 * pairs(z, q, means[y]))
    assert case.of(objective) == pytest.approx(expected, rel=1e-9)
    assert abs(expected - at_first) > 1e-4


@pytest.mark.parametrize("begun_epoch", [False, True])
def test_ikls_attack_climbs_both_parts_of_the_divergence_with_weight_one(begun_epoch: bool):
    """The authors' loop in float64, the pairs written out: 1/4 sum_jk q_j q_k ((o_j - o_k) - (o'_j - o'_k))^2."""
    case, eps = Lesson(), 8 / 255
    objective = case.objective("ikl(alpha=3, beta=20)")
    if begun_epoch:
        objective.start_epoch([(case.x, case.y)], 0.0)
    torch.manual_seed(3)
    x_adv = objective.perturb(case.x, case.y, Linf(eps), steps=4)
    student = copy.deepcopy(case.student).eval()
    clean = student(case.x).detach()
    q = torch.full_like(clean, 0.25)
    if begun_epoch:
        p = (clean / 4).softmax(1)
        q = torch.stack([p[case.y == label].mean(0) for label in case.y])
    torch.manual_seed(3)
    plain = case.x + 0.001 * torch.randn_like(case.x)
    for _ in range(4):
        plain.requires_grad_()
        adv = student(plain)
        gap = (clean[:, :, None] - clean[:, None, :]) - (adv[:, :, None] - adv[:, None, :])
        squares = 0.25 * (q[:, :, None] * q[:, None, :] * gap.square()).sum((1, 2)).mean()
        entropy = -(clean.softmax(1) * adv.log_softmax(1)).sum(1).mean()
        (grad,) = torch.autograd.grad(1.0 * entropy + 1.0 * squares, plain)
        plain = (plain.detach() + eps / 4 * grad.sign()).clamp(case.x - eps, case.x + eps).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, rtol=0, atol=1e-12)
    torch.manual_seed(3)
    kl = case.objective("ikl(attack=kl)").perturb(case.x, case.y, Linf(eps), steps=4)
    torch.manual_seed(3)
    assert torch.equal(kl, case.objective("trades").perturb(case.x, case.y, Linf(eps), steps=4))
    assert not torch.equal(kl, x_adv)


def test_ikl_averages_under_the_clean_norms():
    student = split_norms(tiny(0))
    for norm in (module for module in student.modules() if isinstance(module, SplitNorm)):
        nn.init.constant_(norm.adv.weight, 0)
    part = IKL()
    part.start_epoch(Tapped(student.eval(), ()), [batch()], 0.0)
    plain = IKL()
    plain.start_epoch(Tapped(tiny(0).eval(), ()), [batch()], 0.0)
    assert torch.equal(part.means, plain.means)


@pytest.mark.parametrize("method", ["iad", "iad2", "mtard", "ikl"])
def test_a_resumed_run_goes_on_with_what_was_learnt(method: str):
    """As the run's state does it: saved without the frozen guests, loaded into an objective that has seen nothing."""
    case = Lesson()
    objective = case.objective(method)
    objective.start_epoch([(case.x, case.y)], 0.9)
    case.of(objective)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.mul_(1.1)
    file = io.BytesIO()
    torch.save(objective.learned_state(), file)
    file.seek(0)
    resumed = case.objective(method)
    fresh = case.of(copy.deepcopy(resumed))
    resumed.load_state_dict({**resumed.state_dict(), **torch.load(file, weights_only=True)})
    expected = case.of(objective)
    assert case.of(resumed) == expected
    assert fresh != expected
    ours, theirs = resumed.state_dict(), objective.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("method", ["rslad", "adaad"])
def test_the_attack_climbs_away_from_the_teacher(method: str):
    """The examples against the plain loop of the papers, in float64; AdaAD's follows the teacher too."""
    case = Lesson()
    objective, eps = case.objective(method), 8 / 255
    torch.manual_seed(3)
    x_adv = objective.perturb(case.x, case.y, Linf(eps), steps=5)
    student = copy.deepcopy(case.student).eval()
    torch.manual_seed(3)
    plain = case.x + 0.001 * torch.randn_like(case.x)
    for _ in range(5):
        plain = plain.detach().requires_grad_()
        teacher = case.robust(plain if method == "adaad" else case.x).log_softmax(1)
        loss = (teacher.exp() * (teacher - student(plain).log_softmax(1))).sum()
        (grad,) = torch.autograd.grad(loss, plain)
        plain = plain.detach() + eps / 4 * grad.sign()
        plain = torch.min(torch.max(plain, case.x - eps), case.x + eps).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("ard(alpha=1.5)", "alpha=1.5 must be in [0, 1]"),
        ("ard(temperature=0)", "temperature=0 must be above 0"),
        ("rslad(weight=-1)", "weight=-1 must be in [0, 1]"),
        ("iad(begin=60)", "begin=60 must be in [0, 1], a share of the epochs"),
        ("iad2(power=-1)", "power=-1 must be at least 0"),
        ("adaad(alpha=2)", "alpha=2 must be in [0, 1]"),
        ("mtard(rate=2)", "rate=2 must be in [0, 1]"),
        ("ikl(temperature=0)", "temperature=0 must be above 0"),
        ("dkl(beta=-1)", "beta=-1 must be at least 0"),
        ("rslad+kd", "'kd' takes the place of hard labels, but rslad has none"),
        ("ard+lbgat", "'lbgat' takes the place of hard labels, but ard has none"),
    ],
)
def test_refusals(spelling: str, words: str):
    with pytest.raises(UserError) as caught:
        parse(spelling)
    assert words in str(caught.value)


def test_what_has_labels_or_adds_only_joins():
    for spelling in ("ard(alpha=0.5)+bgat", "iad2+kd", "rslad+vfd", "rslad+bgat(additive=true)", "mtard+vfd"):
        parse(spelling)


def test_a_folded_teacher_follows_its_network_in_a_train_mode_attack_too():
    x, y = batch()
    objective = bound("rslad")
    objective.perturb(x, y, Linf(), mode="train", steps=1)
    objective.double()
    assert objective.perturb(x.double(), y, Linf(), mode="train", steps=1).dtype == torch.float64


@pytest.mark.parametrize("method", ["ard", "iad"])
def test_from_an_unclamped_start_the_attack_is_the_loop_of_ards_code(method: str):
    case, eps, step = Lesson(), 8 / 255, 2 / 255
    x = case.x.round()  # black and white, so that half of the draw leaves [0, 1]
    objective = case.objective(method)
    torch.manual_seed(0)
    x_adv = objective.perturb(x, case.y, Linf(eps), steps=3, step_size=step, start="unclamped", mode="eval")
    net = copy.deepcopy(case.student).eval()
    torch.manual_seed(0)
    plain = x + torch.empty_like(x).uniform_(-eps, eps)
    assert plain.min() < 0
    assert plain.max() > 1
    for _ in range(3):
        plain = plain.detach().requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(net(plain), case.y), plain)
        plain = plain.detach() + step * grad.sign()
        plain = torch.min(torch.max(plain, x - eps), x + eps).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, atol=1e-12, rtol=0)
    torch.manual_seed(0)
    clamped = objective.perturb(x, case.y, Linf(eps), steps=3, step_size=step, mode="eval")
    assert not torch.equal(clamped, x_adv)
