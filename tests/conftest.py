"""What every test stands on: one thread, one seed, no network, and toys built once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import toys

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return toys.toy_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return toys.toy_processor(tokenizer)


@pytest.fixture(scope="session")
def backbone(tokenizer):
    """Four frozen layers; tests only read it."""
    return toys.toy_backbone(tokenizer)


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory):
    """Folder of the toy captioned set."""
    return toys.write_toy_set(tmp_path_factory.mktemp("toy-set"))


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    """Folder of a saved toy pipeline; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("toy-model")
    toys.toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folder with the frozen parts of the generator stage."""
    return toys.save_parts(tmp_path_factory.mktemp("parts"))
