"""KVzip's head scores (Kim et al. 2025, arXiv 2505.23416): a tensor `[L, K]` that `torch.save` wrote.

A head's score is the largest attention that the repetition of a text pays to any of the head's tokens
(`utils/head_score/*.pt`).
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ProfileError
from headprof.profile.imported_scores import ImportedScores, of_kv_heads
from headprof.profile.published.kv_table import LARGEST_FILE, check_kv_grid, check_numbers, check_size

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

_MEND = "download it again, or save the tensor alone with torch.save"


def kvzip_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """The tensor as scores. Nothing that a pickle could ask for is run.

    Raises:
        ProfileError: the file holds anything but one tensor of numbers from 0 to 1, or another model's.
    """
    import torch

    tensor = _read_tensor(path)
    sizes = tuple(size for size in tensor.shape if size > 1)
    grid = shape.num_layers, shape.num_kv_heads
    if sizes != tuple(size for size in grid if size > 1):
        if tensor.ndim != 2:
            raise ProfileError(
                f"{path} holds a tensor of shape {list(tensor.shape)} where the model's KV heads are {list(grid)}: "
                "choose the model it was made for with --model."
            )
        check_kv_grid(path, tuple(tensor.shape), shape)
    table = tensor.detach().reshape(grid).to(torch.float64)
    check_numbers(path, table, 0, 1)
    return of_kv_heads(table, shape)


def _read_tensor(path: Path) -> Tensor:
    import torch

    check_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ProfileError(f"{path} is no file that torch.save writes, or was cut off: {_MEND}.") from error
    if unpacked > LARGEST_FILE:
        raise ProfileError(f"{path} unpacks to more than {LARGEST_FILE} bytes: give the file of the head scores alone.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, and each says that torch refused what the file asks for
        raise ProfileError(f"{path} holds something other than a plain tensor, or is damaged: {_MEND}.") from error
    plain = type(held) is torch.Tensor and held.layout == torch.strided and held.device.type == "cpu"
    if not plain or not held.dtype.is_floating_point or held.is_quantized:
        raise ProfileError(f"{path} holds something other than one tensor of floating-point numbers: {_MEND}.")
    return held
