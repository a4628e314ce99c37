"""Fake npm packages for the emoji tests: a dozen emoji, drawn by code, in the real packages' layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from latteflow.data.emoji import sources, stages

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
NAMED = {
    "1F34E": "red apple",
    "1F34C": "banana",
    "1F347": "grapes",
    "1F697": "automobile",
    "1F68C": "bus",
    "2764-FE0F": "red heart",
    "1F431": "cat face",
    "1F436": "dog face",
    "1F42D": "mouse face",
    "1F6A8": "police car light",
    "1F9DD": "elf",
}
TONED = {"1F44B": "waving hand", "1F6B5": "person mountain biking"}
GROUPS = {"groups": [{"order": 0, "message": "things & more"}], "subgroups": [{"order": 0, "message": "all sorts"}]}


def picture(number: int, size: int = 64, tone: int = 0) -> Image.Image:
    """A transparent picture of boxes; the number decides where, so that different numbers are no twins."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    cell = size // 8
    for place in range(64):
        if (number * 2654435761 + place * place * 40503 + place * 977 * number) >> 7 & 1:
            x, y = place % 8 * cell, place // 8 * cell
            draw.rectangle(
                (x, y, x + cell - 1, y + cell - 1), fill=(40 * tone, 90 + number % 100, 200 - 30 * tone, 255)
            )
    return image


def svg(number: int, tone: int = 0) -> bytes:
    """The same kind of picture as SVG."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{body(number, tone)}</svg>'.encode()


def body(number: int, tone: int = 0) -> str:
    """What is inside the picture's SVG."""
    boxes = []
    small = picture(number, 8, tone)
    for x in range(8):
        for y in range(8):
            pixel = small.getpixel((x, y))
            assert isinstance(pixel, tuple)
            if pixel[3]:
                boxes.append(f'<rect x="{x}" y="{y}" width="1" height="1" fill="rgb{pixel[:3]}"/>')
    return "".join(boxes)


def encoded(image: Image.Image, kind: str) -> bytes:
    """The picture as PNG or (lossless) WebP bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def codes() -> list[tuple[str, str, str, int]]:
    """All sequences of the fake packages: (hex code, name, skin tone, number of the concept)."""
    found = [(code, name, "", 3 * index + 1) for index, (code, name) in enumerate(NAMED.items())]
    for index, (code, name) in enumerate(TONED.items()):
        number = 100 + 7 * index
        found.append((code, name, "", number))
        found += [(f"{code}-{modifier}", name, tone, number) for modifier, tone in TONES.items()]
    return found


def emojibase() -> list[dict[str, Any]]:
    """What ``en/data.json`` holds, a regional letter (no group) included."""
    entries: list[dict[str, Any]] = [{"label": "regional indicator A", "hexcode": "1F1E6"}]
    for code, name in {**NAMED, **TONED}.items():
        entry: dict[str, Any] = {
            "label": name.title(),
            "hexcode": code,
            "group": 0,
            "subgroup": 0,
            "tags": ["Tag", name],
        }
        if code in TONED:
            entry["skins"] = [{"label": f"{name}: {tone}", "hexcode": f"{code}-{mod}"} for mod, tone in TONES.items()]
        entries.append(entry)
    return entries


def openmoji() -> list[dict[str, Any]]:
    """What ``data/openmoji.json`` holds, one of OpenMoji's own extras included."""
    entries = [
        {"hexcode": code, "group": "things", "annotation": name, "tags": "tag, more", "openmoji_tags": "drawn, "}
        for code, name, _, _ in codes()
    ]
    return [*entries, {"hexcode": "E045", "group": "extras-openmoji", "annotation": "a brand", "tags": ""}]


def icons(number: int) -> bytes:
    """An Iconify set: plain names, one without hyphens, an alias, a turned alias, a toned and a foreign icon."""
    drawn = {name.replace(" ", "-"): {"body": body(number + index)} for index, name in enumerate(NAMED.values())}
    drawn["wavinghand"] = {"body": body(number + 50), "width": 8}
    drawn["waving-hand-dark-skin-tone"] = {"body": body(number + 51, 1)}
    drawn["no-such-icon"] = {"body": body(number + 52)}
    aliases = {
        "person-mountain-biking": {"parent": "no-such-icon"},
        "the-elf": {"parent": "elf", "hFlip": True},
    }
    return json.dumps({"icons": drawn, "aliases": aliases, "width": 8, "height": 8}).encode()


def contents() -> dict[str, dict[str, bytes]]:
    """The files of every package, by package name and path."""
    data = [
        {"unified": code, "name": f"THE {name.upper()}", "short_names": ["a_" + name]} for code, name in NAMED.items()
    ]
    files: dict[str, dict[str, bytes]] = {
        "openmoji": {"data/openmoji.json": json.dumps(openmoji()).encode(), "color/svg/E045.svg": svg(5)},
        "emoji-datasource-google": {"emoji.json": json.dumps(data).encode(), "img/google/sheets/64.png": b"no"},
        "emoji-datasource-twitter": {},
        "@lobehub/fluent-emoji-3d": {},
        "fluentui-emoji": {"icons/flat/no-such-thing.svg": svg(6), "icons/high-contrast/elf.svg": svg(7)},
        "emojibase-data": {
            "en/data.json": json.dumps(emojibase()).encode(),
            "en/messages.json": json.dumps(GROUPS).encode(),
        },
        **{style.source.package: {"icons.json": icons(6000 + 100 * n)} for n, style in enumerate(stages.EXTRA_STYLES)},
    }
    for code, name, tone_name, number in codes():
        tone = list(TONES.values()).index(tone_name) + 1 if tone_name else 0
        low = code.lower()
        toned = any(code.startswith(base) for base in TONED)
        stem = {"elf": "person-elf"}.get(name, name.replace(" ", "-")) + (f"-{tone_name or 'default'}" if toned else "")
        files["openmoji"][f"color/svg/{code}.svg"] = svg(number, tone)
        files["emoji-datasource-google"][f"img/google/64/{low}.png"] = encoded(picture(number + 1000, 64, tone), "PNG")
        files["emoji-datasource-twitter"][f"img/twitter/64/{low}.png"] = encoded(
            picture(number + 2000, 64, tone), "PNG"
        )
        files["@lobehub/fluent-emoji-3d"][f"assets/{low}.webp"] = encoded(picture(number + 3000, 256, tone), "WEBP")
        files["fluentui-emoji"][f"icons/flat/{stem}.svg"] = svg(number + 4000, tone)
        files["fluentui-emoji"][f"icons/modern/{stem}.svg"] = svg(number + 5000, tone)
    return files


def pack(source: sources.Source, folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write the fake archive of ``source`` into ``folder``, as ``npm pack`` would."""
    path = folder / source.file_name
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (contents()[source.package] if files is None else files).items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pack_all(folder: Path) -> Path:
    """Write all fake archives; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources.SOURCES:
        pack(source, folder)
    return folder
