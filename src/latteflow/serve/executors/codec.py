"""What router and stages say to each other, as bytes: a JSON header, then tensors as safetensors. Never pickle.

A packet is the header's length (four bytes, little-endian), the header, and a safetensors file. What may be said is
listed here; all else is a ``CodecError``. Reading a packet runs no code that the packet names, and takes no more memory
than a few times its length.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from latteflow.models.context import Context

MOST_BYTES = 1 << 30
"""Of a packet: contexts are the largest, a few MB for a long conversation of a 2B backbone."""

_MOST_HEADER_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

Tensors: TypeAlias = Mapping[str, torch.Tensor]


class CodecError(Exception):
    """Bytes that are not a packet."""


class _Kind(NamedTuple):
    dimensions: int
    dtypes: frozenset[str]
    required: bool = False


_LATENTS = _Kind(4, frozenset({"F32"}))
_CONTEXT = {
    "keys": _Kind(5, _FLOATS),
    "values": _Kind(5, _FLOATS),
    "mask": _Kind(2, frozenset({"BOOL"})),
    "next_position": _Kind(1, frozenset({"I64"})),
}

Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=64)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=1_000_000)]
Time: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Seconds: TypeAlias = Annotated[float, Field(ge=0)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    tensors: ClassVar[Mapping[str, _Kind]] = {}
    """What may come with it; what is required has to."""


class Admit(_Message):
    """To a stage: a picture will come, in these settings. With its contexts: this stage's layers of them."""

    kind: Literal["admit"] = "admit"
    id: Id
    num_inference_steps: Annotated[int, Field(ge=1, le=1_000_000)]
    guidance: tuple[float, float, float]
    """Scale, and first and last t that are guided."""
    preview_every: Count
    first_layer: Count
    """That the contexts begin with."""
    tensors = {
        **{f"conditional.{name}": kind._replace(required=True) for name, kind in _CONTEXT.items()},
        **{f"unconditional.{name}": kind for name, kind in _CONTEXT.items()},
    }


class Enter(_Message):
    """To a stage: an admitted picture is here, ``step`` network calls are made. With its latents, ``x_t``."""

    kind: Literal["enter"] = "enter"
    id: Id
    step: Count
    tensors = {"x_t": _LATENTS._replace(required=True)}


class Leave(_Message):
    """To a stage: a picture was given up."""

    kind: Literal["leave"] = "leave"
    id: Id


class Measure(_Message):
    """To a stage without pictures: find out what a forward costs; the answer is ``Measured``."""

    kind: Literal["measure"] = "measure"


class Ready(_Message):
    """From a stage: its weights are loaded."""

    kind: Literal["ready"] = "ready"


class Refusal(_Message):
    """From a stage, its last word: why it cannot be, in a sentence for the user."""

    kind: Literal["refusal"] = "refusal"
    message: Annotated[str, Field(max_length=4096)]


class Beat(_Message):
    """From a stage that has nothing to do: it is alive."""

    kind: Literal["beat"] = "beat"


class Measured(_Message):
    """From a stage: a forward of b pictures takes ``fixed + each * b`` seconds."""

    kind: Literal["measured"] = "measured"
    fixed: Seconds
    each: Seconds


class Moved(_Message):
    """From a stage: a picture made a step; ``executor.Stepped`` says what the fields are.

    With ``clean`` where a preview is due, and ``x_t`` where the picture leaves the stage.
    """

    kind: Literal["moved"] = "moved"
    id: Id
    step: Count
    t: Time
    seconds: Seconds
    batch: Count
    tensors = {"clean": _LATENTS, "x_t": _LATENTS}


class Dropped(_Message):
    """From a stage: a picture that memory does not suffice for, with a sentence for who asked for it."""

    kind: Literal["dropped"] = "dropped"
    id: Id
    message: Annotated[str, Field(max_length=4096)]


Message: TypeAlias = Admit | Enter | Leave | Measure | Ready | Refusal | Beat | Measured | Moved | Dropped
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


class Packet(NamedTuple):
    """A message, and the tensors that come with it."""

    message: Message
    tensors: Tensors = MappingProxyType({})


def encode(packet: Packet) -> bytes:
    """Return a packet as bytes.

    Raises:
        CodecError: it is too large.
    """
    header = packet.message.model_dump_json().encode()
    # Cloned, because safetensors refuses tensors that share memory, as the halves of a guided picture may.
    tensors = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in packet.tensors.items()
    }
    data = _LENGTH.pack(len(header)) + header + save(tensors)
    if len(data) > MOST_BYTES:
        raise CodecError(f"a packet of {len(data)} bytes, at most {MOST_BYTES}")
    return data


def decode(data: bytes) -> Packet:
    """Return the packet that bytes are; its tensors are in CPU memory of their own.

    Raises:
        CodecError: they are none.
    """
    if not _LENGTH.size <= len(data) <= MOST_BYTES:
        raise CodecError(f"a packet of {len(data)} bytes")
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    if length > _MOST_HEADER_BYTES or end > len(data):
        raise CodecError(f"a header of {length} bytes")
    try:
        message = _ADAPTER.validate_json(data[_LENGTH.size : end])
        found = deserialize(data[end:])
    except (ValidationError, SafetensorError) as error:
        raise CodecError(f"not a packet: {type(error).__name__}") from error
    tensors = {name: _tensor(message, name, **described) for name, described in found}
    missing = [name for name, kind in message.tensors.items() if kind.required and name not in tensors]
    if missing:
        raise CodecError(f"{message.kind} without {', '.join(missing)}")
    return Packet(message, tensors)


def _tensor(message: Message, name: str, dtype: str, shape: list[int], data: bytearray) -> torch.Tensor:
    kind = message.tensors.get(name)
    if kind is None or len(shape) != kind.dimensions or dtype not in kind.dtypes or not data:
        raise CodecError(f"{message.kind} with a tensor {name[:64]!r} of {dtype} {shape[:8]}")
    if dtype == "BOOL":  # a byte that is neither 0 nor 1 would be a bool that is neither
        return torch.frombuffer(data, dtype=torch.uint8).reshape(shape) != 0
    return torch.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)


def context_tensors(name: str, context: Context | None) -> dict[str, torch.Tensor]:
    """Return a context's tensors under the names that ``Admit`` has for them; of None, none."""
    return {} if context is None else {f"{name}.{part}": getattr(context, part) for part in _CONTEXT}


def context_of(name: str, tensors: Tensors, first_layer: int) -> Context | None:
    """Return the context that ``context_tensors`` took apart; None where there is none of that name.

    Raises:
        CodecError: it is not whole, or its tensors do not fit each other.
    """
    parts = {part: tensors[f"{name}.{part}"] for part in _CONTEXT if f"{name}.{part}" in tensors}
    if not parts:
        return None
    if len(parts) < len(_CONTEXT):
        raise CodecError(f"half a context: {name}")
    context = Context(**parts, first_layer=first_layer)
    shape = context.keys.shape
    if (
        context.values.shape != shape
        or context.mask.shape != (shape[0], shape[3])
        or context.next_position.shape != shape[:1]
    ):
        raise CodecError(f"a context whose parts do not fit: {name}")
    return context
