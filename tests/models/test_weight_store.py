"""One group's weights alone, as a process that serves only that group loads them."""

import pytest
import torch

from latteflow.errors import UserError
from latteflow.models.weight_store import transformer_of_group
from toys import toy_pipeline


@pytest.mark.parametrize("shared_io", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_has_its_own_layers_alone(tmp_path, shared_io, dtype):
    pipe = toy_pipeline(2, shared_io=shared_io)
    pipe.save_pretrained(tmp_path)
    expected = pipe.transformer.to(dtype)
    x_t, context = torch.randn(2, 4, 4, 4, dtype=dtype), pipe.encode_prompt(["red", "a blue cross"]).to(dtype)
    for group in range(2):
        replica = transformer_of_group(tmp_path, group, dtype)
        for number, layer in enumerate(replica.layers):
            here = number in replica.layers_of(group)
            assert all(parameter.is_meta != here for parameter in layer.parameters())
        with torch.no_grad():
            found = replica.expert(group, x_t, group / 2, context)
            assert torch.equal(found, expected.expert(group, x_t, group / 2, context))
        assert not replica.training


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="safetensors"):
        transformer_of_group(tmp_path, 0)
