"""The whole build from fake packages: what it writes, taking up again, and every way it can be refused."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import emoji_packages as fake
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latteflow.cli.data import data as data_command
from latteflow.data.emoji import build_emoji, card, render, sources, split, stages
from latteflow.errors import UserError

COLUMNS = [
    "image",
    "concept",
    "label",
    "names",
    "tags",
    "group",
    "subgroup",
    "style",
    "skin_tone",
    "codepoints",
    "twins",
]


def read(out: Path, part: str) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob(f"{part}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.pack_all(tmp_path_factory.mktemp("npm"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("built") / "emoji"
    report = build_emoji(out, cache)
    assert report.built
    assert report.images == {part: len(read(out, part)) for part in ("train", "heldout", "extra")}
    return out


@pytest.fixture(autouse=True)
def no_npm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach for the real npm, even when what it tests goes wrong."""
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)


def test_every_picture_is_64x64_rgb_on_white(built: Path) -> None:
    rows = read(built, "train") + read(built, "heldout")
    assert len(rows) == 6 * len(fake.codes())
    for row in rows:
        assert list(row) == COLUMNS
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")
            assert (255, 255, 255) in {color for _, color in image.getcolors(64 * 64) or []}


def test_rows_say_what_the_pictures_are(built: Path) -> None:
    rows = {(row["style"], row["codepoints"]): row for row in read(built, "train") + read(built, "heldout")}
    heart = rows["noto", "2764-fe0f"]
    assert (heart["concept"], heart["label"], heart["group"]) == ("2764", "red heart", "things & more")
    assert heart["names"] == ["red heart", "the red heart", "a red heart"]
    hand = rows["fluent flat", "1f44b-1f3fe"]
    assert (hand["concept"], hand["skin_tone"], hand["label"]) == ("1f44b", "medium-dark", "waving hand")
    # Fluent 3D's files of these two tones are exchanged: the picture drawn as medium is filed under medium-light.
    medium = np.asarray(Image.open(io.BytesIO(rows["fluent 3d", "1f44b-1f3fd"]["image"]["bytes"])))
    number = next(number for code, _, _, number in fake.codes() if code == "1F44B")
    drawn = np.asarray(render.fit(render.on_white(fake.picture(number + 3000, 256, tone=2))))
    assert np.array_equal(medium, drawn)


def test_the_split_keeps_its_promises(built: Path) -> None:
    train, heldout = read(built, "train"), read(built, "heldout")
    units = {(row["concept"], row["style"]) for row in train + heldout}
    held = {(row["concept"], row["style"]) for row in heldout}
    assert 0 < len(held) <= round(0.1 * len(units))
    assert not {row["twins"] for row in train} & {row["twins"] for row in heldout}
    assert not held & {(row["concept"], row["style"]) for row in train}
    styles: dict[str, set[str]] = defaultdict(set)
    for row in train:
        styles[row["concept"]].add(row["style"])
    assert all(len(styles[concept] - {style}) >= 2 for concept, style in held)
    fluent = {row["concept"]: row["twins"] for row in train + heldout if row["style"] == "fluent 3d"}
    assert all(fluent[row["concept"]] == row["twins"] for row in train if row["style"] == "fluent modern")


def test_twins_of_other_concepts_are_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nearly everything may be held out here, and two emoji are drawn alike in every style.
    monkeypatch.setattr(split, "HELD_OUT_COMPONENT", 1.0)
    plain = fake.contents

    def alike() -> dict[str, dict[str, bytes]]:
        files = plain()
        for package in files.values():
            for name in list(package):
                if "1f34c." in name.lower() or "banana." in name:
                    apple = name.replace("1F34C", "1F34E").replace("1f34c", "1f34e").replace("banana", "red-apple")
                    package[name] = package[apple]
        return files

    monkeypatch.setattr(fake, "contents", alike)
    out = tmp_path / "out"
    build_emoji(out, fake.pack_all(tmp_path / "npm"))
    of: dict[tuple[str, str], int] = {
        (row["concept"], row["style"]): row["twins"] for row in read(out, "train") + read(out, "heldout")
    }
    for style in ("openmoji", "noto", "twemoji", "fluent flat"):
        assert of["1f34c", style] == of["1f34e", style] != of["1f347", style]


def test_the_extra_styles_are_named_loosely_and_apart_from_the_split(built: Path) -> None:
    rows = read(built, "extra")
    assert {row["style"] for row in rows} == {style.name for style in stages.EXTRA_STYLES}
    assert {row["twins"] for row in rows} == {-1}
    assert {row["skin_tone"] for row in rows} == {"none"}
    for style in stages.EXTRA_STYLES:
        labels = sorted(row["label"] for row in rows if row["style"] == style.name)
        assert labels == sorted([*fake.NAMED.values(), "waving hand", "person mountain biking"])


