"""The dtype and the threads that a model is served with, where nobody names them."""

import pytest
import torch

from latteflow.serve.loading import fastest_dtype, fastest_threads

NATIVE = {"avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize(
    ("model", "device", "capabilities", "dtype"),
    [
        ("emoji-64", None, NATIVE, "bfloat16"),
        ("emoji-64", "cpu", {"amx_bf16": True}, "bfloat16"),
        ("emoji-64", "cpu", {"avx512_bf16": False}, None),
        ("some/folder", "cpu", NATIVE, None),
    ],
)
def test_bfloat16_where_it_is_native_and_measured(model, device, capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastest_dtype(model, device) == dtype


def test_small_forwards_are_not_shared_by_threads():
    assert fastest_threads("emoji-64") == 1
    assert fastest_threads("some/folder") is None
