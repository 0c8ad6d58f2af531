"""How a run trains, as data: presets are the papers' settings, and every field is a flag of `advalign train`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from advalign.errors import require
from advalign.spelling import check_arguments, check_numbers

if TYPE_CHECKING:
    from advalign.threats import Threat

LINF_EPS = 8 / 255
ADDED = frozenset(
    {"attack", "batchnorm_momentum", "batchnorm_passes", "ema_constant", "ema_epochs", "eps_ramp", "guard", "lr_factor"}
)
"""Fields that came later: they name a run only where they differ from their default, so that older runs keep theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a run trains; together with method, data and model it names the run.

    Example:
        >>> import advalign as aa
        >>> str(aa.Recipe(epochs=30, eps=4 / 255).threat)
        'Linf(4/255)'

    Raises:
        UserError: a value out of range, of the wrong type or not among the choices, named with what is allowed.
    """

    epochs: int = 110
    """passes over the training set"""
    batch_size: int = 128
    """images a step, over all devices together"""
    lr: float = 0.1
    """learning rate, the highest one of the schedule"""
    schedule: Literal["piecewise", "linear", "cosine", "onecycle", "constant"] = "piecewise"
    """piecewise: lower by lr_factor from each milestone on; linear: up to the first as it is, then straight down to
    an lr_factor-th at each next one; cosine to 0; onecycle: up from lr/25 and down, each step"""
    milestones: tuple[float, ...] = (100 / 110, 105 / 110)
    """where piecewise drops and linear bends, as shares of the epochs"""
    lr_factor: float = 10.0
    """what piecewise and linear divide the learning rate by at each milestone"""
    peak: float = 0.25
    """share of the epochs after which onecycle turns"""
    cycle_momentum: bool = False
    """onecycle also swings momentum from 0.95 to 0.85 and back, as torch's scheduler does unasked"""
    warmup: int = 0
    """epochs at a fifth of the learning rate before the schedule's own (LBGAT, AR-AT: 1)"""
    momentum: float = 0.9
    """SGD momentum"""
    nesterov: bool = False
    """Nesterov momentum"""
    weight_decay: float = 5e-4
    """SGD weight decay, on every parameter as in the papers' code"""
    clip_norm: float | None = None
    """largest norm of the whole gradient; not clipped if not given"""
    augment: Literal[
        "none",
        "flip",
        "flip-crop",
        "cropshift",
        "random-erasing",
        "idbh-weak",
        "idbh-strong",
        "autoaugment",
        "autoaugment-first",
        "resized-crop",
    ] = "flip-crop"
    """flip: mirror at random; crop: pad by 4 and crop at random; the others: see the table of augmentations"""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """norm of the threat model"""
    eps: float = LINF_EPS
    """radius of the threat model for images in [0, 1]"""
    eps_ramp: bool = False
    """radius and step of the training attack grow from epoch to epoch, linearly from eps / epochs to eps"""
    attack: str = "pgd"
    """the training attack: pgd, or with fewer passes n-fgsm, fgsm-rs, free(m=8), atta, fgsm-pgi; see `advalign list
    training-attacks`"""
    steps: int | str = 10
    """steps of --attack pgd; 2:5:10 for 2, 5 and 10 in thirds of the training"""
    step_size: float | None = None
    """step of --attack pgd; a quarter of eps if not given"""
    start: Literal["uniform", "unclamped", "gaussian", "clean"] | None = None
    """where --attack pgd starts, unclamped: uniform, also beyond [0, 1]; the method's own if not given"""
    mode: Literal["eval", "train"] | None = None
    """the student's mode during the attack; the method's own if not given"""
    guard: bool | None = None
    """watch for catastrophic overfitting, and then go back and attack in more steps; with the cheap attacks if not
    given"""
    batchnorm_passes: Literal["loss", "clean", "pang", "rice"] = "loss"
    """what BatchNorm sees in train mode beside the attack: the loss's passes alone; clean: then the clean images; pang:
    these, and again after the update; rice: the adversarial images before, and the clean ones after the update"""
    batchnorm_momentum: float | None = None
    """weight of a batch in BatchNorm's running statistics, 1 in the first step; the network's own if not given"""
    validation: int | None = None
    """training images held out, stratified, to select the best checkpoint; 1000, or a tenth if that is less; of a
    validation set of your own this many, or all"""
    validate_every: int = 1
    """epochs between validations; the last epoch is always validated"""
    subset: int | None = None
    """train on this many images, stratified; all that are not held out if not given"""
    label_smoothing: float = 0.0
    """share of a uniform label in every term that supervises hard ones"""
    awp: float = 0.0
    """adversarial weight perturbation: its size as a share of each layer's weights (AT: 0.01, TRADES: 0.005)"""
    awp_start: int = 0
    """epochs without weight perturbation at the beginning"""
    average: Literal["none", "ema", "swa", "method"] = "none"
    """what is validated and saved: the weights, or their exponential (ema) or equal (swa) average over the steps;
    method: the average that the method itself keeps (adr, rebat, generalist)"""
    average_start: float | None = None
    """share of the epochs after which averaging begins; 0 for ema and 0.5 for swa if not given"""
    ema_decay: float = 0.995
    """decay of the exponential average a step, approached from below: min(decay, (1 + t) / (10 + t))"""
    ema_constant: bool = False
    """the exponential average has its decay from its first step on"""
    ema_epochs: bool = False
    """the exponential average takes the weights in once an epoch, each with 1 - decay, and not in each step"""
    swa_every: int | None = None
    """steps between two weights of the equal average; an epoch if not given"""
    extra_share: float = 0.7
    """share of each batch that comes from the extra data, where there are any"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: mixed precision for the training passes and the attack; fp16 scales the loss, and leaves out steps
    whose gradients it cannot hold"""
    compile: bool = False
    """compile the training passes and the attack with torch.compile"""
    seed: int = 0
    """seed of the initial weights, the splits, the order, the augmentation and the attack's noise"""

    def __post_init__(self) -> None:
        for name, value in check_arguments("recipe", Recipe, self._values).items():
            object.__setattr__(self, name, value)  # lr=1 is lr=1.0, also in the digest that names a run
        if isinstance(self.steps, str) and min(parts := self.all_steps) >= 1:  # 2:5 and 2:05 are one, 7:7 is 7
            object.__setattr__(self, "steps", parts[0] if len(set(parts)) == 1 else ":".join(map(str, parts)))
        for name in ("epochs", "batch_size", "validate_every"):
            value = getattr(self, name)
            require(value >= 1, lambda: f"{name}={value} must be at least 1")
        require(
            min(self.all_steps) >= 1,
            lambda: f"steps={self.steps} must be at least 1, or such numbers for parts of the training, as in 2:5:10",
        )
        require(
            len(self.all_steps) <= self.epochs,
            lambda: f"steps={self.steps} has {len(self.all_steps)} parts, more than epochs={self.epochs}",
        )
        for name in ("validation", "subset"):
            value = getattr(self, name)
            require(value is None or value >= 1, lambda: f"{name}={value} must be at least 1")
        taken_over = self.norm != "linf" and self.eps == LINF_EPS
        usual = "0.5" if self.norm == "l2" else "12"
        default = f"norm={self.norm} needs an eps of its own, such as {usual}: 8/255 is the default of linf"
        require(not taken_over, default)
        require(self.lr > 0, lambda: f"lr={self.lr:g} must be above 0")
        require(0 <= self.momentum < 1, lambda: f"momentum={self.momentum:g} must be in [0, 1)")
        require(not self.nesterov or self.momentum > 0, "nesterov needs momentum above 0")
        require(self.weight_decay >= 0, lambda: f"weight_decay={self.weight_decay:g} must be at least 0")
        require(self.clip_norm is None or self.clip_norm > 0, lambda: f"clip_norm={self.clip_norm} must be above 0")
        require(
            0 <= self.warmup < self.epochs,
            lambda: f"warmup={self.warmup} must be at least 0 and below epochs={self.epochs}",
        )
        require(0 < self.peak < 1, lambda: f"peak={self.peak:g} must be between 0 and 1")
        require(
            all(0 < m <= 1 for m in self.milestones), lambda: f"milestones={self.milestones} must be shares in (0, 1]"
        )
        bends = self.milestones
        require(
            self.schedule != "linear" or bends == tuple(sorted(set(bends))) != (),
            lambda: f"milestones={bends} must rise: schedule=linear bends at each",
        )
        require(self.lr_factor >= 1, lambda: f"lr_factor={self.lr_factor:g} must be at least 1")
        require(self.step_size is None or self.step_size > 0, lambda: f"step_size={self.step_size} must be above 0")
        share = self.batchnorm_momentum
        require(share is None or 0 < share <= 1, lambda: f"batchnorm_momentum={share} must be above 0 and at most 1")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, lambda: f"label_smoothing={smoothing:g} must be at least 0 and below 1")
        require(0 <= self.awp < 1, lambda: f"awp={self.awp:g} must be at least 0 and below 1")
        require(
            0 <= self.awp_start < self.epochs,
            lambda: f"awp_start={self.awp_start} must be at least 0 and below epochs={self.epochs}",
        )
        begin = self.average_start
        require(begin is None or 0 <= begin < 1, lambda: f"average_start={begin} must be at least 0 and below 1")
        unused = [name for name in ("average_start", "swa_every") if getattr(self, name) is not None]
        averages = self.average in ("ema", "swa")
        require(averages or not unused, lambda: f"{unused[:1]} is given, but average={self.average}")
        require(0 < self.ema_decay < 1, lambda: f"ema_decay={self.ema_decay:g} must be between 0 and 1")
        of_ema = [name for name in ("ema_constant", "ema_epochs") if getattr(self, name)]
        require(self.average == "ema" or not of_ema, lambda: f"{of_ema[0]} is given, but average={self.average}")
        require(self.swa_every is None or self.swa_every >= 1, lambda: f"swa_every={self.swa_every} must be at least 1")
        require(0 < self.extra_share < 1, lambda: f"extra_share={self.extra_share:g} must be above 0 and below 1")
        require(0 <= self.seed < 2**63, lambda: f"seed={self.seed} must be at least 0 and below 2**63")
        check_numbers("recipe", self._values)

    @property
    def setting(self) -> dict[str, Any]:
        """The fields by name, as they name a run."""
        added = {field.name: field.default for field in fields(self) if field.name in ADDED}
        return {name: value for name, value in self._values.items() if name not in added or value != added[name]}

    @property
    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def all_steps(self) -> tuple[int, ...]:
        """The steps of --attack pgd in the parts of the training, one after the other; none if they are no numbers."""
        parts = str(self.steps).split(":")
        return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else (0,)

    @property
    def threat(self) -> Threat:
        """The threat model of `norm` and `eps`.

        Raises:
            UserError: a radius out of range.
        """
        from advalign.threats import make_threat  # which needs torch, and the command line's help does not

        return make_threat(self.norm, self.eps)


