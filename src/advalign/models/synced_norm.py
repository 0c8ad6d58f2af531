"""BatchNorm over the images of all ranks: the statistics of the whole batch, whoever has its images."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from advalign.errors import require
from advalign.models.taps import Tapped
from advalign.runtime import ranks


class _Synced(_BatchNorm):
    """Normalises as one process would that has the whole batch; in eval mode, and alone, as every BatchNorm does."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...)."""
        if ranks.world() == 1 or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        weight = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if input.is_cuda:
            return _fused(self, input, weight or 0.0)
        return _normalised(self, input, weight or 0.0)


@final
class SyncedNorm1d(_Synced, nn.BatchNorm1d):
    """BatchNorm over all ranks, of features (N, C) or (N, C, L)."""


@final
class SyncedNorm2d(_Synced, nn.BatchNorm2d):
    """BatchNorm over all ranks, of feature maps (N, C, H, W)."""


_SYNCED: dict[type[nn.Module], type[_BatchNorm]] = {nn.BatchNorm1d: SyncedNorm1d, nn.BatchNorm2d: SyncedNorm2d}


def synchronise_norms(net: nn.Module) -> None:
    """Let the BatchNorms of a network normalise over the images of all ranks, in place.

    Each stays the same object with the same tensors, as another class: whoever has a reference to it goes on. Those of
    frozen networks never see a batch, and need not be of a known kind.

    Raises:
        UserError: a BatchNorm of another kind, whose forward pass is not known.
    """
    for module in net.modules():
        if synced := _SYNCED.get(type(module)):
            module.__class__ = synced
    frozen = {each for part in net.modules() if isinstance(part, Tapped) and part.frozen for each in part.modules()}
    for name, module in net.named_modules():
        require(
            isinstance(module, _Synced) or not isinstance(module, _BatchNorm) or module in frozen,
            lambda: (
                f"--sync-bn knows torch's BatchNorm1d and BatchNorm2d, and {name.removeprefix('nets.student.net.')} "
                f"is {type(module).__module__}.{type(module).__qualname__}: train without it, or on one device"
            ),
        )


@torch.no_grad()
def average_statistics(net: nn.Module) -> None:
    """Make the running statistics of norms that each rank keeps by its own images their mean over the ranks."""
    if ranks.world() > 1:
        norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.training]
        kept = [(norm.running_mean, norm.running_var) for norm in norms if not isinstance(norm, _Synced)]
        statistics = [each for pair in kept for each in pair if each is not None]
        for each in statistics:
            each.copy_(ranks.own_part(each))
        ranks.add_up(statistics)


def _normalised(norm: _BatchNorm, x: Tensor, weight: float) -> Tensor:
    """Normalise in two sums over the ranks, of the images and of squared distances from their mean."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    over = [0, *range(2, x.ndim)]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    count = ranks.whole(len(x)) * x[0, 0].numel()
    mean = ranks.all_sum(values.sum(over)) / count
    centred = values - mean.view(shape)
    variance = ranks.all_sum(centred.square().sum(over)) / count
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), weight)
        unbiased = variance.detach() * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)
    out = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


def _fused(norm: _BatchNorm, x: Tensor, weight: float) -> Tensor:
    """Normalise by torch's kernels for GPUs, which meet by NCCL."""
    group: Any = torch.distributed.group.WORLD
    return SyncBatchNorm.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, weight, group, ranks.world()
    )  # pyright: ignore[reportReturnType]
