"""An objective: a method bound to its networks. One module makes the examples and runs a whole training step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import (
    AttackLoss,
    TrainingStart,
    projected_gradient_ascent,
    start_point,
    value_and_grad,
)
from advalign.attacks.batches import in_type_of, widened
from advalign.attacks.losses import cross_entropy
from advalign.errors import UserError, require, shorten, unknown
from advalign.models.adapted import number_type
from advalign.models.augmentation_norm import using_augmentations
from advalign.models.fold import Folded
from advalign.models.modes import buffers_kept, check_parameters, evaluating, outside_inference_mode
from advalign.models.split_norm import SplitNorm, using_norms
from advalign.models.taps import Output, Tapped
from advalign.objectives import average
from advalign.objectives.contract import Calibration, Need, Terms, union
from advalign.objectives.distances import soft_cross_entropy
from advalign.objectives.epoch_watch import EpochWatch
from advalign.objectives.method import Base, Method, Part, PlugIn
from advalign.objectives.terms import check_smoothing, method_terms
from advalign.objectives.twins import Twins
from advalign.shapes import Attacked, Further, ImageBatch, Labels, Rows
from advalign.threats import Threat, check_images, check_step_size


@final
class Objective(nn.Module):
    """A method and its networks as one module, so that compile, autocast and DDP see one forward a step.

    Raises:
        UserError: a guest is missing, or a layer does not exist. Guests that the method does not need are left alone.
    """

    nets: nn.ModuleDict

    def __init__(
        self,
        method: Method,
        student: nn.Module,
        guests: Mapping[str, nn.Module],
        label_smoothing: float = 0.0,
        images: int = 0,
    ) -> None:
        super().__init__()
        missing = [name for name in method.guests if guests.get(name) is None]
        require(
            not missing,
            lambda: (
                f"{shorten(str(method))} needs {' and '.join(f'a {name} model' for name in missing)}: give {missing}"
            ),
        )
        check_smoothing(method, label_smoothing)
        self._images_checked = self._rows_checked = self._epoch_started = self._progress_known = False
        self._watch = EpochWatch()
        self._epochs = self._updates = 0
        self.register_load_state_dict_post_hook(_go_on)
        self.label_smoothing = label_smoothing
        self.method = method = copy.deepcopy(method)  # learnt parts belong to one objective
        self.parts = nn.ModuleList(method.parts)
        for plugin in method.plugins:
            plugin.images = images if plugin.reads_rows else 0
        for part in method.parts:
            if part.init_from:
                purpose = f"{shorten(str(method))}: the {part.init_from} initialises the student"
                _copy_weights(guests[part.init_from], student, purpose)
        for part in method.parts:
            student = part.adapt(student)
        self._put_parts_beside(student)
        layers = {part: part.layers(student) for part in method.parts}
        self._splits = any(isinstance(module, SplitNorm) for module in student.modules())
        keeper = method.replacing("average")
        averaged = copy.deepcopy(student) if keeper else nn.Module()  # before it is tapped
        self.nets = nn.ModuleDict({"student": Tapped(student, union(layers.values()))})
        kept = ("ema",) if keeper else ()
        for name in union([*((need.net,) for need in method.needs), kept]):
            if name != "student":
                read = union(layers[part] for part in method.parts if any(need.net == name for need in part.needs))
                guest = averaged if name == "ema" else guests[name]
                self.nets[name] = Tapped(guest, read, frozen=name not in method.learners)
        self._twins = Twins(self.nets)
        if keeper is not None:
            average.check_partner(method, keeper, self.nets)
        check_parameters(self)

    @property
    def student(self) -> nn.Module:
        """The network being trained, without its taps."""
        return self.nets.get_submodule("student.net")

    @property
    def average(self) -> nn.Module:
        """The average of the student that the method keeps.

        Raises:
            UserError: it keeps none.
        """
        keeps = self.method.replacing("average") is not None
        require(keeps, lambda: f"{shorten(str(self.method))} keeps no average of the student: take average=ema or swa")
        return self.nets.get_submodule("ema.net")

    def exported_student(self, student: nn.Module | None = None) -> nn.Module:
        """Return the student, or an average of it, as the plain network that is evaluated and saved.

        Where none is given and the method's model is the average that it keeps, that.
        """
        if student is None:
            student = self.average if self.method.exports_average else self.student
        for part in reversed(self.method.parts):
            student = part.restore(student)
        return student

    def start_epoch(self, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Let the parts look at the student before each epoch; AR-AT measures the weight of its label terms so.

        Args:
            batches: images (N, C, H, W) in [0, 1] and labels (N,), such as the epoch's own loader.
            progress: the share of the epochs that is done, `epoch / epochs`.

        Raises:
            UserError: progress is not in [0, 1).
        """
        require(
            0 <= progress < 1,
            lambda: f"progress={progress:g} must be in [0, 1): the share of the epochs that is done, epoch / epochs",
        )
        keeper = self.method.replacing("average")
        require(
            keeper is None or not self._epochs or self._updates > 0,
            lambda: (
                f"{shorten(str(self.method))}: {keeper and keeper.name!r} keeps an average of the student: call "
                "objective.after_update() after each step of the optimiser"
            ),
        )
        self._epoch_started = True
        self._epochs += 1
        if any(type(part).start_epoch is not Part.start_epoch for part in self.method.parts):
            self._watch.start(batches)
        with evaluating(self.nets["student"]), torch.no_grad():
            for part in self.method.parts:
                part.start_epoch(self._tapped("student"), batches, progress)
        if keeper is not None and keeper.hands_back:
            average.hand_back(keeper, self.nets)
        self.start_step(progress)

    def start_step(self, progress: float) -> None:
        """Let the parts that anneal follow the training more finely than by epochs; optional in a loop of your own.

        Args:
            progress: the share of all steps that is done, `step / (epochs * steps_per_epoch)`.
        """
        self._progress_known = True
        for part in self.method.parts:
            part.start_step(progress)

    def after_update(self) -> None:
        """Let the average of the student follow, if the method keeps one; call it after each step of the optimiser."""
        self._updates += 1
        if (keeper := self.method.replacing("average")) is not None:
            average.follow(keeper, self.nets)

    def perturb(
        self,
        x: ImageBatch,
        y: Labels,
        threat: Threat,
        *,
        second: Further | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        start: TrainingStart | Tensor | None = None,
        mode: Literal["eval", "train"] | None = None,
    ) -> Attacked:
        """Make the method's adversarial examples for images x (N, C, H, W) in [0, 1] with labels y (N,).

        Arguments that are None take the method's defaults; of the step size, a quarter of the radius. Inputs, modes and
        gradients are left as they were; in train mode the student's BatchNorm statistics move, as in Rice et al. 2020.
        A base without adversarial examples returns x. The caller's autograd mode does not matter. Where a method
        attacks several augmentations (`method.augmentations`), it returns so many times N images, those of x first.

        Args:
            start: where the attack starts: uniform, unclamped, gaussian, clean or wide, or images of the shape of what
                is returned.
            second: another augmentation of the same images, for methods that ask for one (`method.second`); for those
                that ask for several (`method.further`), all images in the first of these, then all in the next.

        Raises:
            UserError: images outside [0, 1], on the first call; in train mode, more images than the last started epoch
                has, where a part looks at each epoch's start; an unknown start or mode, no steps, or too long a step;
                a clean start where the attack's loss is flat.
        """
        training_attack = self.method.base.training_attack
        if training_attack is None:
            return x
        if step_size is not None:
            check_step_size("perturb", step_size, threat)
        with self._attacking(x, y, threat, second, start, mode) as attack:
            x_adv = projected_gradient_ascent(
                attack.loss,
                attack.x,
                attack.threat,
                steps=training_attack.steps if steps is None else steps,
                step_size=threat.eps / 4 if step_size is None else step_size,
                start=attack.start,
            )
            wide = isinstance(attack.start, str) and attack.start == "wide"
            return in_type_of(attack.given, x_adv, None if wide else attack.threat)

    def attack_gradient(
        self,
        x: ImageBatch,
        y: Labels,
        threat: Threat,
        start: Tensor,
        *,
        second: Further | None = None,
        mode: Literal["eval", "train"] | None = None,
    ) -> Attacked:
        """Return the gradient (N, C, H, W) of the loss that the method's attack climbs, at images to start from.

        For a training attack of one's own, which moves by it as it likes; one forward and one backward pass. The other
        arguments and what is raised are those of `perturb`; a base without adversarial examples has no such loss.
        """
        require(
            self.method.base.training_attack is not None,
            lambda: f"{shorten(str(self.method))} makes no adversarial examples, and has no loss to climb",
        )
        with self._attacking(x, y, threat, second, start, mode) as attack:
            assert isinstance(attack.start, Tensor)
            return value_and_grad(attack.loss, attack.start).grad

    @contextmanager
    def _attacking(
        self,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        second: Tensor | None,
        start: TrainingStart | Tensor | None,
        mode: Literal["eval", "train"] | None,
    ) -> Iterator[_Attack]:
        """Inside, the networks are as the attack runs them; what it climbs, and from where, is given."""
        training_attack = self.method.base.training_attack
        assert training_attack is not None
        if self.training:
            self._watch.count(x, shorten(str(self.method)))
        x, y, second = self._doubled(x, y, second)
        if not self._images_checked:  # once: it synchronises with the device
            for images in (x, second):
                if images is not None:
                    check_images(images)
            self._images_checked = True
        if mode not in (None, "eval", "train"):
            raise unknown("mode", mode, ("eval", "train"))
        if isinstance(start, Tensor):
            shape = tuple(start.shape)
            require(shape == x.shape, lambda: f"start must be images to start from, {tuple(x.shape)}, not {shape}")
        networks = self._twins.attacked(mode or training_attack.mode)
        augmentations = using_augmentations(self.nets, self.method.augmentations)
        with outside_inference_mode(), augmentations, networks as nets, torch.enable_grad():
            student = nets["student"]
            given, (x, y) = x, widened(x, y, number_type(self.student))
            second = None if second is None else widened(second, y, x.dtype)[0]
            if isinstance(student, Folded):
                student.try_out(x)
            for plugin in self.method.plugins:
                threat = plugin.attack_threat(student, x, threat)
            owner = self.method.replacing("attack_loss") or self.method.base
            views = self._clean_views(x, second)
            attack_loss = self._softened_attack(owner.attack_loss(nets, views, y), views, y)
            start = training_attack.start if start is None else start
            if isinstance(start, Tensor):
                start = start.to(x.dtype)
            require(
                not (attack_loss.flat_at_clean and isinstance(start, str) and start == "clean"),
                lambda: (
                    f"{shorten(str(self.method))}: the attack's loss is flat at the clean images; start=clean needs "
                    "another: choose from uniform, unclamped, gaussian, wide"
                ),
            )
            if readers := [plugin for plugin in self.method.plugins if plugin.reads_start]:
                require(
                    not (isinstance(start, str) and start == "wide"),
                    lambda: f"{readers[0].name} reads where the attack starts, and start=wide is outside of the ball",
                )
                start = start_point(x, threat, start) if isinstance(start, str) else start
                for plugin in readers:
                    plugin.attacked_from(start.detach().clone().to(given.dtype))
            yield _Attack(given, x, threat, start, attack_loss)

    def forward(
        self,
        x: ImageBatch,
        x_adv: Attacked,
        y: Labels,
        second: Further | None = None,
        rows: Rows | None = None,
    ) -> Terms:
        """Run every declared pass once and return the named terms of the loss; `total` sums them.

        Args:
            x: clean images (N, C, H, W) in [0, 1].
            x_adv: what `perturb` has made of them.
            y: labels (N,).
            second: as for `perturb`.
            rows: the numbers of the images in the training set (N,), for methods that ask for them
                (`method.reads_rows`).

        Raises:
            UserError: a second augmentation is missing, a number in rows is of no image, or two parts name the same
                term; in train mode, a part waits for `start_epoch`, or after a loaded state for `start_step`, without
                which it would train another method.
        """
        waiting = self._waiting if self.training else []
        require(
            not waiting,
            lambda: (
                f"{shorten(str(self.method))}: {waiting[0]!r} follows the epochs: call "
                "objective.start_epoch(batches, epoch / epochs) before each, and objective.start_step(step / steps) "
                "where a loaded state goes on within one"
            ),
        )
        self._check_rows(rows)
        x, y, second = self._doubled(x, y, second)
        return method_terms(self.method, self._passes(x, x_adv, second), y.long(), rows, self.label_smoothing)

    def weights_terms(
        self,
        x: ImageBatch,
        x_adv: Attacked,
        y: Labels,
        second: Further | None = None,
        rows: Rows | None = None,
    ) -> Terms:
        """Return the terms that adversarial weight perturbation climbs, from the arguments of a step.

        They are those of the loss, or, where a plug-in says so (`weights_climb_first`), those of the other parts on the
        first augmentation.
        """
        if not any(plugin.weights_climb_first for plugin in self.method.plugins):
            return self(x, x_adv, y, second, rows)
        alone = Method(self.method.base, [each for each in self.method.plugins if not each.weights_climb_first])
        outs = self._passes(x, x_adv[: len(x)], None, alone)
        return method_terms(alone, outs, y.long(), rows, self.label_smoothing)

    def calibrate(
        self,
        x: ImageBatch,
        x_adv: Attacked,
        y: Labels,
        second: Further | None = None,
        rows: Rows | None = None,
    ) -> dict[str, Calibration]:
        """Return what the log records of each plug-in on one batch, by layer and name; nothing is changed.

        Outside of autocast, which would cut the graph between the features and the logits.
        """
        calibrated = [plugin for plugin in self.method.plugins if type(plugin).calibrate is not PlugIn.calibrate]
        if not calibrated:
            return {}
        x, y, second = self._doubled(x, y, second)
        with buffers_kept(self):
            outs = self._passes(x, x_adv, second)
            terms = method_terms(self.method, outs, y.long(), rows, self.label_smoothing)
            return {plugin.name: plugin.calibrate(outs, terms) for plugin in calibrated}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the training passes and the attack's network with `torch.compile`, which takes the arguments."""
        super().compile(*args, **kwargs)
        with using_augmentations(self.nets, self.method.augmentations):
            self._twins.student.compile(*args, **kwargs)

    def learned_state(self) -> dict[str, Any]:
        """Return the state dict without the frozen guests, which are files of their own."""
        idle = tuple(f"nets.{name}." for name in self.nets if self._tapped(name).frozen and name != "ema")
        return {key: value for key, value in self.state_dict().items() if not key.startswith(idle)}

    @property
    def _waiting(self) -> list[str]:
        """The parts, by name, that do not know how far the training is; a loaded state does not hold the progress."""
        if not self._epoch_started:
            return self.method.waiting
        return [] if self._progress_known else self.method.annealing

    def _check_rows(self, rows: Tensor | None) -> None:
        """Refuse numbers of images that there are none of; once where it would synchronise with a device."""
        if rows is None or torch.compiler.is_compiling() or rows.is_meta:
            return
        images = max([plugin.images for plugin in self.method.plugins], default=0)
        if not images or (self._rows_checked and rows.device.type != "cpu"):
            return
        wrong = rows[(rows < 0) | (rows >= images)]
        require(
            not len(wrong),
            lambda: (
                f"{shorten(str(self.method))}: rows= holds {int(wrong[0])}, and the training set has {images} images, "
                f"so they are numbers from 0 to {images - 1}"
            ),
        )
        self._rows_checked = True

    def _put_parts_beside(self, student: nn.Module) -> None:
        """Move what the parts learn and keep to the student's device, in its numeric type or fp32 if that is wider."""
        weight = next(chain(student.parameters(), student.buffers()), None)
        if weight is not None:
            self.parts.to(weight.device, torch.promote_types(number_type(student) or torch.float32, torch.float32))

    def _doubled(self, x: Tensor, y: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put all augmentations into one batch, if all are to be attacked."""
        further = self.method.augmentations - 1
        if not further:
            return x, y, second
        if second is None:
            raise UserError(f"{self.method} attacks a second augmentation of the batch: give second=")
        require(
            len(second) == further * len(x),
            lambda: (
                f"{self.method} attacks {further} further augmentations of {len(x)} images: second= must hold "
                f"{further * len(x)} images, not {len(second)}"
            ),
        )
        return torch.cat([x, second]), y.repeat(1 + further), None

    def _clean_views(self, x: Tensor, second: Tensor | None) -> dict[str, Tensor]:
        reads = any(need.view == "second" for need in self.method.needs)
        require(
            second is not None or not reads,
            lambda: f"{self.method} reads a second augmentation of the batch: give second=",
        )
        return {"clean": x} if second is None else {"clean": x, "second": second}

    def _passes(
        self, x: Tensor, x_adv: Tensor, second: Tensor | None, method: Method | None = None
    ) -> dict[Need, Output]:
        """Run what a method reads: that of the objective, or a part of it."""
        method = method or self.method
        views = method.base.views(x, x_adv) | self._clean_views(x, second)
        for plugin in method.plugins:
            views = plugin.views(views)
        outs = _Outputs()
        with using_augmentations(self.nets, method.augmentations):
            for need in method.needs:
                require(
                    need.view in views, lambda: f"{method} has no view {need.view!r}: choose from {', '.join(views)}"
                )
                outs[need] = self._run(need, views)
        return outs

    def _run(self, need: Need, views: Mapping[str, Tensor]) -> Output:
        view = "clean" if need.view in ("clean", "second") else "adv"
        with using_norms(self.nets[need.net], view) if self._splits else nullcontext():
            return self.nets[need.net](views[need.view])

    def _softened_attack(self, attack_loss: AttackLoss, views: Mapping[str, Tensor], y: Tensor) -> AttackLoss:
        """Put soft targets in the place of the labels whose cross entropy the attack maximises, if it does."""
        softener = self.method.replacing("targets")
        if softener is None or softener.attack_needs is None or attack_loss.loss is not cross_entropy:
            return attack_loss
        with torch.no_grad():
            outs = {need: self._run(need, views) for need in softener.attack_needs}
            return attack_loss._replace(loss=soft_cross_entropy, target=softener.soft_targets(outs, y, None))

    def _tapped(self, name: str) -> Tapped:
        net = self.nets[name]
        assert isinstance(net, Tapped)
        return net


class _Attack(NamedTuple):
    given: Tensor  # (N, C, H, W), the images in the caller's type
    x: Tensor  # the same in the student's
    threat: Threat
    start: TrainingStart | Tensor
    loss: AttackLoss


class _Outputs(dict[Need, Output]):
    """The passes of a step; reading one that is not declared is an error."""

    def __missing__(self, need: Need) -> Output:
        raise UserError(f"{need} is read but not declared: add it to the part's needs")


def _go_on(objective: Objective, _: Any) -> None:
    """Take a loaded state, which holds what the parts kept at the epoch's start, for a start of the epoch."""
    objective._epoch_started = True


def compose(
    method: Method | Base,
    *plugins: PlugIn,
    student: nn.Module,
    label_smoothing: float = 0.0,
    images: int = 0,
    **guests: nn.Module | None,
) -> Objective:
    """Bind a method, or a base and plug-ins, to its networks: `compose(TRADES(), VFD(), student=net, vanilla=other)`.

    Example:
        >>> import advalign as aa
        >>> student, vanilla = (aa.models.build("small-cnn", classes=10, channels=1) for _ in range(2))
        >>> objective = aa.compose(aa.TRADES() + aa.VFD(), student=student, vanilla=vanilla)

    Args:
        student: the network being trained; images (N, C, H, W) in [0, 1] to logits (N, K). Moved or replaced modules
            (by a part that adapts it) are reached through `objective.student`; `objective.exported_student()` is the
            plain network again.
        label_smoothing: share of a uniform label in every term that supervises hard ones.
        images: their number in the training set, for methods that keep something for each (`method.reads_rows`).
        guests: `vanilla=`, and whatever else the method needs, as networks of the same input and output. They are
            frozen, in eval mode, unless the method trains them.

    Raises:
        UserError: the parts make no sense together, a guest is missing, or a layer does not exist.
    """
    method = Method(method) if isinstance(method, Base) else method
    for plugin in plugins:
        method = method + plugin
    networks = {name: net for name, net in guests.items() if net is not None}
    require(
        all(net is not student for net in networks.values()), "the student cannot be its own guest: copy.deepcopy it"
    )
    return Objective(method, student, networks, label_smoothing, images)


def _copy_weights(source: nn.Module, student: nn.Module, what: str) -> None:
    try:
        student.load_state_dict(source.state_dict())
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{what}, so both must have one architecture: {line}") from None
