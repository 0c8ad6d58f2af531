"""Clean and robust accuracy, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advalign.attacks import Attack
from advalign.attacks.names import quantized_name
from advalign.attacks.quantized import between_levels, bits_of, check_bits, require_levels
from advalign.attacks.quantized import quantize as quantized
from advalign.data import Images
from advalign.data.pairs import Pair, as_images
from advalign.data.stored import StoredImages
from advalign.errors import require
from advalign.evaluation.checks import Verdict, check_black_box, check_mode, judge_slips, warnings_of
from advalign.evaluation.evaluator import Evaluator, PrecomputedExamples
from advalign.evaluation.options import AttackOptions
from advalign.evaluation.state import EvaluationState
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating, outside_inference_mode
from advalign.runtime.memory import require_memory
from advalign.threats import in_unit_range

WORST_CASE = "worst case"


class Passes(NamedTuple):
    """What an attack has cost: images passed forward and backward through the network."""

    forward: int
    backward: int


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What a model classifies correctly, image by image."""

    correct: Mapping[str, Tensor]
    """`clean` and each attack's spelling to a boolean tensor (N,): whether the image is classified as its label."""
    seconds: Mapping[str, float]
    passes: Mapping[str, Passes] = field(default_factory=dict)
    trails: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of each ensemble: the accuracy left after each of its members, in their order."""
    members: Mapping[str, Mapping[str, Passes]] = field(default_factory=dict)
    """Of each attack: what its members have cost; an attack that is no ensemble is its only member."""
    success: Mapping[str, float] = field(default_factory=dict)
    """Of each targeted attack: the share, of the attacked images of another class, that is classified as the target."""
    unbounded: frozenset[str] = frozenset()
    """The attacks that may leave the threat model; the worst case does not include them."""
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    """On request, adversarial images (N, C, H, W) in [0, 1] by attack; of misclassified images the clean ones."""
    clean_warnings: tuple[str, ...] = ()
    """Those of the warnings that the clean images gave rise to."""
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the accuracies doubtful, each with the number behind it; see `diagnose`."""

    def __repr__(self) -> str:
        shown = [f"{name}={100 * accuracy:.1f} %" for name, accuracy in self.accuracies().items()]
        shown += [f"n={len(self)}", *([f"warnings={len(self.warnings)}"] if self.warnings else [])]
        return f"Evaluation({', '.join(shown)})"

    def __len__(self) -> int:
        return len(self.correct["clean"])

    @property
    def outcomes(self) -> dict[str, Tensor]:
        """`correct` and, if there are attacks, the worst case: images that withstand all bounded attacks."""
        bounded = [flags for name, flags in self.correct.items() if name not in self.unbounded]
        if len(bounded) == 1:
            return dict(self.correct)
        return {**self.correct, WORST_CASE: torch.stack(bounded).all(0)}

    def accuracies(self) -> dict[str, float]:
        """Return each outcome's share of correct images, in [0, 1]."""
        return {name: float(outcome.double().mean()) for name, outcome in self.outcomes.items()}


