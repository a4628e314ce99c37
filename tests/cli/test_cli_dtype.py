"""The dtype that a model is served in, where nobody names one."""

import pytest
import torch

from latteflow.serve.loading import fastest_dtype

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
