"""What router and stages say: it comes back as it was, and whatever else comes is one kind of error."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latteflow.models.context import Context
from latteflow.serve.executors.codec import (
    Admit,
    Beat,
    CodecError,
    Dropped,
    Enter,
    Leave,
    Measure,
    Measured,
    Moved,
    Packet,
    Ready,
    Refusal,
    context_of,
    context_tensors,
    decode,
    encode,
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
sizes = st.integers(1, 4)
seconds = st.floats(0, 1e9)
ids = st.text(min_size=1, max_size=64)
counts = st.integers(0, 1_000_000)


@st.composite
def latents(draw):
    shape = draw(st.tuples(st.just(1), sizes, sizes, sizes))
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(counts)))


@st.composite
def contexts(draw, name):
    layers, heads, words, width = (draw(sizes) for _ in range(4))
    keys = torch.randn(1, layers, heads, words, width).to(draw(st.sampled_from(FLOATS)))
    mask = torch.arange(words)[None] < draw(sizes)
    return context_tensors(name, Context(keys, -keys, mask, torch.tensor([draw(counts)])))


@st.composite
def admissions(draw):
    message = Admit(
        id=draw(ids),
        num_inference_steps=draw(st.integers(1, 1000)),
        guidance=draw(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3)),
        preview_every=draw(counts),
        first_layer=draw(counts),
    )
    tensors = draw(contexts("conditional"))
    return Packet(message, tensors | (draw(contexts("unconditional")) if draw(st.booleans()) else {}))


@st.composite
def moves(draw):
    t = draw(st.floats(0, 1))
    message = Moved(id=draw(ids), step=draw(counts), t=t, seconds=draw(seconds), batch=draw(counts))
    return Packet(message, {name: draw(latents()) for name in ("clean", "x_t") if draw(st.booleans())})


packets = st.one_of(
    admissions(),
    moves(),
    st.builds(lambda id, step, x_t: Packet(Enter(id=id, step=step), {"x_t": x_t}), ids, counts, latents()),
    st.builds(lambda id: Packet(Leave(id=id)), ids),
    st.builds(lambda id, message: Packet(Dropped(id=id, message=message)), ids, st.text(max_size=99)),
    st.builds(lambda message: Packet(Refusal(message=message)), st.text(max_size=99)),
    st.builds(lambda fixed, each: Packet(Measured(fixed=fixed, each=each)), seconds, seconds),
    st.sampled_from([Packet(Ready()), Packet(Beat()), Packet(Measure())]),
)


@given(packets)
def test_a_packet_comes_back_as_it_was(packet):
    found = decode(encode(packet))
    assert found.message == packet.message
    assert type(found.message) is type(packet.message)
    assert set(found.tensors) == set(packet.tensors)
    for name, tensor in packet.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_slices_and_one_tensor_twice_can_be_sent():
    keys = torch.randn(1, 4, 2, 3, 8)
    context = Context(keys, keys, torch.ones(1, 3, dtype=torch.bool), torch.tensor([3])).of_layers(range(1, 3))
    tensors = context_tensors("conditional", context) | context_tensors("unconditional", context)
    message = Admit(id="a", num_inference_steps=1, guidance=(4.0, 0.0, 1.0), preview_every=0, first_layer=1)
    found = decode(encode(Packet(message, tensors))).tensors
    for name in ("conditional", "unconditional"):
        again = context_of(name, found, 1)
        assert torch.equal(again.keys, keys[:, 1:3])
        assert again.first_layer == 1


def only_a_codec_error(data):
    with contextlib.suppress(CodecError):
        decode(data)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_packet_or_a_codec_error(data):
    only_a_codec_error(data)


@given(packets, st.data())
def test_a_packet_with_bytes_changed_is_a_packet_or_a_codec_error(packet, data):
    packed = bytearray(encode(packet))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(packed))) if data.draw(st.booleans()) else len(packed)
    only_a_codec_error(bytes(packed[:end]))


words = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["kind", "id", "step", "t", "seconds", "batch", "guidance", "message", "tensors"])
kinds = st.sampled_from(["admit", "enter", "moved", "leave", "ready", "__class__"])
described = st.dictionaries(
    st.sampled_from(["x_t", "clean", "__metadata__", "conditional.mask"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F8_E4M3", "U8", "BOOL", "I64", "pickle"]),
            "shape": st.lists(st.integers(-1, 2**64), max_size=5),
            "data_offsets": st.lists(st.integers(0, 2**64), min_size=2, max_size=2),
        }
    ),
    max_size=2,
)


@given(st.dictionaries(fields, words, max_size=4), kinds, described, st.binary(max_size=64))
def test_any_json_is_a_packet_or_a_codec_error(header, kind, tensors, data):
    header = json.dumps({**header, "kind": kind}).encode()
    tensors = json.dumps(tensors).encode()
    only_a_codec_error(struct.pack("<I", len(header)) + header + struct.pack("<Q", len(tensors)) + tensors + data)


LATENTS = {"x_t": torch.zeros(1, 4, 2, 2)}


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (Enter(id="a", step=1), {}),
        (Enter(id="a", step=1), {"x_t": torch.zeros(4, 2, 2)}),
        (Enter(id="a", step=1), {"x_t": torch.zeros(1, 4, 2, 2, dtype=torch.int64)}),
        (Enter(id="a", step=1), {"x_t": torch.zeros(1, 0, 2, 2)}),
        (Enter(id="a", step=1), {**LATENTS, "more": torch.zeros(1)}),
        (Leave(id="a"), LATENTS),
        (Enter.model_construct(id="", step=1), LATENTS),
        (Enter.model_construct(id="a" * 65, step=1), LATENTS),
        (Enter.model_construct(id="a", step=-1), LATENTS),
        (Moved.model_construct(id="a", step=1, t=1.5, seconds=0.0, batch=1), {}),
        (Moved.model_construct(id="a", step=1, t=float("nan"), seconds=0.0, batch=1), {}),
        (Refusal.model_construct(message="a" * 100_000), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_is_not_on_the_list_is_refused(message, tensors):
    with pytest.raises(CodecError):
        decode(encode(Packet(message, tensors)))


INFINITE = '{"kind": "measured", "fixed": Infinity, "each": 0.0}'


@pytest.mark.parametrize(
    "header",
    [
        '{"kind": "ready", "more": 1}',
        '{"kind": "eval"}',
        "{}",
        "[]",
        "[" * 5000,
        '{"kind": "leave", "id": 1}',
        " " * 70_000 + '{"kind": "ready"}',
        INFINITE,
    ],
)
def test_headers_that_are_not_on_the_list_are_refused(header):
    empty = encode(Packet(Ready()))[4 + len('{"kind":"ready"}') :]
    with pytest.raises(CodecError):
        decode(struct.pack("<I", len(header)) + header.encode() + empty)
    header = '{"kind": "ready"}'
    assert decode(struct.pack("<I", len(header)) + header.encode() + empty).message == Ready()


def test_a_context_has_to_be_whole_and_fit():
    context = Context(torch.zeros(1, 2, 1, 3, 4), torch.zeros(1, 2, 1, 3, 4), torch.ones(1, 3) > 0, torch.tensor([3]))
    tensors = context_tensors("conditional", context)
    assert context_of("unconditional", tensors, 0) is None
    for part in tensors:
        with pytest.raises(CodecError):
            context_of("conditional", {name: tensors[name] for name in tensors if name != part}, 0)
        with pytest.raises(CodecError):
            context_of("conditional", {**tensors, part: torch.cat([tensors[part]] * 2)}, 0)


def test_a_bool_is_zero_or_one():
    context = Context(torch.zeros(1, 1, 1, 2, 1), torch.zeros(1, 1, 1, 2, 1), torch.ones(1, 2) > 0, torch.tensor([2]))
    message = Admit(id="a", num_inference_steps=1, guidance=(1.0, 0.0, 1.0), preview_every=0, first_layer=0)
    packed = encode(Packet(message, context_tensors("conditional", context)))
    assert packed.count(b"\1\1") == 1
    mask = decode(packed.replace(b"\1\1", b"\7\0")).tensors["conditional.mask"]
    assert mask.view(torch.uint8).tolist() == [[1, 0]]
