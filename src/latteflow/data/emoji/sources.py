"""Where the pictures and names come from: npm packages, pinned, fetched by ``npm pack`` and read in place.

Nothing is ever unpacked: members are read straight out of the ``.tgz`` files, so a member's name can never decide where
something is written.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latteflow.errors import UserError

_CHUNK = 1 << 20
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{} {} {} {}">{}</svg>'
)


@dataclass(frozen=True)
class Source:
    """One npm package of a fixed version, and what must be said when its content is passed on."""

    package: str
    version: str
    licence: str
    attribution: str
    gives: str

    @property
    def spec(self) -> str:
        """``name@version``, as npm takes it."""
        return f"{self.package}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name ``npm pack`` gives the archive."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


OPENMOJI = Source(
    "openmoji",
    "17.0.0",
    "CC-BY-SA-4.0",
    "All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org), rendered at 64 pixels",
    "pictures of the style 'openmoji'; annotations, tags",
)
GOOGLE = Source(
    "emoji-datasource-google",
    "16.0.0",
    "Apache-2.0 (pictures), MIT (data)",
    "Noto Emoji, copyright Google LLC; packaged by Cal Henderson (emoji-data)",
    "pictures of the style 'noto'; names, short names",
)
TWITTER = Source(
    "emoji-datasource-twitter",
    "16.0.0",
    "CC-BY-4.0 (pictures), MIT (data)",
    "Twemoji, copyright Twitter, Inc. and other contributors; packaged by Cal Henderson (emoji-data)",
    "pictures of the style 'twemoji'",
)
FLUENT_3D = Source(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "MIT",
    "Fluent Emoji, copyright Microsoft Corporation; packaged by LobeHub",
    "pictures of the style 'fluent 3d'",
)
FLUENT = Source(
    "fluentui-emoji",
    "1.3.0",
    "MIT",
    "Fluent Emoji, copyright Microsoft Corporation; packaged by Mohammad Abu Mattar",
    "pictures of the styles 'fluent flat' and 'fluent modern'",
)
EMOJIBASE = Source(
    "emojibase-data",
    "17.0.0",
    "MIT",
    "Emojibase, copyright Miles Johnson; names and tags from Unicode CLDR",
    "labels, tags, groups, skin tone sequences",
)
NOTO_BLOB = Source(
    "@iconify-json/noto-v1",
    "1.2.5",
    "Apache-2.0",
    "Noto Emoji before 2017, copyright Google LLC; packaged by Iconify",
    "pictures of the extra style 'noto blob'",
)
EMOJIONE_2 = Source(
    "@iconify-json/emojione",
    "1.2.3",
    "CC-BY-4.0",
    "EmojiOne 2.3, kept as EmojiTwo; packaged by Iconify",
    "pictures of the extra style 'emojione 2'",
)
EMOJIONE_1 = Source(
    "@iconify-json/emojione-v1",
    "1.2.3",
    "CC-BY-SA-4.0",
    "EmojiOne 1.5 (emojione-legacy); packaged by Iconify",
    "pictures of the extra style 'emojione 1'",
)
FXEMOJI = Source(
    "@iconify-json/fxemoji",
    "1.2.2",
    "Apache-2.0",
    "FxEmojis, copyright Mozilla Foundation; packaged by Iconify",
    "pictures of the extra style 'firefox os'",
)
SOURCES: tuple[Source, ...] = (
    OPENMOJI,
    GOOGLE,
    TWITTER,
    FLUENT_3D,
    FLUENT,
    EMOJIBASE,
    NOTO_BLOB,
    EMOJIONE_2,
    EMOJIONE_1,
    FXEMOJI,
)


def default_cache() -> Path:
    """The folder archives are kept in when the user names none: the user's cache folder, ``latteflow/npm`` in it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "latteflow" / "npm"


def fetch(source: Source, cache: Path) -> Path:
    """The whole, checked archive of ``source`` in ``cache``, packed by npm if it is not there yet.

    The archive is packed into a temporary folder and then renamed, so a half-written file is never taken for one.

    Raises:
        UserError: npm is missing or failed, or an archive is damaged.
    """
    target = cache / source.file_name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".packing-") as packing:
            packed = _npm_pack(source, Path(packing))
            os.replace(packed, target)
    check_archive(target)
    return target


def _npm_pack(source: Source, destination: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm was not found, and {source.spec} must be fetched with it: install Node.js (npm comes with it), "
            f"or put {source.file_name} into the folder given by --cache"
        )
    done = subprocess.run(
        [npm, "pack", source.spec, "--ignore-scripts", "--pack-destination", str(destination)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    packed = destination / source.file_name
    if done.returncode != 0 or not packed.exists():
        raise UserError(f"npm could not fetch {source.spec}: {_last_error(done.stderr) or 'it wrote no archive'}")
    return packed


def _last_error(stderr: str) -> str:
    """The last line that says what went wrong (npm's very last one only names its log file)."""
    lines = [line.strip() for line in stderr.splitlines() if line.lower().startswith("npm err")]
    lines = [line for line in lines if "complete log" not in line and not line.endswith((".log", "error", "ERR!"))]
    if lines:
        return lines[-1]
    return next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")


def check_archive(path: Path) -> None:
    """Read ``path`` to its end, which checks gzip's length and checksum.

    Raises:
        UserError: the file is cut short or damaged; the message names it and the remedy.
    """
    try:
        with gzip.open(path) as stream:
            while stream.read(_CHUNK):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): delete it and run the command again") from error


def members(path: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """The files right inside ``folder`` whose names end in ``suffix``: (file name, content), in archive order.

    ``folder`` is relative to the package root (npm's ``package/`` is left off) and ends in no slash.
    """
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            inner = member.name.partition("/")[2]
            parent, _, name = inner.rpartition("/")
            if not member.isfile() or parent != folder or not name.endswith(suffix):
                continue
            stream = archive.extractfile(member)
            if stream is not None:
                yield name, stream.read()


def icons(path: Path, inner: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """The pictures of an Iconify set: (icon name + ``suffix``, SVG), icons and their plain aliases, in order of names.

    An alias that turns or mirrors its icon is left out.

    Raises:
        UserError: the archive has no ``inner``, or that is not such a set.
    """
    try:
        found = json.loads(read_member(path, inner))
        drawn = dict(found["icons"])
        for name, alias in found.get("aliases", {}).items():
            if set(alias) == {"parent"} and alias["parent"] in drawn:
                drawn.setdefault(name, drawn[alias["parent"]])
        for name in sorted(drawn):
            left, top, width, height = (
                drawn[name].get(key, found.get(key, default))
                for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            yield f"{name}{suffix}", _SVG.format(left, top, width, height, drawn[name]["body"]).encode()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{inner} of {path} is no set of icons ({error}): delete the archive and run again") from error


def read_member(path: Path, inner: str) -> bytes:
    """The content of the one file ``inner`` (relative to the package root).

    Raises:
        UserError: the archive has no such file, so it is not the package it is named after.
    """
    folder, _, name = inner.rpartition("/")
    for found, content in members(path, folder, name):
        if found == name:
            return content
    raise UserError(f"{path} holds no {inner}, so it is not the package it is named after: delete it and run again")
