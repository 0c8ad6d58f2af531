"""The flags of each command, with their defaults and help; the settings of `train` are the recipe's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.training.recipes import Recipe

DataDir = Annotated[
    Path | None,
    tyro.conf.arg(help="folder of the CIFAR files; ADVALIGN_DATA, then the download cache, if not given"),
]
Device = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:1, mps")]
Runs = Annotated[Path, tyro.conf.arg(help="folder of the run folders")]
TestImages = Annotated[
    int | None,
    tyro.conf.arg(
        aliases=("-n",), help="test images, a stratified draw that is the same for every model; all if not given"
    ),
]
TimeBudget = Annotated[
    str | None,
    tyro.conf.arg(help="stop in an orderly way after this long, such as 9m or 1h30m; the same command resumes"),
]
TrustModel = Annotated[
    bool,
    tyro.conf.arg(
        help="call the function that a weights file names as its network; such a file is refused otherwise, since it "
        "would run a program"
    ),
]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a method, and first the guests it needs; a run that was stopped is resumed."""

    method: Annotated[Positional[str], tyro.conf.arg(metavar="METHOD")]
    """base and plug-ins, such as 'trades(beta=6)+vfd(weight=0.02)'; see `advalign list methods`"""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """digits, cifar10, cifar100, npz:PATH or folder:PATH"""
    model: str = "resnet18"
    """a name, or package.module:function of your own; see `advalign list models`"""
    width: int | None = None
    """channels of the model's first stage, short for --model 'resnet18(width=16)'"""
    recipe: str = "common"
    """the preset that the settings below start from; see `advalign list recipes`"""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    vanilla: str | None = None
    """run folder or weights of the vanilla model, where the method needs one; trained first if not given"""
    robust: str | None = None
    """run folder or weights of the robust teacher, MODEL@FILE for those of another architecture; by default the base
    (TRADES for distillation), trained first"""
    extractor: str | None = None
    """run folder or weights of `contrast`, where the method is afa; trained first if not given"""
    guest: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=SOURCE")] = ()
    """run folder, weights or MODEL@FILE of the network that the method calls NAME, such as one that a plug-in of your
    own asks for; once for each"""
    allow_weak_guest: bool = False
    """take a given network as teacher that is no better than always answering the largest class"""
    init: str | None = None
    """run folder or weights of the model's architecture that the student starts from, such as those of an accurate
    network that is to become robust; weights as the seed draws them if not given"""
    trust_model: bool = False
    """call the function that a guest's weights file names as its network;
    such a file is refused otherwise, since it would run a program"""
    extra: Path | None = None
    """.npz file of generated images; --extra-share of each batch comes from it"""
    plugin: tuple[str, ...] = ()
    """plug-ins of your own that METHOD may name, as package.module:Class"""
    runs: Runs = Path("runs")
    name: str | None = None
    """this run's folder below it; named by its content if not given"""
    data_dir: DataDir = None
    image_size: int = 32
    """side to which folder:PATH resizes its images"""
    device: Device = "auto"
    devices: int | None = None
    """processes on this machine that train together, each on a GPU of its own (or on the CPU) and on its share of every
    batch; on several machines, start them by torchrun"""
    sync_bn: bool = False
    """with several processes: BatchNorm sees the whole batch, and not each process its own images"""
    time_budget: TimeBudget = None
    checkpoint_seconds: float = 120.0
    """longest time between two saved states"""
    cuda_graphs: bool = False
    """on a GPU: record attack and update as CUDA graphs, which saves the time of launching each kernel"""
    tensorboard: bool = False
    """also write the log for TensorBoard, into the run folder"""