def common() -> Recipe:
    """One recipe for all methods: Pang et al. 2021, 110 epochs, drops at 100 and 105, eval-mode attack."""
    return Recipe()


def short() -> Recipe:
    """30 epochs of one cycle, for comparisons on one GPU in minutes."""
    return Recipe(epochs=30, schedule="onecycle", lr=0.2, nesterov=True)


def cpu() -> Recipe:
    """10,000 images, for a small network on two cores in minutes; weak models, honest comparisons."""
    return Recipe(epochs=20, schedule="onecycle", lr=0.2, nesterov=True, subset=10_000, steps=7, validate_every=2)


def finetune() -> Recipe:
    """10 epochs for weights that are accurate already (--init): one cycle that starts slowly, the weights averaged."""
    return Recipe(epochs=10, schedule="onecycle", lr=0.05, peak=0.3, average="ema")


def digits() -> Recipe:
    """scikit-learn's digits at eps 0.2 in seconds."""
    return Recipe(
        epochs=25, batch_size=64, schedule="onecycle", lr=0.1, nesterov=True, augment="none", eps=0.2, steps=7,
        validation=150,
    )  # fmt: skip


def trades() -> Recipe:
    """TRADES' code: 76 epochs, one drop at epoch 75, weight decay 2e-4, eps 0.031 in steps of 0.007."""
    return Recipe(epochs=76, milestones=(74 / 76,), weight_decay=2e-4, eps=0.031, step_size=0.007)


