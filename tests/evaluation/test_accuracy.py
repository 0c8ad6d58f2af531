"""Accuracies counted image by image, by a second way of counting; and what evaluation promises its attacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from tests.networks import Around, TinyNet, tiny
from tests.samples import batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from advalign.attacks import FGSM, MIM, PGD, Attack, Worst, parse
from advalign.attacks.classification import fooled_in
from advalign.attacks.pass_counter import PassCounter
from advalign.data import Images
from advalign.errors import UserError
from advalign.evaluation.accuracy import WORST_CASE, Evaluation, evaluate
from advalign.evaluation.diagnose import diagnose
from advalign.evaluation.evaluator import PrecomputedExamples
from advalign.evaluation.state import EvaluationState, state_owner
from advalign.runs.checkpoint import save_state
from advalign.threats import L2, Linf

N = 53  # with batches of 8 or 16 the last one is ragged
BUDGET = Linf(0.02)


def case(n: int = N) -> tuple[TinyNet, Images]:
    """A net with every class near, and images of which about a third have a wrong label."""
    net = tiny(0).eval()
    pixels = (batch(n)[0] * 255).round().byte()
    with torch.no_grad():
        net.fc.bias.sub_(net(pixels / 255).mean(0))
        labels = net(pixels / 255).argmax(1)
    labels[::3] = (labels[::3] + 1) % 4
    return net, Images(pixels, labels)


def one_by_one(net: nn.Module, images: Images, attack: Attack | None = None) -> list[bool]:
    verdicts = []
    for i in range(len(images)):
        x, y = images.pixels[i : i + 1] / 255, images.labels[i : i + 1]
        right = int(net(x).argmax()) == int(y)
        if right and attack is not None:
            right = int(net(attack(net, x, y)).argmax()) == int(y)
        verdicts.append(right)
    return verdicts


@dataclass(frozen=True)
class Stub(Attack):
    """An attack that does as it is told, and counts."""

    name: ClassVar[str] = "stub"
    act: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda model, x, y: x
    label: str = "a"
    seen: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        return self.label

    def run(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.act(model, x, y)


@pytest.mark.parametrize("batch_size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 8, 512)), 16])
def test_accuracy_is_counted_exactly(batch_size: int):
    net, images = case()
    attacks: Sequence[Attack] = [FGSM(BUDGET), PGD(BUDGET, steps=5, start="clean"), MIM(L2(0.2), steps=3)]
    found = evaluate(net, images, attacks, batch_size=batch_size)
    expected = {"clean": one_by_one(net, images)}
    expected |= {str(attack): one_by_one(net, images, attack) for attack in attacks}
    assert {name: flags.tolist() for name, flags in found.correct.items()} == expected
    assert 0 < sum(expected["fgsm"]) < sum(expected["clean"]) < N
    accuracies = found.accuracies()
    for name, verdicts in expected.items():
        assert accuracies[name] == sum(verdicts) / N
    withstood = [all(each) for each in zip(*expected.values(), strict=True)]
    assert found.outcomes[WORST_CASE].tolist() == withstood
    assert accuracies[WORST_CASE] == sum(withstood) / N
    assert len(found) == N
    assert set(found.seconds) == set(expected)


def test_worst_case_is_the_conjunction():
    flags = {"clean": [1, 1, 1, 0], "a": [1, 0, 1, 0], "b": [0, 1, 1, 0]}
    found = Evaluation({name: torch.tensor(each).bool() for name, each in flags.items()}, {})
    assert found.outcomes[WORST_CASE].tolist() == [False, False, True, False]
    assert found.accuracies() == {"clean": 0.75, "a": 0.5, "b": 0.5, WORST_CASE: 0.25}


def test_without_attacks_there_is_no_worst_case():
    net, images = case()
    assert set(evaluate(net, images).accuracies()) == {"clean"}


def test_only_images_that_are_classified_correctly_are_attacked():
    net, images = case()
    stub = Stub(BUDGET, lambda model, x, y: x)
    evaluate(net, images, [stub], batch_size=8)
    right = torch.tensor(one_by_one(net, images))
    assert torch.equal(torch.cat(stub.seen), (images.pixels / 255)[right])
    assert [len(x) for x in stub.seen] == [8] * (int(right.sum()) // 8) + [int(right.sum()) % 8]


def test_a_model_that_gets_everything_wrong_is_not_attacked():
    net, images = case()
    with torch.no_grad():
        wrong = Images(images.pixels, (net(images.floats()).argmax(1) + 1) % 4)
    stub = Stub(BUDGET, lambda model, x, y: x)
    found = evaluate(net, wrong, [stub, PGD(L2(0.5), restarts=2), FGSM(BUDGET)])
    assert set(found.accuracies().values()) == {0.0}
    assert not stub.seen


def test_the_verdict_is_about_the_attacked_image_and_the_unmodified_model():
    net, images = case()
    broken = Stub(BUDGET, lambda model, x, y: (x + 0.02 * torch.randn_like(x).sign()).clamp(0, 1))
    torch.manual_seed(0)
    found = evaluate(net, images, [broken])
    right = torch.tensor(one_by_one(net, images))
    assert torch.equal(found.correct["clean"], right)
    assert not found.correct["a"][~right].any()


class Cheat:
    """What attacks do wrong."""

    @staticmethod
    def too_far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (x + 2 * BUDGET.eps).clamp(0, 1)

    @staticmethod
    def one_pixel_too_far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[-1, 0, 0, 0] += -0.03 if x[-1, 0, 0, 0] > 0.5 else 0.03
        return x

    @staticmethod
    def out_of_the_box(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x > 0.99, x + 0.015, x)

    @staticmethod
    def nan(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x * torch.nan


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        (Cheat.too_far, r"a moved an image by 0\.04, outside Linf\(0\.02\)"),
        (Cheat.one_pixel_too_far, r"a moved an image by 0\.03, outside Linf\(0\.02\)"),
        (Cheat.out_of_the_box, r"images lie in \[0, 1\.0"),
        (Cheat.nan, "images lie in"),
    ],
)
def test_an_attack_that_cheats_is_refused(cheat: Callable[..., Tensor], words: str):
    net, images = case()
    modes = [module.training for module in net.train().modules()]
    with pytest.raises(UserError, match=words):
        evaluate(net, images, [Stub(BUDGET, cheat)], batch_size=8)
    assert [module.training for module in net.modules()] == modes


def test_the_whole_radius_is_no_cheat():
    net, images = case()
    for threat in (BUDGET, L2(0.5)):
        edge = Stub(threat, lambda model, x, y, b=threat: b.ball(x)(x.clone() + 100))
        evaluate(net, images, [edge])


def test_model_and_random_state_are_left_as_they_were():
    net, images = case()
    net.train()
    net.layer1.eval()
    net.fc.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    evaluate(net, images, [PGD(BUDGET, steps=2), MIM(BUDGET, steps=2)], batch_size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_an_attack_does_not_depend_on_its_company_or_on_the_global_seed():
    net, images = case()
    drawn: list[Tensor] = []

    def noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        drawn.append(BUDGET.sample(x))
        return drawn[-1]

    for company in ([], [FGSM(BUDGET), PGD(BUDGET, steps=2)]):
        torch.manual_seed(len(company))
        evaluate(net, images, [*company, Stub(BUDGET, noise)])
    first, second = drawn
    assert torch.equal(first, second)
    evaluate(net, images, [Stub(BUDGET, noise)], seed=1)
    evaluate(net, images, [Stub(BUDGET, noise, label="b")])
    assert not torch.equal(drawn[2], first)
    assert not torch.equal(drawn[3], first)


def test_two_attacks_of_one_spelling_are_refused():
    net, images = case()
    with pytest.raises(UserError, match="fgsm is given twice"):
        evaluate(net, images, [FGSM(Linf()), FGSM(L2())])


def test_it_works_inside_no_grad():
    net, images = case()
    plain = evaluate(net, images, [FGSM(BUDGET)]).accuracies()
    with torch.no_grad():
        assert evaluate(net, images, [FGSM(BUDGET)]).accuracies() == plain
    assert plain["fgsm"] < plain["clean"]


class Watched(TinyNet):
    """Notes the type of its logits; the folded copy of the attacks has notes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if isinstance(logits, Tensor):  # torch.fx traces with symbols
            self.notes.append(logits.dtype)
        return logits


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_attacks_run_in_the_given_precision_and_the_verdict_in_fp32(precision: str, dtype: torch.dtype):
    plain, images = case()
    net = Watched().eval()
    net.load_state_dict(plain.state_dict())
    seen: list[torch.dtype] = []

    def act(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(model(x).dtype)
        return x

    found = evaluate(net, images, [Stub(BUDGET, act), PGD(BUDGET, steps=3)], precision=precision, batch_size=16)
    assert set(seen) == {dtype}
    assert set(net.notes) == {torch.float32}
    assert torch.equal(found.correct["clean"], found.correct["a"])
    assert found.accuracies()["clean"] == sum(one_by_one(plain, images)) / N


def test_mixed_precision_attacks_are_about_as_strong():
    net, images = case(200)
    full, mixed = (
        evaluate(net, images, [PGD(BUDGET, start="clean")], precision=precision).accuracies()[WORST_CASE]
        for precision in ("fp32", "bf16")
    )
    assert mixed == pytest.approx(full, abs=0.02)
    assert full < 0.6


def test_progress_adds_up_to_every_image():
    net, images = case()
    done: dict[str, int] = {}

    def advance(name: str, n: int) -> None:
        done[name] = done.get(name, 0) + n

    evaluate(net, images, [FGSM(BUDGET), PGD(BUDGET, steps=1)], batch_size=8, advance=advance)
    assert done == {"clean": N, "fgsm": N, "pgd(steps=1)": N}


def test_passes_are_counted_by_image():
    """FGSM runs each image forth and back once; PGD at most its steps, and fewer for those it fools early."""
    net, images = case()
    found = evaluate(net, images, [FGSM(BUDGET), PGD(BUDGET, steps=7, until_fooled=False), PGD(BUDGET, steps=9)])
    alive = int(found.correct["clean"].sum())
    assert found.passes["clean"] == (N, 0)
    assert found.passes["fgsm"] == (alive, alive)
    assert found.passes["pgd(steps=7, until_fooled=False)"] == (7 * alive, 7 * alive)
    forward, backward = found.passes["pgd(steps=9)"]
    assert alive < backward < 9 * alive
    assert forward == backward


def worse(fools: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """An attack that moves the images that it is told to move, far enough to fool."""

    def act(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moved = PGD(L2(3.0), steps=20, start="clean")(model, x, y)
        return torch.where(fools(x)[:, None, None, None], moved, x)

    return act


def test_members_of_an_ensemble_attack_what_is_left_in_full_batches(monkeypatch: pytest.MonkeyPatch):
    net, images = case()
    threat = L2(3.0)
    first = Stub(threat, worse(lambda x: x[:, 0, 0, 0] > 0.5), "first")
    second = Stub(threat, worse(lambda x: x[:, 0, 0, 1] > 0.5), "second")
    found = evaluate(net, images, [Worst(threat, (first, second))], batch_size=8)
    clean, name = found.correct["clean"], "worst(first, second)"
    seen = [torch.cat(stub.seen) for stub in (first, second)]
    x = images.floats()
    assert torch.equal(seen[0], x[clean])
    left = clean & ~(PGD(threat, steps=20, start="clean")(net, x, images.labels) != x).flatten(1).any(1) | (
        clean & (x[:, 0, 0, 0] <= 0.5)
    )
    assert torch.equal(seen[1], x[left])
    assert {len(each) for each in second.seen[:-1]} <= {8}
    assert found.trails == {name: {"first": float(left.double().mean()), "second": found.accuracies()[name]}}
    assert found.accuracies()[name] < float(left.double().mean())


def test_unbounded_attacks_take_no_part_in_the_worst_case():
    @dataclass(frozen=True)
    class Unbounded(Stub):
        bounded: ClassVar[bool] = False

    net, images = case()
    far = Unbounded(BUDGET, lambda model, x, y: 1 - x)
    found = evaluate(net, images, [FGSM(BUDGET), far])
    assert torch.equal(found.outcomes[WORST_CASE], found.correct["clean"] & found.correct["fgsm"])
    assert found.unbounded == {"a"}
    assert set(evaluate(net, images, [far]).accuracies()) == {"clean", "a"}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("advalign.evaluation.state.SAVE_SECONDS", 0.0)
    net, images = case()
    attacks: Sequence[Attack] = [FGSM(BUDGET), PGD(BUDGET, steps=3), MIM(BUDGET, steps=2)]
    whole = evaluate(net, images, attacks, batch_size=8, keep_examples=keep)
    state, calls = tmp_path / "state", 0

    def impatient(name: str, n: int) -> None:
        nonlocal threat
        threat -= 1
        if threat < 0:
            raise Interrupted

    while True:
        threat, calls = 3 + calls, calls + 1
        try:
            found = evaluate(net, images, attacks, batch_size=8, keep_examples=keep, state=state, advance=impatient)
            break
        except Interrupted:
            assert calls < 30
    assert calls > 3
    assert found.passes == whole.passes
    for name, flags in whole.correct.items():
        assert torch.equal(found.correct[name], flags), name
    assert (
        found.examples.keys() == whole.examples.keys() == ({"fgsm", "pgd(steps=3)", "mim(steps=2)"} if keep else set())
    )
    for name, examples in whole.examples.items():
        assert torch.equal(found.examples[name], examples)


def test_examples_are_what_fooled_the_model():
    net, images = case()
    found = evaluate(net, images, [PGD(BUDGET)], batch_size=16, keep_examples=True)
    (examples,) = found.examples.values()
    right = net(examples).argmax(1) == images.labels
    assert torch.equal(right, found.correct["pgd(steps=20)"])
    lost = ~found.correct["clean"]
    assert torch.equal(examples[lost], images.floats()[lost])
    assert float(BUDGET.distance(examples, images.floats()).max()) <= BUDGET.eps + 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch.compile itself imports it
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))])
def test_wrapped_models_are_evaluated_by_the_network_inside(wrap: Callable[[nn.Module], nn.Module]):
    net, images = case()
    expected = evaluate(net, images, [PGD(BUDGET)])
    found = evaluate(wrap(net), images, [PGD(BUDGET)])
    assert torch.equal(found.correct["pgd(steps=20)"], expected.correct["pgd(steps=20)"])