def evaluate(
    model: Callable[[Tensor], Tensor],
    images: Images | Pair,
    attacks: Attack | Sequence[Attack] = (),
    *,
    precomputed: Mapping[str, PrecomputedExamples] | None = None,
    batch_size: int = 512,
    precision: str = "fp32",
    seed: int = 0,
    quantize: int | None = None,
    keep_examples: bool = False,
    clean: Evaluation | None = None,
    state: Path | None = None,
    advance: Callable[[str, int], None] = lambda attack, done: None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack.

    Only images that are classified correctly are attacked, since the others are misclassified already. Each member of
    an ensemble attacks what those before have left, in full batches. Attacks run on a copy with BatchNorm folded into
    the convolutions, in the given precision. Whether an image withstands an attack is decided by the unmodified model
    in fp32; an image with outputs that are not finite does not. The model and the random state are left as they were;
    threads that evaluate, attack or train take turns. Of a compiled or DataParallel model, the network inside is
    evaluated. The caller's autograd mode, such as `torch.inference_mode()`, does not matter.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), on the images' device; a module of any floating-point
            type, or another function, whose networks are then in the mode in which the caller has left them.
        images: with labels; or a pair of floats (N, C, H, W) in [0, 1] and labels (N,), tensors or NumPy arrays.
        attacks: one or several, such as `attacks.parse("pgd(steps=20)", threat=Linf(8 / 255))`.
        precomputed: adversarial images by name that exist already, such as those made on a surrogate.
        quantize: bits, such as 8: an image counts as broken only if it still fools after rounding to so many bits,
            inside the threat model. Outcomes are then called `quantized(ATTACK, bits=8)`; see `attacks.Quantized`.
        keep_examples: also return the adversarial images.
        clean: an evaluation of the same model on the same images by the same options, as in another threat model: its
            outcomes of the clean images are taken.
        state: a file in which progress is kept, every 10 seconds, and from which a second call resumes, to the same
            bits. The caller makes sure that it belongs to this evaluation, and removes it.
        advance: called with an attack's spelling and the number of images just finished, for a progress bar.

    Raises:
        UserError: two attacks have one spelling, or an attack leaves its threat model; images outside [0, 1]; outputs
            that are no logits for these labels, or not finite on clean images.

    Example:
        >>> import advalign as aa
        >>> net = aa.models.build("small-cnn(width=4)", classes=10, channels=1).eval()
        >>> sorted(aa.evaluate(net, aa.data.load("digits").test, aa.attacks.FGSM(aa.Linf(0.1))).accuracies())
        ['clean', 'fgsm', 'worst case']
    """
    with outside_inference_mode():
        pictures, attack_list = as_images(images), _as_list(attacks)
    precomputed = precomputed or {}
    if quantize is not None:
        attack_list = [quantized(attack, quantize) for attack in attack_list]
    by_name, pictures = prepared(attack_list, pictures, batch_size)
    if quantize is not None:
        precomputed = _rounded(precomputed, pictures, quantize, batch_size)
    if keep_examples:
        require_room(len(by_name), pictures.shape)
    network = adapted(_inside(model))
    options = AttackOptions(batch_size=batch_size, precision=precision, seed=seed)
    with evaluating(network.net) as in_train_mode:
        evaluator = Evaluator(
            network, pictures, options, keep_examples=keep_examples, state_file=state, advance=advance
        )
        if clean is not None:
            evaluator.adopt_clean(clean.correct["clean"], clean.seconds["clean"], clean.clean_warnings)
        evaluator.classify_clean(attacked=bool(by_name or precomputed))
        for name, examples in precomputed.items():
            evaluator.evaluate_precomputed(name, examples)
        for name, attack in by_name.items():
            evaluator.attack(name, attack)
    return conclude(evaluator.state, by_name, precomputed, len(pictures), in_train_mode=in_train_mode)


def prepared(attacks: Sequence[Attack], images: Images, batch_size: int) -> tuple[dict[str, Attack], Images]:
    """Return the attacks by spelling and the images, which leave [0, 1] by rounding at most, clamped to it.

    Raises:
        UserError: two attacks have one spelling; images outside [0, 1], or between the levels of a quantized attack.
    """
    if images.dtype.is_floating_point and not isinstance(images, StoredImages):  # those were checked before
        with outside_inference_mode():
            images = Images(in_unit_range(images.pixels), images.labels)
    for bits in bits_of(attacks):
        _check_levels(images, bits, batch_size)
    names = [str(attack) for attack in attacks]
    for name in names:
        require(names.count(name) == 1, lambda: f"attack {name} is given twice: results are keyed by spelling")
    return dict(zip(names, attacks, strict=True)), images


def require_room(attacks: int, shape: torch.Size) -> None:
    """Refuse to keep the adversarial images (N, C, H, W) of so many attacks where they do not fit.

    Raises:
        UserError: as `require_memory`.
    """
    what = f"keeping adversarial images of {shape[0]} images"
    require_memory(4 * shape.numel() * attacks, torch.device("cpu"), what, "measure fewer, with --n")


def conclude(
    state: EvaluationState,
    attacks: Mapping[str, Attack],
    precomputed: Mapping[str, PrecomputedExamples],
    n: int,
    *,
    in_train_mode: Sequence[str],
) -> Evaluation:
    """Return what was measured on n images, with the warnings that it gives rise to.

    Args:
        attacks: by spelling.
        precomputed: as for `evaluate`.
        in_train_mode: what of the model was in train mode.
    """
    unbounded = [name for name, attack in attacks.items() if not attack.bounded]
    unbounded += [name for name, examples in precomputed.items() if examples.threat is None]
    before = warnings_of([check_mode(in_train_mode)])
    after = warnings_of(_broken_without_gradient(attacks, precomputed, state, n))
    lost = [f"Outputs were not finite on {k} images of {name}: they count as broken." for name, k in state.lost.items()]
    return Evaluation(
        correct={name: flags.cpu() for name, flags in state.correct.items()},
        seconds=state.seconds,
        passes={name: Passes(*counts) for name, counts in state.passes.items()},
        trails=state.trails,
        members={
            name: {member: Passes(*counts) for member, counts in costs.items()} for name, costs in state.members.items()
        },
        success={name: arrived / driven for name, (arrived, driven) in state.targeted.items() if driven},
        unbounded=frozenset(unbounded),
        examples=state.examples,
        clean_warnings=tuple(state.doubts),
        warnings=(*before, *state.doubts, *lost, *after),
    )


def _rounded(
    precomputed: Mapping[str, PrecomputedExamples], images: Images, bits: int, batch_size: int
) -> dict[str, PrecomputedExamples]:
    """Return adversarial images rounded to so many bits, under the name that says so."""
    check_bits(bits)
    _check_levels(images, bits, batch_size)
    x = images.to("cpu").floats()
    return {quantized_name(name, bits): examples.rounded(x, bits) for name, examples in precomputed.items()}


def _check_levels(images: Images, bits: int, batch_size: int) -> None:
    """Refuse images with values between two levels, read part by part."""
    batches = torch.arange(len(images), device=images.labels.device).split(batch_size)
    require_levels(sum(between_levels(images.floats(rows), bits) for rows in batches), len(images), bits)


def _as_list(attacks: Any) -> list[Attack]:
    attack_list: list[Any] = [attacks] if isinstance(attacks, str) or callable(attacks) else list(attacks)
    for each in attack_list:
        example = f'attacks.parse("{each}", threat=Linf(8/255))'
        require(not isinstance(each, str), lambda: f"attack {each!r} needs a threat model: write {example}")
    return attack_list


def _inside(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the network in a wrapper of torch's: compiled, DataParallel, DistributedDataParallel."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _inside(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _inside(inner) if isinstance(inner, nn.Module) else model


def _broken_without_gradient(
    attacks: Mapping[str, Attack], precomputed: Mapping[str, PrecomputedExamples], state: EvaluationState, n: int
) -> Iterator[Verdict]:
    """Check what broke images without gradients, where an attack with gradients was made in the same threat model."""
    bounded = {name: attack for name, attack in attacks.items() if attack.bounded}
    white = {name: a.threat for name, a in bounded.items() if all(member.uses_gradients for member in a.members)}
    black = {name: attack.threat for name, attack in bounded.items() if not attack.uses_gradients}
    black |= {name: examples.threat for name, examples in precomputed.items() if examples.threat is not None}
    for name, threat in black.items():
        if same := [state.correct[other] for other, its in white.items() if its == threat]:
            yield check_black_box(torch.stack(same).all(0), {name: state.correct[name]})
    for name, trail in state.trails.items():
        left, members = None, {str(member): member for member in attacks[name].members}
        for member, after in trail.items():
            if left is not None and not members[member].uses_gradients:
                yield judge_slips(f"{member} in {name}", round((left - after) * n), round(left * n), n)
            left = after