def mart() -> Recipe:
    """MART's code for ResNet-18: 120 epochs, lr 0.01, weight decay 3.5e-3, drops at 75, 90 and 100."""
    return Recipe(
        epochs=120, lr=0.01, weight_decay=3.5e-3, milestones=(74 / 120, 89 / 120, 99 / 120), eps=0.031, step_size=0.007
    )


def hat() -> Recipe:
    """HAT's code: 50 epochs, one cycle to 0.21 with cycled momentum, Nesterov."""
    return Recipe(epochs=50, schedule="onecycle", lr=0.21, cycle_momentum=True, nesterov=True)


def rice() -> Recipe:
    """Rice et al. 2020: 200 epochs, drops at 100 and 150, attack in train mode; theirs is PreActResNet-18."""
    return Recipe(epochs=200, milestones=(0.5, 0.75), mode="train", start="uniform")


def awp() -> Recipe:
    """AWP's code for AT: Rice et al.'s recipe with weights perturbed by 0.01."""
    return Recipe(epochs=200, milestones=(0.5, 0.75), mode="train", start="uniform", awp=0.01)


def trades_awp() -> Recipe:
    """AWP's code for TRADES: 200 epochs, drops at 100 and 150, weights perturbed by 0.005 from epoch 10 on."""
    return Recipe(epochs=200, milestones=(99 / 200, 149 / 200), mode="eval", start="gaussian", awp=0.005, awp_start=9)


