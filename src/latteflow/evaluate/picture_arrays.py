"""Pictures and statistics as ``.npz`` files, in the form that the reference evaluators read and write.

ADM's evaluator (guided-diffusion) takes ``arr_0``, uint8 (pictures, height, width, 3); it and pytorch-fid keep
statistics as ``mu`` and ``sigma``, ADM also those of spatial features as ``mu_s`` and ``sigma_s``.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latteflow.data.shards import sync
from latteflow.errors import UserError
from latteflow.evaluate.moments import Normal, check_finite

PICTURES = "arr_0"
_AGES_AGO = (1980, 1, 1, 0, 0, 0)  # a fixed date: the same pictures are the same bytes


def write_pictures(file: Path, chunks: Iterable[torch.Tensor], number: int) -> None:
    """Write pictures as ``arr_0``, a chunk at a time, so that 50,000 of them need no memory; whole or not at all.

    Args:
        file: ends in ``.npz``.
        chunks: uint8 (some, 3, height, width), all of one size.
        number: of pictures in all.

    Raises:
        UserError: chunks are of different sizes or another kind, or hold another number of pictures.
        OSError: the file cannot be written.
    """
    with _whole_or_not(file) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{PICTURES}.npy", _AGES_AGO), "w", force_zip64=True) as array:
            written, shape = 0, None
            for chunk in chunks:
                rows = _rows(chunk)
                if shape is None:
                    shape = rows.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}
                    np.lib.format.write_array_header_1_0(array, header)
                if rows.shape[1:] != shape:
                    raise UserError(f"pictures of {rows.shape[1:]} among those of {shape}: give all of one size")
                array.write(rows.tobytes())
                written += len(rows)
        if written != number:
            raise UserError(f"{written} pictures were given, and {number} announced: give as many as that")


def read_pictures(file: Path, batch: int = 64) -> Iterator[torch.Tensor]:
    """Yield the pictures of ``arr_0``, uint8 (some, 3, height, width), without holding all of them in memory.

    Raises:
        UserError: there are none, or the array is of another kind.
    """
    with _archive(file) as archive:
        shape = _pictures_shape(file, archive)
        if shape is None:
            raise UserError(f"{file} holds no array {PICTURES}: give one of uint8 (pictures, height, width, 3)")
        number, *size = shape
        with archive.open(f"{PICTURES}.npy") as array:
            _header(array)
            for start in range(0, number, batch):
                rows = min(batch, number - start)
                data = bytearray(array.read(rows * int(np.prod(size))))
                if len(data) != rows * int(np.prod(size)):
                    raise UserError(f"{file} is cut short: copy or draw it again")
                yield torch.frombuffer(data, dtype=torch.uint8).reshape(rows, *size).permute(0, 3, 1, 2)


def pictures_shape(file: Path) -> tuple[int, int, int, int] | None:
    """Return ``arr_0``'s shape, (pictures, height, width, 3), without reading it; None where there is none.

    Raises:
        UserError: no such file, or an array of another kind.
    """
    with _archive(file) as archive:
        return _pictures_shape(file, archive)


def write_statistics(file: Path, pooled: Normal, spatial: Normal | None, about: Mapping[str, Any]) -> None:
    """Write ``mu``, ``sigma`` and ``n``, and ``mu_s`` and ``sigma_s`` where there are spatial features.

    Args:
        file: ends in ``.npz``.
        pooled: of the network's features.
        spatial: of its spatial features, None where it has none.
        about: further values, numbers or text, an array each.
    """
    arrays: dict[str, Any] = {"mu": pooled.mean.numpy(), "sigma": pooled.covariance.numpy(), **about}
    if pooled.number is not None:
        arrays["n"] = pooled.number
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    with _whole_or_not(file) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, value in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(value), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _AGES_AGO), content.getvalue())


def read_statistics(file: Path) -> tuple[Normal, Normal | None, dict[str, Any]] | None:
    """Return a file's statistics, those of spatial features, and further values; None where there is no ``mu``.

    Raises:
        UserError: no such file, statistics of shapes that do not go together, of too few pictures, or not finite.
    """
    with _archive(file) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if "mu" not in names:
            return None
        arrays = {name: _array(file, archive, name) for name in names - {PICTURES}}
    number = int(arrays.pop("n")) if "n" in arrays else None
    pooled = _normal(file, arrays.pop("mu"), arrays.pop("sigma", None), number)
    spatial = _normal(file, arrays.pop("mu_s"), arrays.pop("sigma_s", None), number) if "mu_s" in arrays else None
    return pooled, spatial, {name: value.item() for name, value in arrays.items() if value.ndim == 0}


def _normal(file: Path, mean: np.ndarray, covariance: np.ndarray | None, number: int | None) -> Normal:
    if covariance is None or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shape = "missing" if covariance is None else covariance.shape
        raise UserError(f"{file} holds mu of {mean.shape} and sigma of {shape}: give (values,) and (values, values)")
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"{file} holds mu of {mean.dtype} and sigma of {covariance.dtype}: give floating point numbers")
    if number is not None and number <= len(mean):
        raise UserError(f"{file} holds a covariance of {len(mean)} features of {number} pictures: measure more of them")
    normal = Normal(torch.from_numpy(mean.astype("f8")), torch.from_numpy(covariance.astype("f8")), number)
    check_finite(normal.mean)
    check_finite(normal.covariance)
    return normal


def _rows(chunk: torch.Tensor) -> np.ndarray:
    if chunk.dtype != torch.uint8 or chunk.ndim != 4 or chunk.shape[1] != 3:
        raise UserError(f"pictures are {chunk.dtype} {tuple(chunk.shape)}: give uint8 (number, 3, height, width)")
    return chunk.permute(0, 2, 3, 1).contiguous().numpy()


@contextmanager
def _archive(file: Path) -> Iterator[zipfile.ZipFile]:
    if not file.is_file():
        raise UserError(f"no file {file}: give an .npz of pictures (arr_0) or of statistics (mu, sigma)")
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file} is no whole .npz file: copy or make it again") from error


def _array(file: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as content:
            return np.lib.format.read_array(content, allow_pickle=False)
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} holds {name} in a form that is not read: give plain arrays") from error


def _header(array: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(array)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(array)


def _pictures_shape(file: Path, archive: zipfile.ZipFile) -> tuple[int, int, int, int] | None:
    if f"{PICTURES}.npy" not in archive.namelist():
        return None
    with archive.open(f"{PICTURES}.npy") as array:
        shape, by_columns, dtype = _header(array)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_columns or 0 in shape:
        raise UserError(f"{file} holds {PICTURES} of {dtype} {shape}: give uint8 (pictures, height, width, 3)")
    return shape[0], shape[1], shape[2], shape[3]


@contextmanager
def _whole_or_not(file: Path) -> Iterator[Path]:
    """Yield the name of a partial file, which takes the right name once it is on the disk."""
    if file.suffix != ".npz":
        raise UserError(f"{file} has to end in .npz")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)
