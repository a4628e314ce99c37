"""Along a sampling path nothing is computed twice, and what is kept gives what would be computed anew."""

from collections import Counter

import pytest
import torch

from latteflow.models.context import compute_context
from latteflow.models.sampling_cache import SamplingCache
from toys import seeded, toy_transformer

TIMES = [step / 8 for step in range(8)]
CLOSE = {"rtol": 0, "atol": 1e-5}
"""Between one product for all times and one a time; float32."""


@pytest.fixture(scope="module")
def context(backbone, tokenizer):
    batch = tokenizer(["a red circle", "no"], return_tensors="pt", padding=True, padding_side="right")
    return compute_context(backbone, batch["input_ids"], batch["attention_mask"])


def noise(height=4, width=4):
    return torch.randn(2, 4, height, width, generator=seeded(7))


def calls_of(modules):
    """A counter of calls of each module, by its number."""
    counter = Counter()
    for number, module in enumerate(modules):
        module.register_forward_hook(lambda *_, number=number: counter.update([number]))
    return counter


@pytest.mark.parametrize("mode", ["probs", "logits", "none"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shared_io", [True, False])
@pytest.mark.parametrize("pooled", [None, 8])
@torch.no_grad()
def test_the_velocity_is_that_of_a_call_without(backbone, context, groups, mode, shared_io, pooled):
    replica = toy_transformer(backbone, groups, residual_attention=mode, shared_io=shared_io, pooled_context=pooled)
    cache = SamplingCache(TIMES)
    for t in TIMES:
        cached = replica(noise(), t, context, cache)
        torch.testing.assert_close(cached, replica(noise(), torch.tensor([t, t]), context), **CLOSE)
        torch.testing.assert_close(cached, replica(noise(), t, context), **CLOSE)
        assert not torch.allclose(cached, replica(noise(), t / 2 + 0.01, context), atol=1e-3)


@torch.no_grad()
def test_what_t_and_the_prompt_do_is_computed_once_a_group_and_layer(backbone, context):
    replica = toy_transformer(backbone, 2, pooled_context=8)
    prompts = calls_of([layer.pooled for layer in replica.layers])
    modulations = calls_of([layer.modulation for layer in replica.layers])
    gates = calls_of([layer.gate for layer in replica.layers if layer.gate is not None])
    others = calls_of([replica.io[0].time_embedding, replica.io[0].out_modulation, replica.io[0].patch_embedding.place])
    cache = SamplingCache(TIMES)
    for t in TIMES:
        replica(noise(), t, context, cache)
    assert modulations == dict.fromkeys(range(4), 1)
    assert prompts == dict.fromkeys(range(4), 1)
    assert gates == dict.fromkeys(range(2), 1)
    assert others == {0: 2, 1: 2, 2: 2}  # once a group
    replica(noise(), 0.3, context, cache)  # a time that was not foreseen
    assert modulations == {0: 2, 1: 2, 2: 1, 3: 1}
    assert prompts == dict.fromkeys(range(4), 1)


@torch.no_grad()
def test_another_context_or_grid_is_told_from_the_first(backbone, context):
    replica = toy_transformer(backbone, 2)
    cache, other = SamplingCache(TIMES), context.select(torch.tensor([1, 0]))
    for given in (context, other, context):
        for x_t in (noise(), noise(2, 8), noise(8, 2)):
            expected = replica(x_t, 0.5, given)
            torch.testing.assert_close(replica(x_t, 0.5, given, cache), expected, **CLOSE)


@torch.no_grad()
def test_contexts_that_are_gone_are_not_mistaken(backbone, context):
    """A context's id is free for another as soon as it is forgotten."""
    replica, cache = toy_transformer(backbone, 1), SamplingCache(TIMES)
    for row in (0, 1) * 8:
        given = context.select(torch.tensor([row]))
        torch.testing.assert_close(replica(noise()[:1], 0.5, given, cache), replica(noise()[:1], 0.5, given), **CLOSE)


@torch.no_grad()
def test_a_time_of_many_does_what_it_does_alone(backbone):
    replica = toy_transformer(backbone, 2)
    many, alone = SamplingCache(TIMES), SamplingCache([])
    for t in TIMES:
        group = replica.group_of(t)
        one, other = (cache.moment(replica, group, t, torch.device("cpu")) for cache in (many, alone))
        for a, b in zip((*one.layers[1], *one.out), (*other.layers[1], *other.out), strict=True):
            assert a.shape == b.shape
            assert len(a) == 1
            torch.testing.assert_close(a, b, **CLOSE)