def test_an_extra_twin_of_a_held_out_picture_is_left_out(built: Path, tmp_path: Path) -> None:
    held = next(row for row in read(built, "heldout") if row["style"] in ("openmoji", "fluent flat"))
    trained = next(row for row in read(built, "train") if row["label"] != held["label"] and row["style"] == "openmoji")
    numbers = {name: number for _, name, tone, number in fake.codes() if not tone}
    cache = fake.pack_all(tmp_path / "npm")
    held_body = fake.body(numbers[held["label"]] + (4000 if held["style"] == "fluent flat" else 0))
    icons = {"banana": {"body": held_body}, "grapes": {"body": fake.body(numbers[trained["label"]])}}
    packed = {"icons.json": json.dumps({"icons": icons, "width": 8, "height": 8}).encode()}
    fake.pack(sources.FXEMOJI, cache, packed)
    build_emoji(tmp_path / "out", cache)
    assert [row["label"] for row in read(tmp_path / "out", "extra") if row["style"] == "firefox os"] == ["grapes"]


def test_a_set_of_icons_that_is_none_is_named(tmp_path: Path) -> None:
    for content in (b"{}", b"[]", b"<svg>", b'{"icons": {"a": {}}}'):
        path = fake.pack(sources.FXEMOJI, tmp_path, {"icons.json": content})
        with pytest.raises(UserError, match="is no set of icons"):
            list(sources.icons(path, "icons.json", ".svg"))


def test_datasets_opens_the_folder(built: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(built), cache_dir=str(tmp_path))
    assert sorted(loaded) == ["extra", "heldout", "train"]
    assert loaded["train"].column_names == COLUMNS
    row = loaded["heldout"][0]
    assert row["image"].size == (64, 64)
    assert isinstance(row["names"], list)


def test_the_card_says_where_things_come_from_and_what_was_left_out(built: Path) -> None:
    text = (built / card.FILE_NAME).read_text(encoding="utf-8")
    for source in sources.SOURCES:
        assert source.spec in text
        assert source.attribution in text
    assert "| openmoji | 1 | 0 | 0 |" in text
    assert "no-such-thing.svg" in text
    for part in ("train", "heldout", "extra"):
        assert f"path: {part}-*.parquet" in text


def test_building_twice_gives_the_same_bytes(built: Path, cache: Path, tmp_path: Path) -> None:
    build_emoji(tmp_path / "again", cache)
    assert digests(tmp_path / "again") == digests(built)


