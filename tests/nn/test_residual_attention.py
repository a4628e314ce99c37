"""Residual attention against the equation written out, and its closed gate against plain attention."""

import pytest
import torch
from torch.nn import functional

from latteflow.nn.residual_attention import ResidualGate, attend
from toys import seeded, shake

BATCH, HEADS, KV_HEADS, WORDS, IMAGE, WIDTH = 2, 4, 2, 5, 6, 8


def layer_inputs(number, dtype=torch.float32):
    draw = seeded(number)
    query = torch.randn(BATCH, HEADS, IMAGE, WIDTH, generator=draw)
    key, value = torch.randn(2, BATCH, KV_HEADS, WORDS + IMAGE, WIDTH, generator=draw)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def padding_mask():
    """The second prompt has two words less."""
    words = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    return torch.cat([words, torch.ones(BATCH, IMAGE, dtype=torch.bool)], dim=1)[:, None, None]


def gates(seed):
    return torch.tanh(torch.randn(BATCH, HEADS, 1, 1, generator=seeded(seed)))


def run(mode, mask, open_gates):
    """Three layers of one group; returns their outputs and maps."""
    outputs, maps, carried = [], [], None
    for number in range(3):
        gate = None if number == 0 else gates(10 + number) * open_gates
        out, carried = attend(
            *layer_inputs(number),
            image_tokens=IMAGE,
            mask=mask,
            mode=mode,
            gate=gate,
            previous_map=carried,
        )
        outputs.append(out)
        maps.append(carried)
    return outputs, maps


def reference(mode, mask):
    """The same, sample by sample, head by head, query by query, in float64."""
    outputs, maps = [], []
    previous = torch.zeros(BATCH, HEADS, IMAGE, IMAGE, dtype=torch.float64)
    for number in range(3):
        query, key, value = layer_inputs(number, torch.float64)
        out = torch.zeros(BATCH, HEADS, IMAGE, WIDTH, dtype=torch.float64)
        accumulated = torch.zeros_like(previous)
        for b in range(BATCH):
            for h in range(HEADS):
                g = 0.0 if number == 0 else gates(10 + number)[b, h].double().item()
                keys, values = key[b, h // 2], value[b, h // 2]
                for i in range(IMAGE):
                    scores = torch.stack([(query[b, h, i] * k).sum() for k in keys]) / WIDTH**0.5
                    if mode == "logits":
                        scores[WORDS:] += g * previous[b, h, i]
                        accumulated[b, h, i] = scores[WORDS:]
                    if mask is not None:
                        scores[~mask[b, 0, 0]] = -torch.inf
                    weights = scores.exp() / scores.exp().sum()
                    if mode == "probs":
                        weights[WORDS:] += g * previous[b, h, i]
                        accumulated[b, h, i] = weights[WORDS:]
                    out[b, h, i] = weights @ values
        outputs.append(out)
        maps.append(accumulated)
        previous = accumulated
    return outputs, maps


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_equals_the_equation_written_out(mode, masked):
    mask = padding_mask() if masked else None
    outputs, maps = run(mode, mask, open_gates=1.0)
    expected_outputs, expected_maps = reference(mode, mask)
    for number in range(3):
        torch.testing.assert_close(outputs[number].double(), expected_outputs[number], rtol=0, atol=2e-6)
        torch.testing.assert_close(maps[number].double(), expected_maps[number], rtol=0, atol=2e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["none", "probs", "logits"])
def test_a_closed_gate_is_plain_attention(mode, masked):
    mask = padding_mask() if masked else None
    outputs, _ = run(mode, mask, open_gates=0.0)
    for number in range(3):
        query, key, value = layer_inputs(number)
        plain = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(outputs[number], plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_an_open_gate_matters(mode):
    opened, closed = run(mode, None, 1.0)[0], run(mode, None, 0.0)[0]
    assert torch.equal(opened[0], closed[0])
    assert (opened[1] - closed[1]).abs().max() > 0.05
    assert (opened[2] - closed[2]).abs().max() > 0.05


def test_probs_leave_the_words_share_untouched():
    """With image values of zero only the words' block of the map shows in the output."""
    query, key, value = layer_inputs(1)
    value[:, :, WORDS:] = 0
    previous = torch.rand(BATCH, HEADS, IMAGE, IMAGE, generator=seeded(3))
    kept = {"image_tokens": IMAGE, "mask": None, "mode": "probs"}
    out, _ = attend(query, key, value, gate=gates(1), previous_map=previous, **kept)
    plain, plain_map = attend(query, key, value, gate=None, previous_map=None, **kept)
    assert torch.equal(out, plain)
    assert (plain_map.sum(-1) < 1).all()  # normalised over words and latents together
    ones = torch.ones_like(value)
    whole, _ = attend(query, key, ones, gate=None, previous_map=None, **kept)
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_none_carries_no_map():
    assert run("none", None, 1.0)[1] == [None, None, None]


def test_the_gate_starts_closed_knows_the_time_and_stays_below_one():
    gate = ResidualGate(16, HEADS)
    time = 5 * torch.randn(7, 16, generator=seeded())
    with torch.no_grad():
        gate.project.weight.zero_()
        gate.project.bias.zero_()
    assert torch.equal(gate(time), torch.zeros(7, HEADS, 1, 1))
    shake(gate, seeded(1), 0.5)
    opened = gate(time).flatten(1)
    expected = torch.tanh(functional.linear(functional.silu(time), gate.project.weight, gate.project.bias))
    assert torch.equal(opened, expected)
    assert opened.abs().max() <= 1
    assert opened.std(0).min() > 0.01  # differs between times
    assert opened.std(1).min() > 0.01  # differs between heads
