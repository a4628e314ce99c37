"""Small sets of captioned pictures as users have them, and files that are no pictures."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from latteflow.data.sources.source import BadSample, Sample


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A picture of noise: no two are the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header says this size; its pixels are another matter."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


PNG, JPEG = encoded(picture(0, 200, 150)), encoded(picture(0, 200, 150), "JPEG")
BROKEN = {
    "empty.png": b"",
    "text.png": b"this is no picture\n",
    "cut.png": PNG[: len(PNG) // 2],
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "headless.jpg": JPEG[:20],
    "flipped.png": PNG[:60] + bytes(byte ^ 0x55 for byte in PNG[60:400]) + PNG[400:],
    "bomb.png": png_of_size(60_000, 60_000),
    "large.png": png_of_size(11_000, 9_000),
    "nothing.png": png_of_size(0, 10),
    "line.png": encoded(Image.new("RGB", (900, 100))),
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
}
"""Files that must not get through, by the names they go under; and none may take more than a moment."""


class ListSource:
    """A source whose samples are handed to it: pictures by name, None for a bad one."""

    def __init__(self, samples: dict[str, Image.Image | None], caption=lambda name: f"picture {name}") -> None:
        self.samples, self.caption = samples, caption
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return list(self.samples)[index]

    def read(self, index: int) -> Sample:
        self.reads.append(index)
        name = self.name(index)
        if self.samples[name] is None:
            raise BadSample("broken on purpose")
        return Sample(self.samples[name], self.caption(name))


def write_image_folder(folder: Path, classes: dict[str, int]) -> Path:
    """Write so many pictures of each class."""
    for number, (name, pictures) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(pictures):
            (folder / name / f"{i:03d}.png").write_bytes(encoded(picture(100 * number + i)))
    return folder


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    """Write a shard as the webdataset library's TarWriter does: a stream, fractional times, files read-only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode, info.uname, info.gname = (
                len(data),
                1.5e9 + 0.25,
                0o444,
                "bigdata",
                "bigdata",
            )
            tar.addfile(info, io.BytesIO(data))
    return file


def write_webdataset(folder: Path, shards: int = 2, samples: int = 3) -> Path:
    """Write shards of pictures with captions in turns as txt and json."""
    for shard in range(shards):
        members = {}
        for i in range(samples):
            number = shard * samples + i
            members[f"{number:04d}.png"] = encoded(picture(number))
            caption = f"picture {number}"
            if number % 2:
                members[f"{number:04d}.json"] = json.dumps({"caption": caption, "id": number}).encode()
            else:
                members[f"{number:04d}.txt"] = f"{caption}\n".encode()
        write_tar(folder / f"train-{shard:02d}.tar", members)
    return folder


def write_parquet(file: Path, columns: dict[str, list]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file)
    return file


def same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures are equal in mode, size and every pixel."""
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
