"""The log as TensorBoard scalars; an extra: `pip install 'advalign[tensorboard]'`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from advalign.errors import UserError


def tensorboard_sink(path: Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes an epoch's row of the log below `path/tensorboard`.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install 'advalign[tensorboard]'") from None
    writer = SummaryWriter(str(path / "tensorboard"))

    def write(row: dict[str, Any]) -> None:
        scalars = {key: value for key, value in row.items() if isinstance(value, float)}
        for group in ("terms", "validation"):
            scalars |= {f"{group}/{key}": value for key, value in row.get(group, {}).items()}
        for key, value in scalars.items():
            writer.add_scalar(key, value, row["epoch"])
        writer.flush()

    return write
