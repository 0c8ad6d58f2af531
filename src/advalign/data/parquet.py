"""Images in Parquet files, as Hugging Face's `datasets` writes them: a column of encoded images and one of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advalign.data.images import Dataset
from advalign.data.records import Record, Records, files_of, load_records
from advalign.errors import UserError, require, shorten
from advalign.runtime.files import full_path
from advalign.runtime.memory import require_memory

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE, LABEL = ("image", "img"), ("label", "fine_label", "labels")
"""What the columns may be called."""
_TOGETHER = 64  # images in memory at once, beside the part of the file that is being read


def load_parquet(path: Path | str, size: int) -> Dataset:
    """Return the images in Parquet files, of one file or of all below a folder; split by their names (`files_of`).

    The column `image` (or `img`) holds encoded images, as bytes or as a structure with `bytes`; the column `label` (or
    `fine_label`, `labels`) integers from 0, whose names are taken from what `datasets` has noted in the file.

    Raises:
        UserError: pyarrow is not installed; a file that cannot be read or has other columns; as `load_records`.
    """
    root = full_path(path)
    first = next(iter(files_of("parquet", root, ".parquet").values()))[0]
    return load_records("parquet", root, ".parquet", _open, _class_names(first), size)


@contextmanager
def _opened(file: Path) -> Iterator[ParquetFile]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError("parquet: needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(file) as opened:
            yield opened
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read: {shorten(' '.join(str(error).split()))}") from None


def _column(names: list[str], allowed: tuple[str, ...], file: Path) -> str:
    found = next((name for name in allowed if name in names), None)
    if found is None:
        raise UserError(f"{file} has no column {' or '.join(allowed)}, only {shorten(', '.join(names))}")
    return found


def _open(file: Path) -> Records:
    with _opened(file) as opened:
        from pyarrow.types import is_dictionary, is_integer

        names = opened.schema_arrow.names
        image, label = _column(names, IMAGE, file), _column(names, LABEL, file)
        kind = opened.schema_arrow.field(label).type
        values = kind.value_type if is_dictionary(kind) else kind
        require(is_integer(values), lambda: f"{file}: {label} has {kind} values; labels are integers from 0")
        column = opened.read(columns=[label]).column(label)
        require(column.null_count == 0, lambda: f"{file}: {column.null_count} images have no label")
        require(len(column) > 0, lambda: f"{file} has no images")
        return Records(file, column.to_numpy().astype(np.int64), lambda first: _images(file, image, first))


def _images(file: Path, column: str, first: int) -> Iterator[Record]:
    """Yield the encoded images from a number on; parts of the file before it are passed over."""
    with _opened(file) as opened:
        begins = 0
        for group in range(opened.num_row_groups):
            about = opened.metadata.row_group(group)
            if begins + about.num_rows > first:
                what = f"{file}: reading a row group"
                remedy = "write the file with smaller row groups"
                require_memory(about.total_byte_size, torch.device("cpu"), what, remedy)
                batches = opened.iter_batches(_TOGETHER, row_groups=[group], columns=[column])
                values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
                for row, value in islice(enumerate(values, begins), max(0, first - begins), None):
                    yield f"{file}[{row}]", _content(value, f"{file}[{row}]")
            begins += about.num_rows


def _content(value: Any, place: str) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise UserError(f"{place} is no encoded image: its bytes must lie in the file, and not a path")
    return content


def _class_names(file: Path) -> tuple[str, ...]:
    """Return the names of the classes that `datasets` has noted; none where there are none."""
    try:
        with _opened(file) as opened:
            noted = json.loads((opened.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
            names = noted[_column(opened.schema_arrow.names, LABEL, file)]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if texts and len(set(names)) == len(names) else ()