def kd() -> Recipe:
    """KD and SWA, Chen et al. 2021: 200 epochs, drops at 50 and 150, attack in train mode, averaged from epoch 55."""
    return Recipe(
        epochs=200, milestones=(50 / 200, 150 / 200), mode="train", start="uniform", average="swa",
        average_start=55 / 200,
    )  # fmt: skip


def lbgat() -> Recipe:
    """LBGAT's code: 100 epochs, the first at a fifth, drops at 76 and 91, weight decay 2e-4, eps 0.031 by 0.007."""
    return Recipe(epochs=100, warmup=1, milestones=(75 / 100, 90 / 100), weight_decay=2e-4, eps=0.031, step_size=0.007)


def ar_at() -> Recipe:
    """AR-AT's code: 100 epochs, the first at a fifth, drops after 76 and 91, attack in train mode."""
    return Recipe(epochs=100, warmup=1, milestones=(76 / 100, 91 / 100), mode="train", start="uniform")


def afa() -> Recipe:
    """AFA as we rebuilt it, both stages: 200 epochs, cosine from 0.2, batch 256; the authors' is not known to us."""
    return Recipe(epochs=200, schedule="cosine", lr=0.2, batch_size=256)


def part() -> Recipe:
    """PART's code: 80 epochs, lr 0.01, weight decay 2e-4, one drop before the last epoch."""
    return Recipe(epochs=80, lr=0.01, weight_decay=2e-4, milestones=(79 / 80,))


def ikl() -> Recipe:
    """IKL's code for CIFAR-10: 200 epochs, cosine from 0.2, AWP from epoch 10 on, an average of the epochs' weights."""
    return Recipe(
        epochs=200, schedule="cosine", lr=0.2, awp=0.005, awp_start=9, average="ema", ema_decay=0.9, ema_epochs=True
    )


# ARD, RSLAD, MTARD and AdaAD divide their loss by the 10 classes of CIFAR-10 as well. A tenth of the learning rate and
# ten times the weight decay make of our loss, which is not so divided, the same steps with momentum.


def ard() -> Recipe:
    """ARD's code for CIFAR-10, translated to our loss: 200 epochs; of their two drops only that at 100 works."""
    return Recipe(
        epochs=200, lr=0.01, weight_decay=2e-3, milestones=(0.5,), mode="train", start="uniform",
        batchnorm_passes="clean",
    )  # fmt: skip


def iad() -> Recipe:
    """IAD's code: 200 epochs, weight decay 2e-4; of their two drops only that at 100 works, as here."""
    return Recipe(epochs=200, weight_decay=2e-4, milestones=(0.5,), mode="train", start="uniform")


def rslad() -> Recipe:
    """RSLAD's and MTARD's code for CIFAR-10, translated to our loss: 300 epochs, drops at 215, 260 and 285."""
    return Recipe(epochs=300, lr=0.01, weight_decay=2e-3, milestones=(215 / 300, 260 / 300, 285 / 300))


def adaad() -> Recipe:
    """AdaAD's code for CIFAR-10, translated to our loss: 200 epochs, drops at 100 and 150."""
    return Recipe(epochs=200, lr=0.01, weight_decay=5e-3, milestones=(0.5, 0.75))


def score() -> Recipe:
    """SCORE's code without extra data: 110 epochs from 0.05, drops at 100 and 105."""
    return Recipe(lr=0.05)


def adr() -> Recipe:
    """ADR's code: 200 epochs, drops at 100 and 150, Nesterov, attack in train mode."""
    return Recipe(epochs=200, milestones=(0.5, 0.75), nesterov=True, mode="train")