def test_a_distributed_model_is_evaluated_by_the_network_inside(tmp_path: Path):
    net, images = case()
    expected = evaluate(net, images, [PGD(BUDGET)])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        found = evaluate(DistributedDataParallel(net), images, [PGD(BUDGET)])
    finally:
        dist.destroy_process_group()
    assert torch.equal(found.correct["pgd(steps=20)"], expected.correct["pgd(steps=20)"])
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_network_that_cannot_be_copied_is_evaluated_as_it_is():
    class Stubborn(TinyNet):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("no copies")

    plain, images = case()
    net = Stubborn().eval()
    net.load_state_dict(plain.state_dict())
    found, expected = (evaluate(each, images, [FGSM(BUDGET)]).correct["fgsm"] for each in (net, plain))
    assert torch.equal(found, expected)


class Tampering(TinyNet):
    """Counts its calls in a buffer, and puts a norm in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.layer2[1].train()
        return super().forward(x)


def test_buffers_that_a_forward_changes_come_back():
    plain, images = case()
    net = Tampering().eval()
    net.load_state_dict(plain.state_dict(), strict=False)
    before = copy.deepcopy(net.state_dict())
    evaluate(net, images, [PGD(BUDGET, steps=2)], batch_size=16)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module.training for module in net.modules())


def test_a_model_that_draws_at_random_is_repeatable_and_leaves_the_generator():
    net, images = case()
    noisy = Around(net, lambda x: x + 0.2 * torch.randn_like(x))
    given = {"a": PrecomputedExamples(images.floats(), BUDGET)}
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(evaluate(noisy, images, [PGD(BUDGET, steps=2), FGSM(BUDGET)], precomputed=given, batch_size=16))
        assert torch.equal(torch.get_rng_state(), state)
    for name, flags in found[0].correct.items():
        assert torch.equal(flags, found[1].correct[name]), name
    assert any("Two forward passes differ" in each for each in found[0].warnings)


def test_the_verdict_is_in_fp32_inside_a_callers_autocast():
    plain, images = case()
    net = Watched().eval()
    net.load_state_dict(plain.state_dict())
    expected = evaluate(plain, images, [FGSM(BUDGET)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(net, images, [FGSM(BUDGET)], precomputed={"a": PrecomputedExamples(images.floats(), BUDGET)})
    assert set(net.notes) == {torch.float32}
    assert torch.equal(found.correct["fgsm"], expected.correct["fgsm"])


def test_an_image_with_outputs_that_are_not_finite_does_not_withstand():
    net, images = case()
    clean = images.floats()
    known = set(clean.flatten(1).sum(1).tolist())
    ill = Around(net, after=lambda z: z)
    ill.register_forward_hook(
        lambda module, args, z: z.masked_fill(
            torch.tensor([value not in known for value in args[0].flatten(1).sum(1).tolist()])[:, None], torch.nan
        )
    )
    found = evaluate(ill, images, [Stub(BUDGET, lambda model, x, y: (x + 0.01).clamp(0, 1))], batch_size=512)
    n = int(found.correct["clean"].sum())
    assert n > 0
    assert found.accuracies()["a"] == 0
    assert f"Outputs were not finite on {n} images of a: they count as broken." in found.warnings


def test_an_honest_model_gets_no_warning():
    net, images = case(200)
    found = evaluate(net, images, [FGSM(BUDGET), PGD(BUDGET), parse("square(queries=20)", threat=BUDGET)])
    assert found.warnings == ()


def test_warnings_name_what_makes_numbers_doubtful():
    net, images = case(200)
    attacks = [FGSM(BUDGET), parse("square(queries=100)", threat=BUDGET)]
    n = int(evaluate(net, images).correct["clean"].sum())

    def said(model: nn.Module, given: Images = images) -> str:
        return " ".join(evaluate(model, given, attacks).warnings)

    assert "Outputs are probabilities" in said(Around(net, after=lambda z: z.softmax(1)).eval())
    cut = said(Around(net, after=lambda z: z.detach()).eval())
    assert f"{n} of {n} images have a zero or non-finite gradient" in cut
    assert "advalign diagnose" in cut
    assert "square(queries=100) broke" in cut
    guessing = Images(images.pixels, images.labels.flip(0))
    assert "better than always answering the largest class" in said(net, guessing)
    training = copy.deepcopy(net)
    training.layer2.train()
    assert "In train mode when handed in: layer2, layer2.0, layer2.1, ..." in said(training)
    assert training.layer2.training


def test_square_inside_an_ensemble_that_breaks_what_gradients_leave_is_a_warning():
    net, images = case(200)
    stepped = Around(net, lambda x: (x * 64).round() / 64).eval()
    found = evaluate(stepped, images, parse("worst(fgsm, square(queries=100))", threat=BUDGET))
    (trail,) = found.trails.values()
    before, after = trail.values()
    left, broken = round(before * 200), round((before - after) * 200)
    assert broken > 20
    assert any(f"broke {broken} of the {left} images that gradient attacks leave" in each for each in found.warnings)


def test_a_state_file_of_an_earlier_version_is_resumed(tmp_path: Path):
    """The keys, written out here, are those of the first version: what is in the file is not measured again."""
    net, images = case()
    attacks = [FGSM(BUDGET), PGD(BUDGET, steps=3)]
    whole = evaluate(net, images, attacks, batch_size=8)
    clean, rows = whole.correct["clean"], whole.correct["clean"].nonzero().squeeze(1)
    partly = clean.clone()
    partly[rows[:16]] = whole.correct["pgd(steps=3)"][rows[:16]]
    state = {
        "correct": {"clean": clean, "fgsm": whole.correct["fgsm"], "pgd(steps=3)": partly},
        "seconds": {"clean": 1.0, "fgsm": 2.0, "pgd(steps=3)": 3000.0},
        "passes": {"clean": [N, 0], "fgsm": [7, 7], "pgd(steps=3)": [1000, 2000]},
        "trails": {}, "members": {"fgsm": {"fgsm": [7, 7]}, "pgd(steps=3)": {"pgd(steps=3)": [1000, 2000]}},
        "examples": {}, "doubts": ["One doubt."], "lost": {"fgsm": 1},
        "under_way": {"attack": "pgd(steps=3)", "member": 0, "batch": 2, "rows": rows},
    }  # fmt: skip
    torch.save(state, tmp_path / "state")
    done: list[tuple[str, int]] = []
    resumed = evaluate(
        net, images, attacks, batch_size=8, state=tmp_path / "state", advance=lambda *args: done.append(args)
    )
    assert {name: flags.tolist() for name, flags in resumed.correct.items()} == {
        name: flags.tolist() for name, flags in whole.correct.items()
    }
    left = len(rows) - 16
    expected = [("clean", N), ("fgsm", N), ("pgd(steps=3)", N - len(rows))]
    assert done == expected + [("pgd(steps=3)", 8)] * (left // 8) + [("pgd(steps=3)", left % 8)] * (left % 8 > 0)
    assert (resumed.seconds["fgsm"], resumed.passes["fgsm"]) == (2.0, (7, 7))
    assert resumed.seconds["pgd(steps=3)"] > 3000
    assert 1000 < resumed.passes["pgd(steps=3)"].forward < 1000 + whole.passes["pgd(steps=3)"].forward
    assert resumed.warnings == ("One doubt.", "Outputs were not finite on 1 images of fgsm: they count as broken.")


def test_warnings_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.evaluation.state.SAVE_SECONDS", 0.0)
    net, images = case()
    masked = Around(net, after=lambda z: z.softmax(1).detach()).eval()
    whole = evaluate(masked, images, [FGSM(BUDGET), MIM(BUDGET)], batch_size=8)
    calls: list[str] = []

    def impatient(name: str, n: int) -> None:
        calls.append(name)
        if len(calls) == 14:
            raise Interrupted

    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        evaluate(masked, images, [FGSM(BUDGET), MIM(BUDGET)], batch_size=8, state=state, advance=impatient)
    assert state.exists()
    found = evaluate(masked, images, [FGSM(BUDGET), MIM(BUDGET)], batch_size=8, state=state)
    assert found.warnings == whole.warnings
    assert len(whole.warnings) == 2


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda z: z[:, :1], r"must return logits \(N, K\), K classes, not \(53, 1\) for 53 images"),
        (lambda z: z[:, 0], r"must return logits \(N, K\), K classes, not \(53,\) for 53 images"),
        (lambda z: (z, z), r"a tensor \(N, K\), not tuple"),
        (lambda z: z[:, :2], "the model's 2 outputs are classes 0 to 1, but labels are 0 to 3"),
        (lambda z: z * torch.tensor([1, 1, 1, torch.inf]), "outputs are not finite on 53 of 53 clean images"),
    ],
)
def test_models_that_give_no_logits_are_refused_before_any_attack(after: Callable, words: str):
    net, images = case()
    stub = Stub(BUDGET, lambda model, x, y: x)
    with pytest.raises(UserError, match=words):
        evaluate(Around(net, after=after), images, stub)
    assert not stub.seen


def test_a_pair_of_floats_is_evaluated_as_it_is():
    net, images = case()
    x = (images.floats() * 0.99 + 0.003).double().float()  # on no grid of 1/255
    found = evaluate(net, (x, images.labels), [FGSM(BUDGET)])
    right = [int(net(x[i : i + 1]).argmax()) == int(images.labels[i]) for i in range(N)]
    assert found.correct["clean"].tolist() == right
    on_grid, same = (evaluate(net, each, [FGSM(BUDGET)]) for each in (images, (images.floats(), images.labels.int())))
    assert torch.equal(on_grid.correct["fgsm"], same.correct["fgsm"])
    whole = evaluate(net, (images.pixels, images.labels), FGSM(BUDGET))  # a single attack, and pixels
    assert torch.equal(whole.correct["fgsm"], same.correct["fgsm"])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            DataLoader(TensorDataset(torch.rand(4, 3, 8, 8), torch.zeros(4).long())),
            r"of a DataLoader: x, y = \(torch.cat",
        ),
        (torch.rand(4, 3, 8, 8), r"a pair \(x, y\) of tensors, .* not Tensor"),
        ((torch.rand(4, 3, 8, 8), torch.rand(4)), "whole-numbered labels"),
        ((torch.rand(4, 3, 8, 8), torch.zeros(3).long()), "whole-numbered labels"),
        ((torch.rand(4, 8, 8), torch.zeros(4).long()), r"floats \(N, C, H, W\)"),
        ((255 * torch.rand(4, 3, 8, 8), torch.zeros(4).long()), "images lie in"),
        ((torch.rand(0, 3, 8, 8), torch.zeros(0).long()), "there are no images"),
    ],
)
def test_what_is_no_images_is_refused_in_a_line(images: Any, words: str):
    with pytest.raises(UserError, match=words) as caught:
        evaluate(tiny(0), images)
    assert "\n" not in str(caught.value)
    if "lie in" not in words:  # of which a diagnosis makes a verdict
        with pytest.raises(UserError, match=words):
            diagnose(tiny(0), images, BUDGET)


@pytest.mark.parametrize("attacks", ["fgsm", ["fgsm"]])
def test_a_spelling_is_no_attack(attacks: Any):
    with pytest.raises(UserError, match=r'attack \'fgsm\' needs a threat model: write attacks.parse\("fgsm", threat='):
        evaluate(*case(), attacks)


def test_it_is_shown_in_a_line():
    flags = {"clean": [1, 1, 1, 0], "a": [1, 0, 1, 0], "b": [0, 1, 1, 0]}
    found = Evaluation({name: torch.tensor(each).bool() for name, each in flags.items()}, {}, warnings=("x",))
    assert repr(found) == "Evaluation(clean=75.0 %, a=50.0 %, b=50.0 %, worst case=25.0 %, n=4, warnings=1)"


def test_candidates_are_confirmed_by_the_original_where_numbers_are_coarse():
    """Under autocast the network itself says in fp32 whether an image is fooled, not its folded twin."""
    net, images = case()
    counted = PassCounter(net.eval())
    x, y = images.floats(), images.labels
    outputs = counted(x)
    asked: list[int] = []
    net.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    wrong = outputs.argmax(1) != y
    assert torch.equal(fooled_in(counted, outputs, x, y), wrong)
    assert asked == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fooled_in(counted, outputs, x, y), wrong)
    assert asked == [int(wrong.sum())]
    assert counted.counts == [len(x) + int(wrong.sum()), 0]


@pytest.mark.slow
def test_threads_on_one_model_measure_what_one_thread_measures():
    net, images = case()
    net.train()
    attack_list = [PGD(BUDGET, steps=2), parse("square(queries=5)", threat=BUDGET)]
    before = torch.random.get_rng_state()

    def measured(seed: int) -> object:
        evaluation = evaluate(net, images, attack_list, batch_size=16, seed=seed)
        return {name: flags.tolist() for name, flags in evaluation.correct.items()}, evaluation.warnings

    alone = [measured(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(measured, range(4)))
    assert together == alone
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


STATE = {
    "correct": {"clean": torch.ones(4, dtype=torch.bool), "pgd": torch.ones(4, dtype=torch.bool)},
    "seconds": {"clean": 1.0, "pgd": 1.0},
    "passes": {"clean": [4, 0], "pgd": [1, 1]},
    "under_way": {"attack": "pgd", "rows": torch.tensor([0, 3]), "member": 0, "batch": 1},
}


def test_a_state_that_fits_is_read(tmp_path: Path):
    save_state(tmp_path / "a.state", STATE, state_owner(tmp_path / "a.state"))
    state = EvaluationState.read(tmp_path / "a.state", 4)
    assert state.under_way is not None
    assert state.under_way.rows.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("n", "changed"),
    [
        (5, {}),
        (4, {"correct": {"clean": torch.ones(4), "pgd": torch.ones(4)}}),
        (4, {"seconds": {"clean": "x", "pgd": 1.0}}),
        (4, {"seconds": {"clean": 1.0}}),
        (4, {"passes": {"clean": [4], "pgd": [1, 1]}}),
        (4, {"under_way": {**STATE["under_way"], "rows": torch.tensor([4])}}),
        (4, {"under_way": {**STATE["under_way"], "rows": None}}),
        (4, {"under_way": {**STATE["under_way"], "attack": "fgsm"}}),
        (4, {"under_way": {**STATE["under_way"], "batch": -1}}),
        (4, {"examples": {"pgd": torch.ones(3, 1, 8, 8)}}),
        (4, {"correct": None}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(n: int, changed: dict[str, Any], tmp_path: Path):
    save_state(tmp_path / "a.state", {**STATE, **changed}, state_owner(tmp_path / "a.state"))
    with pytest.raises(UserError, match=r"a\.state is damaged or"):
        EvaluationState.read(tmp_path / "a.state", n)
