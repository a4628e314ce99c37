"""The captioned set in memory: filters, order, and what is said where it is missing or broken."""

import shutil

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from toys import HELD_OUT, STYLES, png_bytes, toy_picture, toy_rows, write_rows


def test_reads_all_shards_in_order(toy_set):
    images = load_captioned_images(toy_set, "train")
    rows = [row for row in toy_rows() if (row["label"], row["style"]) not in HELD_OUT]
    assert len(images) == len(rows) == 36
    assert [record.label for record in images.records] == [row["label"] for row in rows]
    assert images.pixels.shape == (36, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert images.records[0].names == ("red circle", "circle of red")
    assert images.records[-1].tags == ()


def test_pictures_and_records_belong_together(toy_set):
    images = load_captioned_images(toy_set, "train")
    for number in (0, 20, 35):
        record = images.records[number]
        colour, shape = record.label.split()
        assert images.pictures([number])[0].tobytes() == toy_picture(shape, colour, record.style).tobytes()


def test_batches_are_in_minus_1_to_1(toy_set):
    images = load_captioned_images(toy_set, "train")
    batch = images.batch(torch.tensor([5, 0]))
    assert batch.shape == (2, 3, 32, 32)
    assert batch.max() == 1
    torch.testing.assert_close(batch[1], images.pixels[0].float() / 127.5 - 1)
    before = images.pixels.clone()
    batch.zero_()
    assert torch.equal(images.pixels, before)


def test_the_held_out_part_is_another(toy_set):
    heldout = load_captioned_images(toy_set, "heldout")
    assert {(record.label, record.style) for record in heldout.records} == HELD_OUT


@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        ({"styles": ["tiny"]}, lambda record: record.style == "tiny"),
        ({"leave_out_groups": ["angular"]}, lambda record: record.group == "round"),
        ({"leave_out_subgroups": ["cross", "circle"]}, lambda record: record.subgroup in ("square", "triangle")),
        ({"skin_tones": ["dark"]}, lambda record: record.skin_tone == "dark"),
        (
            {"styles": ["solid", "tiny"], "skin_tones": ["none"], "leave_out_groups": ["round"]},
            lambda record: record.style != "outline" and record.group == "angular",
        ),
    ],
)
def test_filters_keep_what_they_say(toy_set, filters, keep):
    everything = load_captioned_images(toy_set, "train")
    kept = load_captioned_images(toy_set, "train", **filters)
    expected = everything.select(keep)
    assert 0 < len(kept) < len(everything)
    assert kept.records == expected.records
    assert torch.equal(kept.pixels, expected.pixels)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"styles": ["crayon"]}, "no style 'crayon' in .*: it has outline, solid, tiny"),
        ({"leave_out_groups": ["flags"]}, "no group 'flags' in .*: it has angular, round"),
        ({"leave_out_subgroups": ["star"]}, "no subgroup 'star'"),
        ({"skin_tones": ["green"]}, "no skin_tone 'green'"),
        ({"leave_out_groups": ["round", "angular"]}, "no picture of .* is left after the recipe's filters"),
    ],
)
def test_filters_that_cannot_be_are_refused(toy_set, filters, message):
    with pytest.raises(UserError, match=message):
        load_captioned_images(toy_set, "train", **filters)


def test_the_held_out_part_need_not_hold_every_style(toy_set, tmp_path):
    shutil.copytree(toy_set, tmp_path / "set")
    rows = [row for row in toy_rows() if row["style"] == "tiny"]
    write_rows(tmp_path / "set" / "heldout-00000-of-00001.parquet", rows)
    assert len(load_captioned_images(tmp_path / "set", "heldout", styles=list(STYLES))) == len(rows)


def test_a_missing_set_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no data set in .*nowhere .*: build one with `latteflow data emoji`"):
        load_captioned_images(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "picture"])
def test_a_broken_set_is_named(toy_set, tmp_path, damage):
    folder = tmp_path / "set"
    shutil.copytree(toy_set, folder)
    file = folder / "train-00001-of-00002.parquet"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "foreign":
        parquet.write_table(pa.table({"other": [1, 2]}), file)
    else:
        rows = toy_rows()[:3]
        rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
        write_rows(file, rows)
    with pytest.raises(UserError, match=r"set.* cannot be read .*: build it anew") as caught:
        load_captioned_images(folder, "train")
    assert "\n" not in str(caught.value)


def test_pictures_of_different_sizes_are_refused(toy_set, tmp_path):
    shutil.copytree(toy_set, tmp_path / "set")
    rows = toy_rows()[:2]
    rows[1]["image"]["bytes"] = png_bytes(toy_picture("circle", "red", "solid", 48))
    write_rows(tmp_path / "set" / "train-00001-of-00002.parquet", rows)
    with pytest.raises(UserError, match="cannot be read"):
        load_captioned_images(tmp_path / "set", "train")


def test_a_spread_goes_from_the_first_to_the_last(toy_set):
    images = load_captioned_images(toy_set, "train")
    part = images.spread(4)
    assert list(part.records) == [images.records[i] for i in (0, 11, 23, 35)]
    assert torch.equal(part.pixels, images.pixels[[0, 11, 23, 35]])
    assert images.spread(500).records == images.records