@dataclass(frozen=True, kw_only=True)
class ThreatOptions:
    """What `evaluate`, `diagnose` and `transfer` share: data, threat model, device."""

    data: str | None = None
    """data set; what the model was trained on if not given"""
    norm: str | None = None
    """linf, l2 or l1; what the model was trained against, else linf"""
    eps: float | None = None
    """radius; what the model was trained against, else 8/255"""
    data_dir: DataDir = None
    device: Device = TargetOptions.device
    trust_model: TrustModel = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ThreatOptions):
    """What `evaluate` and `diagnose` share: one model, and how it is attacked."""

    source: Annotated[Positional[str | None], tyro.conf.arg(metavar="RUN-OR-WEIGHTS")] = None
    """run folder, weights file (.safetensors, .pt), MODEL@FILE of weights that do not name their architecture, or
    zoo:NAME@FILE of a published model (see `advalign list zoo`)"""
    weights: str | None = None
    """the weights file, as a flag instead of an argument"""
    checkpoint: str = TargetOptions.checkpoint
    """best or last, of a run folder"""
    model: str | None = None
    """architecture of a weights file that does not name it"""
    batch_size: int = AttackOptions.batch_size
    """images attacked at once"""
    seed: int = AttackOptions.seed
    """seed of the attacks' random starts"""
    image_size: int | None = None
    """side to which folder:PATH resizes its images; what the model was trained on if not given"""
    mean: tuple[float, ...] = ()
    """mean of each channel, for weights without a training record whose network reads normalised images"""
    std: tuple[float, ...] = ()
    """standard deviation of each channel, as for --mean"""
    out: Path | None = None
    """folder of the results; evaluations/ or diagnosis/ beside the weights if not given"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Measure clean and robust accuracy of a run or of a weights file."""

    eps: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """radius, or several, as in --eps 2/255 4/255 8/255, for a curve; what the model was trained against, else 8/255"""
    attacks: tuple[str, ...] = ("standard",)
    """attacks, to be written after the run: fgsm 'pgd(steps=20, restarts=5)'; standard: the usual ones; none: clean
    accuracy only"""
    fast: bool = False
    """an estimate of autoattack for use during research, the attack `fast`, in the place of --attacks"""
    corruptions: str | None = None
    """cifar10-c:DIR or cifar100-c:DIR, the unpacked published files, or c-like, made here: measure accuracy under
    common corruptions instead of attacks"""
    n: TestImages = None
    until: float | None = None
    """go on to more and more test images, until the 95 % interval of no accuracy is wider than so many points each way;
    instead of -n"""
    precision: str = AttackOptions.precision
    """fp32, bf16 or fp16 for the attacks; whether an image withstands them is always decided in fp32"""
    surrogate: str | None = None
    """run folder, weights or MODEL@FILE of another model on which the attacks are made, and kept for other models; only
    attacks that transfer (see `advalign list attacks`); --mean and --std do not apply to it"""
    quantize: int | None = None
    """bits, such as 8: an image counts as broken only if it still fools after rounding to what an image file holds"""
    plugin: tuple[str, ...] = ()
    """attacks of your own that --attacks may name, as package.module:Class"""
    save_examples: bool = False
    """also write the adversarial images, as .npz"""


@dataclass(frozen=True, kw_only=True)
class FrontierOptions(ThreatOptions):
    """Trade robust for clean accuracy after training, between a robust and an accurate network."""

    robust: Annotated[Positional[str], tyro.conf.arg(metavar="ROBUST")]
    """run folder, weights file, or MODEL@FILE"""
    others: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="ACCURATE")] = ()
    """the same of the accurate network; the vanilla network that ROBUST has learned from if not given; none for
    finetune, and for soup further robust networks"""
    method: str = "mix"
    """how the two become one; see `advalign list frontiers`"""
    points: int = 11
    """settings on the curve, about; two or three times as many are attacked on the held-out images"""
    give: float = 1.0
    """points of robust accuracy, per cent, that the chosen setting may lose on the held-out images"""
    held_out: str = "1000"
    """how many training images at most, of those that neither network was trained on, to choose on; test:N for N test
    images that are then not measured; or another data set"""
    attacks: tuple[str, ...] = ("autoattack",)
    """further attacks on the chosen setting and on the robust network, to be written after both"""
    curve_attack: str = "worst(apgd-ce(steps=40), apgd-t(steps=40, targets=4))"
    """attack on every setting of the curve; examples made on one setting are shown to all"""
    n: TestImages = None
    batch_size: int = AttackOptions.batch_size
    """images attacked at once"""
    precision: str = AttackOptions.precision
    """fp32, bf16 or fp16 for the attacks; whether an image withstands them is always decided in fp32"""
    seed: int = AttackOptions.seed
    """seed of the attacks' random starts"""
    checkpoint: str = TargetOptions.checkpoint
    """best or last, of ROBUST if it is a run folder"""
    image_size: int | None = None
    """side to which folder:PATH resizes its images; what the model was trained on if not given"""
    runs: Path | None = None
    """folder for the run of the chosen network; that of ROBUST if not given"""
    out: Path | None = None
    """folder of the result; below frontiers/ if not given"""
    plugin: tuple[str, ...] = ()
    """attacks of your own that --attacks may name, as package.module:Class"""