def adaiad() -> Recipe:
    """AdaIAD's code: 200 epochs, drops at 100 and 150."""
    return Recipe(epochs=200, milestones=(0.5, 0.75))


def rpat() -> Recipe:
    """RPAT's code, also for Consistency-AT: 200 epochs, drops at 100 and 150."""
    return Recipe(epochs=200, milestones=(0.5, 0.75))


def rebat() -> Recipe:
    """ReBAT's code for PreActResNet-18: 200 epochs, the rate falls by 1.5 at 100 and 150, the average is the model."""
    return Recipe(
        epochs=200, milestones=(0.5, 0.75), lr_factor=1.5, mode="train", start="uniform", batchnorm_passes="rice",
        average="method",
    )  # fmt: skip


def generalist() -> Recipe:
    """Generalist's code for ResNet-18: 120 epochs from 0.01, linear to a tenth at 80 and a hundredth at 120."""
    return Recipe(
        epochs=120, lr=0.01, schedule="linear", milestones=(1 / 3, 2 / 3, 1.0), weight_decay=3.5e-3, eps=0.031,
        step_size=0.007, average="method",
    )  # fmt: skip


def acat() -> Recipe:
    """ACAT's code, for trades: 110 epochs, two steps in a radius that grows, AWP from epoch 10, EMA from epoch 83."""
    return Recipe(
        epochs=110, schedule="cosine", lr=0.2, steps=2, step_size=LINF_EPS, eps_ramp=True, awp=0.005, awp_start=9,
        average="ema", ema_decay=0.9996, ema_constant=True, average_start=82 / 110,
    )  # fmt: skip


def dajat() -> Recipe:
    """DAJAT's code, for trades+dajat: 200 epochs, 5 steps in a radius that grows, AWP from epoch 10, EMA from 151."""
    return Recipe(
        epochs=200, schedule="cosine", lr=0.2, steps=5, step_size=LINF_EPS / 2, eps_ramp=True, awp=0.005, awp_start=9,
        average="ema", ema_decay=0.9996, ema_constant=True, average_start=150 / 200,
    )  # fmt: skip


def dm() -> Recipe:
    """Wang et al. 2023, for generated data: 400 epochs, batch 512, one cycle, smoothed labels, EMA, 70 % generated."""
    return Recipe(
        epochs=400, batch_size=512, schedule="onecycle", lr=0.2, peak=0.025, cycle_momentum=True, nesterov=True,
        start="uniform", label_smoothing=0.1, average="ema", batchnorm_momentum=0.01,
    )  # fmt: skip


def imagenet() -> Recipe:
    """Wong et al. 2020's 15 epochs on ImageNet, with Singh et al. 2023's two steps, smoothed labels and EMA."""
    return Recipe(
        epochs=15, batch_size=512, lr=0.4, schedule="linear", milestones=(1 / 15, 6 / 15, 12 / 15, 1.0), warmup=1,
        weight_decay=1e-4, augment="resized-crop", eps=4 / 255, steps=2, step_size=4 / 255, start="clean",
        label_smoothing=0.1, average="ema", ema_decay=0.9999,
    )  # fmt: skip


def tiny_imagenet() -> Recipe:
    """Rice et al. 2020's recipe in half the epochs, for 64 x 64 images: drops at 50 and 75, attack in train mode."""
    return Recipe(epochs=100, milestones=(0.5, 0.75), mode="train", start="uniform")


RECIPES = {
    "common": common,
    "short": short,
    "cpu": cpu,
    "finetune": finetune,
    "digits": digits,
    "trades": trades,
    "mart": mart,
    "hat": hat,
    "rice": rice,
    "awp": awp,
    "trades-awp": trades_awp,
    "kd": kd,
    "lbgat": lbgat,
    "ar-at": ar_at,
    "afa": afa,
    "part": part,
    "ikl": ikl,
    "ard": ard,
    "iad": iad,
    "rslad": rslad,
    "adaad": adaad,
    "score": score,
    "adr": adr,
    "adaiad": adaiad,
    "rpat": rpat,
    "rebat": rebat,
    "generalist": generalist,
    "acat": acat,
    "dajat": dajat,
    "dm": dm,
    "imagenet": imagenet,
    "tiny-imagenet": tiny_imagenet,
}
