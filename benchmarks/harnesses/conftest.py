"""What the contract tests stand on: no network, one thread, and a torchvision that can be imported.

A build of torchvision for CUDA beside a CPU build of torch stops at its first import, because its compiled operators
are not there. The harnesses import it for other models than ours; no operator of it is called here. So where it stops
for that reason, the two operators that it looks for are declared, without a body.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


def declare_missing_operators() -> torch.library.Library | None:
    """Make torchvision importable; return what has to be kept, or nothing where it was importable."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_LIBRARY = declare_missing_operators()


@pytest.fixture(autouse=True)
def _gradients_as_they_were() -> Iterator[None]:
    """VLMEvalKit turns gradients off, for everyone, when it is imported."""
    were = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(were)