@dataclass(frozen=True, kw_only=True)
class DiagnoseOptions(ModelOptions):
    """Check whether attacks on a run or on a weights file can be believed: gradient masking and similar failures."""

    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 500
    """test images at most, a stratified draw that is the same for every model"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare two evaluated models image by image: differences with confidence intervals, McNemar's test."""

    first: Annotated[Positional[Path], tyro.conf.arg(metavar="A")]
    """run folder, or result file of `advalign evaluate`"""
    second: Annotated[Positional[Path], tyro.conf.arg(metavar="B")]
    """run folder, or result file of `advalign evaluate`"""
    checkpoint: str = TargetOptions.checkpoint
    """best or last, of run folders; a result file holds its own"""


@dataclass(frozen=True, kw_only=True)
class TransferOptions(ThreatOptions):
    """Show every model the adversarial images made on every other: the transfer matrix."""

    sources: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN-OR-WEIGHTS")]
    """run folders, weights files, or MODEL@FILE of weights that do not name their architecture; at least two"""
    attack: str = "pgd(steps=20)"
    """an attack that transfers (see `advalign list attacks`); it runs to its last step"""
    n: TestImages = None
    plugin: tuple[str, ...] = ()
    """attacks of your own that --attack may name, as package.module:Class"""
    out: Path = Path("transfer")
    """folder of the matrix as JSON, Markdown and LaTeX"""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Train and measure all models of a table or figure: a paper's (`advalign list studies`) or your own."""

    study: Annotated[Positional[str], tyro.conf.arg(metavar="NAME-OR-FILE")]
    """a name, a .yaml file, a .py file with a function study(scale), or package.module:function"""
    scale: str = "tiny"
    """paper: the papers' setting, days on a GPU; short: minutes a row on a GPU; tiny: for two CPU cores"""
    seeds: int | None = None
    """number of training seeds, from 0 on; that of the study or scale if not given"""
    time_budget: TimeBudget = None
    executor: str = "local"
    """local: one cell after another; ray: as many at a time as the cluster has room for"""
    gpus: float | None = None
    """with ray: share of a GPU for each cell; a whole one, where the cluster has any, if not given"""
    plugin: tuple[str, ...] = ()
    """methods and attacks of your own that the study may name, as package.module:Class"""
    trust_model: bool = False
    """call the function that the YAML file names as its network;
    such a file is refused otherwise, since it would run a program"""
    dry_run: bool = False
    """only show the progress of each cell"""
    out: Path | None = None
    """folder of the table, the figures and the records; studies/NAME-SCALE if not given"""
    runs: Runs = Path("runs")
    data_dir: DataDir = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train five models on digits, attack them, and show the trade-off with a dial after training; in two minutes."""

    out: Path = Path("advalign-demo")
    """folder of the runs, the report and the plot"""
    seed: int = 0
    """seed of every run"""
    time_budget: TimeBudget = None


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page on runs and records: tables, figures, commands; each also as files beside it."""

    paths: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH")]
    """run folders, folders of runs or of evaluated weights, files of records (.jsonl) or of results (.json)"""
    out: Path = Path("report.html")
    """the page; tables (.md, .tex, .csv) and figures (.svg, .pdf, .png) go into PAGE-files/ beside it"""
    data_dir: Path | None = None
    """folder of the CIFAR files, for labels and test images; ADVALIGN_DATA, then the download cache, if not given"""
    maps: int = 4
    """models in a map of clean and adversarial features (t-SNE); 0 for none, as large networks take minutes on a CPU"""
    trust_model: TrustModel = False


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the names that methods, attacks, models and the other options may have."""

    what: Annotated[Positional[str], tyro.conf.arg(metavar="WHAT")]
    """methods, attacks, models, data, recipes, training-attacks, frontiers, studies, zoo or layers"""
    model: Annotated[Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None
    """for layers: the model"""