def test_large_parts_are_written_in_shards(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latteflow.data.emoji import build

    monkeypatch.setattr(build, "SHARD_ROWS", 50)
    report = build_emoji(tmp_path, cache)
    assert len(list(tmp_path.glob("train-*.parquet"))) == -(-report.images["train"] // 50) > 1
    assert len(read(tmp_path, "train")) == report.images["train"]
    assert build_emoji(tmp_path, cache).images == report.images


def test_a_complete_set_is_left_alone_unless_forced(cache: Path, tmp_path: Path) -> None:
    first = build_emoji(tmp_path, cache)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = build_emoji(tmp_path, tmp_path / "no cache is needed")
    assert (second.built, second.images) == (False, first.images)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert build_emoji(tmp_path, cache, force=True).built


def test_an_interrupted_build_is_taken_up(
    built: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []

    def until_fluent(what: str, done: int, total: int) -> None:
        rendered.append(what)
        if what == "rendering fluent 3d" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_emoji(tmp_path, cache, progress=until_fluent)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".work"]
    rendered.clear()
    build_emoji(tmp_path, cache, progress=lambda what, done, total: rendered.append(what))
    assert {what for what in rendered if what.startswith("rendering")} == {
        "rendering fluent 3d",
        "rendering fluent flat",
        "rendering fluent modern",
        *(f"rendering {style.name}" for style in stages.EXTRA_STYLES),
    }
    assert digests(tmp_path) == digests(built)


def test_a_build_interrupted_while_publishing_is_taken_up(
    built: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latteflow.data.emoji import build

    build_emoji(tmp_path, cache)
    real = build.os.replace

    def stop_at_the_card(source: Path, target: Path) -> None:
        if Path(target).name == card.FILE_NAME:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(build.os, "replace", stop_at_the_card)
        with pytest.raises(KeyboardInterrupt):
            build_emoji(tmp_path, cache, force=True)
    # The old card is gone too: it would call half-replaced files complete.
    assert not (tmp_path / card.FILE_NAME).exists()
    assert build_emoji(tmp_path, cache).built
    assert digests(tmp_path) == digests(built)


def test_stages_of_another_version_are_not_taken_up(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "rendering twemoji":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_emoji(tmp_path, cache, progress=stop)
    monkeypatch.setattr(stages, "STAGE_FORMAT", "another")
    seen: list[str] = []
    build_emoji(tmp_path, cache, progress=lambda what, done, total: seen.append(what))
    assert "rendering openmoji" in seen
    monkeypatch.setattr(stages, "STAGE_FORMAT", "a third")
    with pytest.raises(UserError, match="made from other versions: give --force"):
        build_emoji(tmp_path, cache)


@pytest.mark.parametrize("force", [False, True])
def test_someone_elses_folder_is_not_written_over(cache: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "README.md").write_text("# my own notes")
    with pytest.raises(UserError, match="holds something else"):
        build_emoji(tmp_path, cache, force=force)
    with pytest.raises(UserError, match="is a file"):
        build_emoji(tmp_path / "README.md", cache, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_archive_is_named_with_the_remedy(tmp_path: Path, kept: float) -> None:
    cache = fake.pack_all(tmp_path / "npm")
    broken = cache / sources.TWITTER.file_name
    content = broken.read_bytes()
    broken.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"twitter-16\.0\.0\.tgz is cut short or damaged .*: delete it"):
        build_emoji(tmp_path / "out", cache)


def test_an_archive_that_is_no_archive_or_another_package(tmp_path: Path) -> None:
    cache = fake.pack_all(tmp_path / "npm")
    (cache / sources.FLUENT.file_name).write_text("<html>")
    with pytest.raises(UserError, match="cut short or damaged"):
        build_emoji(tmp_path / "out", cache)
    fake.pack(sources.FLUENT, cache)
    fake.pack(sources.EMOJIBASE, cache, {"other.json": b"{}"})
    with pytest.raises(UserError, match=r"holds no en/data\.json"):
        build_emoji(tmp_path / "out", cache)


def test_missing_npm_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"npm was not found.*openmoji@17\.0\.0.*install Node\.js"):
        build_emoji(tmp_path / "out", tmp_path / "npm")


def fake_npm(monkeypatch: pytest.MonkeyPatch, stderr: str = "", write: bool = True) -> list[list[str]]:
    """Put a stand-in for npm in place; returns the list that its calls are added to."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        destination = Path(command[command.index("--pack-destination") + 1])
        source = next(one for one in sources.SOURCES if one.spec == command[2])
        if write:
            fake.pack(source, destination)
        return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/somewhere/{name}.cmd")
    monkeypatch.setattr(sources.subprocess, "run", run)
    return calls


def test_packages_are_packed_once_and_only_whole_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_npm(monkeypatch)
    build_emoji(tmp_path / "out", tmp_path / "npm")
    assert [call[:3] for call in calls] == [["/somewhere/npm.cmd", "pack", one.spec] for one in sources.SOURCES]
    assert sorted(path.name for path in (tmp_path / "npm").iterdir()) == sorted(
        one.file_name for one in sources.SOURCES
    )
    build_emoji(tmp_path / "other", tmp_path / "npm")
    assert len(calls) == len(sources.SOURCES)


def test_a_failing_npm_leaves_nothing_and_says_its_last_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(
        monkeypatch,
        "npm warn old\nnpm error code ENOTFOUND\nnpm error request failed, reason: getaddrinfo ENOTFOUND\n"
        "npm error A complete log of this run can be found in: /x/y.log\n",
    )
    with pytest.raises(UserError, match=r"could not fetch openmoji@17\.0\.0: npm error request failed, .*ENOTFOUND$"):
        build_emoji(tmp_path / "out", tmp_path / "npm")
    assert list((tmp_path / "npm").iterdir()) == []


def test_an_npm_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(monkeypatch, write=False)
    with pytest.raises(UserError, match="it wrote no archive"):
        build_emoji(tmp_path / "out", tmp_path / "npm")


def test_members_never_leave_their_folder(tmp_path: Path) -> None:
    path = fake.pack(sources.FLUENT_3D, tmp_path, {"assets/../../evil.webp": b"x", "assets/1f34e.webp": b"y"})
    assert list(sources.members(path, "assets", ".webp")) == [("1f34e.webp", b"y")]


def test_the_command_builds_and_then_leaves_alone(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_command("emoji", tmp_path / "out", cache)
    first = capsys.readouterr().out
    assert first.strip().endswith("pictures")
    assert "heldout" in first
    data_command("emoji", tmp_path / "out", cache)
    assert "left alone" in capsys.readouterr().out


def test_the_command_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no data set is named 'emojis'; there is: emoji \("):
        data_command("emojis")


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("latteflow.data.emoji")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"needs resvg_py, which is not installed: pip install 'latteflow\[data\]'"):
        data_command("emoji", tmp_path)
