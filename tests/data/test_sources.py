"""Every kind of source gives the same samples in the same order, by number, to whichever process asks."""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as PictureFeature
from PIL import Image
from torch.utils.data import DataLoader

from latteflow.data.captioned import load_captioned_images
from latteflow.data.sources import KINDS, open_source
from latteflow.data.sources.captioned import Captioned
from latteflow.data.sources.parquet import ParquetStream
from latteflow.data.sources.source import BadSample, picture_of
from latteflow.errors import UserError
from picture_sets import (
    encoded,
    picture,
    same,
    write_image_folder,
    write_parquet,
    write_tar,
    write_webdataset,
)


@pytest.fixture(autouse=True)
def _no_bars():
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture
def sources(tmp_path):
    """One of each kind, of six pictures or so, and how to open it."""
    write_image_folder(tmp_path / "folder", {"cat": 3, "sea_lion": 3})
    pictures = tmp_path / "csv"
    (pictures / "deep").mkdir(parents=True)
    rows = ["file,caption"]
    for i in range(6):
        (pictures / f"deep/{i}.png").write_bytes(encoded(picture(i)))
        rows.append(f'deep/{i}.png,"picture {i}, of six"')
    (pictures / "captions.csv").write_text("\n".join(rows) + "\n")
    write_webdataset(tmp_path / "tars")
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(6)]
    write_parquet(tmp_path / "rows/a.parquet", {"image": images, "text": [f"picture {i}" for i in range(6)]})
    return {
        "image_folder": lambda: open_source("image_folder", tmp_path / "folder"),
        "captions_csv": lambda: open_source("captions_csv", tmp_path / "csv"),
        "webdataset": lambda: open_source("webdataset", tmp_path / "tars"),
        "parquet": lambda: open_source("parquet", tmp_path / "rows", cache=tmp_path / "cache"),
        "shapes": lambda: open_source("shapes", "", size=32),
    }


def everything(source):
    samples = [source.read(i) for i in range(len(source))]
    return [(source.name(i), s.caption, s.picture.mode, s.picture.tobytes()) for i, s in enumerate(samples)]


def test_no_kind_is_left_out_here(sources):
    assert set(sources) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_a_place_a_name_and_never_change(sources, kind):
    source = sources[kind]()
    first = everything(source)
    assert len({name for name, *_ in first}) == len(source) >= 6
    assert {mode for _, _, mode, _ in first} == {"RGB"}
    assert everything(sources[kind]()) == first
    assert everything(pickle.loads(pickle.dumps(source))) == first
    again = [source.read(i).caption for i in reversed(range(len(source)))]  # in any order
    assert again[::-1] == [caption for _, caption, _, _ in first]


@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_read_the_same(sources, kind):
    source = sources[kind]()

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            sample = source.read(index)
            return source.name(index), sample.caption, sample.picture.mode, sample.picture.tobytes()

    with_workers = DataLoader(Rows(), batch_size=None, num_workers=2, collate_fn=lambda row: row)
    assert list(with_workers) == everything(source)


def test_pictures_and_captions_are_what_was_written(sources):
    for kind, caption in (("captions_csv", "picture 4, of six"), ("webdataset", "picture 4"), ("parquet", "picture 4")):
        sample = sources[kind]().read(4)
        assert sample.caption == caption
        assert same(sample.picture, picture(4)), kind


class TestOpening:
    def test_an_unknown_kind_names_those_there_are(self):
        with pytest.raises(
            UserError, match="no kind of source 'zip': there are image_folder, captions_csv, webdataset"
        ):
            open_source("zip", "x")

    def test_an_option_of_another_kind_says_whose_it_is(self, tmp_path):
        with pytest.raises(
            UserError, match="kind captions_csv takes no class_names: it is for image_folder, webdataset"
        ):
            open_source("captions_csv", tmp_path, class_names="c.txt")
        with pytest.raises(UserError, match="takes no colour: no kind does"):
            open_source("captions_csv", tmp_path, colour="red")

    def test_none_stands_for_the_default(self, sources, tmp_path):
        source = open_source("captions_csv", tmp_path / "csv", class_names=None, revision=None)
        assert len(source) == 6

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shapes"])
    def test_nothing_there(self, tmp_path, kind):
        with pytest.raises(UserError, match=str(tmp_path)):
            open_source(kind, tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=str(tmp_path / "empty")):
            open_source(kind, tmp_path / "empty")


class TestImageFolder:
    def test_class_folders_name_the_pictures(self, tmp_path):
        folder = write_image_folder(tmp_path, {"sea_lion": 1, "cat": 2})
        (folder / "cat" / "notes.txt").write_text("not a picture")
        (folder / "cat" / "more").mkdir()
        (folder / "cat" / "more" / "X.JPEG").write_bytes(encoded(picture(9), "JPEG"))
        (folder / "lonely.png").write_bytes(encoded(picture(1)))  # of no class
        source = open_source("image_folder", folder)
        names = [source.name(i) for i in range(len(source))]
        assert names == ["cat/000.png", "cat/001.png", "cat/more/X.JPEG", "sea_lion/000.png"]
        assert [source.read(i).caption for i in range(4)] == ["cat", "cat", "cat", "sea lion"]

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("classes.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn0 unused\n"),
            ("classes.csv", 'class,names\nn01440764,"tench, Tinca tinca"\nn01443537,goldfish\n'),
            ("words.txt", "\ufeffn01440764\ttench\n\nn01443537  goldfish\n"),
        ],
    )
    def test_a_mapping_gives_the_first_name(self, tmp_path, file, text):
        folder = write_image_folder(tmp_path / "set", {"n01440764": 1, "n01443537": 1})
        (folder / file).write_text(text, encoding="utf-8")
        named = None if file.startswith("classes") else folder / file
        source = open_source("image_folder", folder, class_names=named)
        assert [source.read(i).caption for i in range(2)] == ["tench", "goldfish"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("n01440764 tench\n", "n01443537 is not among the class names"),
            ("n01440764\n", "'n01440764' is not a class and its names"),
            ("n01440764 , x\n", "is not a class and its names"),
            ("\n", "names no class"),
        ],
    )
    def test_a_mapping_that_does_not_do(self, tmp_path, text, message):
        folder = write_image_folder(tmp_path / "set", {"n01440764": 1, "n01443537": 1})
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            open_source("image_folder", folder, class_names=tmp_path / "names.txt")
        with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
            open_source("image_folder", folder, class_names=tmp_path / "gone.txt")

    def test_file_names_may_be_in_any_encoding(self, tmp_path):
        folder = write_image_folder(tmp_path, {"cat": 1})
        odd = os.fsencode(folder / "cat") + b"/\xff\xfe.png"
        with open(odd, "wb") as file:
            file.write(encoded(picture(3)))
        source = open_source("image_folder", folder)
        assert same(source.read(1).picture, picture(3))
        json.dumps(source.name(1))  # can be written down

    def test_a_missing_picture_is_a_bad_sample(self, tmp_path):
        source = open_source("image_folder", write_image_folder(tmp_path, {"cat": 2}))
        (tmp_path / "cat/001.png").unlink()
        with pytest.raises(BadSample, match="cannot be read: No such file"):
            source.read(1)


class TestCaptionsCsv:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file,words\na.png,x\n", "has no column 'caption': it has file, words"),
            ("", "has no column 'file': it has none"),
            ("file,caption\n", "has no row below its header"),
            ("file,caption\n../a.png,x\n", r"line 2: '../a.png' names no picture inside the folder"),
            ("file,caption\na.png,x\n/etc/passwd,x\n", "line 3: '/etc/passwd' names no picture"),
            ("file,caption\n,x\n", "line 2: '' names no picture"),
        ],
    )
    def test_a_file_that_does_not_do(self, tmp_path, text, message):
        (tmp_path / "captions.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            open_source("captions_csv", tmp_path)

    def test_not_utf_8(self, tmp_path):
        (tmp_path / "captions.csv").write_bytes(b"file,caption\na.png,caf\xe9\n")
        with pytest.raises(UserError, match="cannot be read"):
            open_source("captions_csv", tmp_path)

    def test_rows_as_people_write_them(self, tmp_path):
        (tmp_path / "a b.png").write_bytes(encoded(picture(1)))
        rows = 'caption,id,file\r\n"says ""hi"",\r\ntwice",1,a b.png\r\n spaces ,2,a b.png\r\n,3,a b.png\r\n'
        (tmp_path / "captions.csv").write_bytes(("\ufeff" + rows).encode())
        source = open_source("captions_csv", tmp_path / "captions.csv")
        assert [source.name(i) for i in range(len(source))] == ["a b.png"] * 3  # several captions of one picture
        assert source.read(0).caption == 'says "hi",\r\ntwice'
        assert source.read(1).caption == "spaces"
        with pytest.raises(BadSample, match="no caption"):
            source.read(2)


class TestWebDataset:
    def test_paths_patterns_and_folders(self, tmp_path):
        folder = write_webdataset(tmp_path, shards=3, samples=2)
        names = ["train-00.tar:0000", "train-00.tar:0001", "train-01.tar:0002", "train-01.tar:0003"]
        for path, number in ((folder, 6), (f"{folder}/train-{{00..01}}.tar", 4), (f"{folder}/train-0[01].tar", 4)):
            source = open_source("webdataset", path)
            assert len(source) == number
            assert [source.name(i) for i in range(4)] == names
        assert len(open_source("webdataset", folder / "train-02.tar")) == 2
        for index in (-1, len(source)):
            with pytest.raises(IndexError):
                source.read(index)
        with pytest.raises(UserError, match=r"no shard .*train-03\.tar"):
            open_source("webdataset", f"{folder}/train-{{00..03}}.tar")
        with pytest.raises(UserError, match="fetch them first"):
            open_source("webdataset", "s3://bucket/x.tar")

    def test_keys_end_at_the_first_dot_of_the_file_name(self, tmp_path):
        write_tar(
            tmp_path / "a.tar",
            {
                "./v1.0/dog.seg.png": b"a mask",
                "v1.0/dog.JPG": encoded(picture(5), "PNG"),
                "v1.0/dog.txt": b"a dog",
                "__meta__.json": b"{}",
                "README": b"of no sample",
                ".hidden.png": b"x",
                "cat.txt": b"a cat",  # files of a sample in any order
                "cat.webp": encoded(picture(6), "WEBP", lossless=True),
            },
        )
        source = open_source("webdataset", tmp_path)
        assert [source.name(i) for i in range(len(source))] == ["a.tar:v1.0/dog", "a.tar:cat"]
        assert same(source.read(0).picture, picture(5))
        assert source.read(0).caption == "a dog"
        assert same(source.read(1).picture, picture(6))

    def test_what_a_sample_lacks(self, tmp_path):
        png = encoded(picture(0))
        members = {
            "0.png": png,
            "1.txt": b"no picture",
            "2.png": png,
            "2.json": b'{"text": "another field"}',
            "3.png": png,
            "3.json": b"not json",
            "4.png": png,
            "4.txt": b"\xff\xff",
            "5.png": png,
            "5.txt": b" ",
            "6.png": png,
            "6.json": b"[" * 100_000,
            "7.png": png,
            "7.json": b'{"text": "fine", "caption": 7}',
        }
        write_tar(tmp_path / "a.tar", members)
        source = open_source("webdataset", tmp_path)
        for index in range(8):
            with pytest.raises(BadSample, match=r"caption|no picture \(jpg, jpeg, png, webp\) among txt"):
                source.read(index)
        source = open_source("webdataset", tmp_path, caption_field="text")
        assert [source.read(index).caption for index in (2, 7)] == ["another field", "fine"]

    def test_class_numbers_need_names(self, tmp_path):
        members = {"0.png": encoded(picture(0)), "0.cls": b"1\n", "1.png": encoded(picture(1)), "1.cls": b"7"}
        write_tar(tmp_path / "a.tar", members)
        with pytest.raises(UserError, match="class numbers and no words"):
            open_source("webdataset", tmp_path)
        (tmp_path / "classes.txt").write_text("0 tench, Tinca tinca\n1 goldfish, Carassius auratus\n")
        source = open_source("webdataset", tmp_path)
        assert source.read(0).caption == "goldfish"
        with pytest.raises(BadSample, match="class '7' has no name"):
            source.read(1)

    def test_the_index_is_kept_and_found_out_of_date(self, tmp_path, monkeypatch):
        from latteflow.data.sources import tar_index

        folder = write_webdataset(tmp_path / "tars", shards=1)
        shard, kept = folder / "train-00.tar", tmp_path / "indexes"
        first = everything(open_source("webdataset", folder, index_folder=kept))
        assert sorted(path.name for path in folder.iterdir()) == ["train-00.tar"]  # nothing beside the user's data
        [file] = kept.iterdir()
        with monkeypatch.context() as patch:
            patch.setattr(tar_index, "_scan", None)  # is not called
            assert everything(open_source("webdataset", folder, index_folder=kept)) == first
        state = shard.stat()
        write_tar(shard, {"9.png": encoded(picture(9)), "9.txt": b"changed"})
        assert open_source("webdataset", folder, index_folder=kept).read(0).caption == "changed"
        data = shard.read_bytes().replace(b"changed", b"chanted")
        shard.write_bytes(data)  # of the same size, at another time
        os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns + 5))
        monkeypatch.setattr(tar_index, "_scan", lambda shard, scan=tar_index._scan: seen.append(shard) or scan(shard))
        seen = []
        open_source("webdataset", folder, index_folder=kept)
        assert seen == [shard]
        file.write_text('{"format": 1, "by')  # cut short: made anew
        open_source("webdataset", folder, index_folder=kept)
        assert seen == [shard, shard]
        assert json.loads(file.read_text())["bytes"] == shard.stat().st_size

    @pytest.mark.parametrize("damage", ["cut", "gzip", "noise"])
    def test_a_broken_shard_is_named(self, tmp_path, damage):
        import gzip

        shard = write_webdataset(tmp_path, shards=1) / "train-00.tar"
        data = shard.read_bytes()
        shard.write_bytes({"cut": data[:5000], "gzip": gzip.compress(data), "noise": os.urandom(5000)}[damage])
        with pytest.raises(UserError, match=r"train-00\.tar cannot be read .*whole, uncompressed tar"):
            open_source("webdataset", tmp_path)

    def test_a_file_twice_is_no_sample(self, tmp_path):
        write_tar(tmp_path / "a.tar", {"0.png": b"x", "./0.PNG": b"y"})
        with pytest.raises(UserError, match="twice"):
            open_source("webdataset", tmp_path)

    def test_links_are_not_followed(self, tmp_path):
        import tarfile

        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, kind in (("0.png", tarfile.SYMTYPE), ("1.png", tarfile.LNKTYPE), ("2.d", tarfile.DIRTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
        with pytest.raises(UserError, match="no sample in"):
            open_source("webdataset", tmp_path)


class TestParquet:
    def test_what_hugging_face_data_sets_look_like(self, tmp_path):
        features = Features({"image": PictureFeature(), "label": ClassLabel(names=["tench, Tinca tinca", "goldfish"])})
        rows = {"image": [picture(0), picture(1)], "label": [1, 0]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
        write_parquet(tmp_path / "data/test-00000-of-00001.parquet", {"other": [1]})  # another split's
        source = open_source("parquet", tmp_path / "data", cache=tmp_path / "cache")
        assert [source.read(i).caption for i in range(2)] == ["goldfish", "tench"]
        assert same(source.read(1).picture, picture(1))
        assert [source.name(i) for i in range(2)] == ["train:0", "train:1"]

    def test_columns_of_any_name(self, tmp_path):
        captions = [["two", "captions"], []]
        columns = {"jpg": [encoded(picture(0)), None], "said": captions, "caption": ["x", "y"]}
        file = write_parquet(tmp_path / "a.parquet", columns)
        source = open_source("parquet", file, cache=tmp_path / "cache", picture_column="jpg", caption_column="said")
        assert source.read(0).caption == "two"
        assert same(source.read(0).picture, picture(0))
        with pytest.raises(BadSample, match="no picture in the row"):
            source.read(1)
        assert open_source("parquet", file, cache=tmp_path / "cache").read(0).caption == "x"
        with pytest.raises(UserError, match=r"no column 'words' \(caption_column\): it has jpg, said, caption"):
            open_source("parquet", file, cache=tmp_path / "cache", caption_column="words")

    def test_columns_that_are_not_plain(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", {"one": [b"x"], "two": [b"x"], "words": ["w"]})
        with pytest.raises(UserError, match=r"say which column of .* holds the picture with picture_column"):
            open_source("parquet", file, cache=tmp_path / "cache")
        with pytest.raises(UserError, match="holds the caption with caption_column: it has one, two, words"):
            open_source("parquet", file, cache=tmp_path / "cache", picture_column="one")

    def test_mistakes(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"no parquet")
        with pytest.raises(UserError, match="cannot be read"):
            open_source("parquet", tmp_path, cache=tmp_path / "cache")
        with pytest.raises(UserError, match=r"give a folder of \.parquet files, or a hub id"):
            open_source("parquet", "a/b/c")
        with pytest.raises(UserError, match=r"data set nobody/nothing .* cannot be read"):
            open_source("parquet", "nobody/nothing", cache=tmp_path / "cache")

    def test_a_stream_gives_the_same_rows_from_any_place(self, tmp_path):
        images = [{"bytes": encoded(picture(i)), "path": None} for i in range(7)]
        for part, rows in enumerate((range(4), range(4, 7))):
            columns = {"image": [images[i] for i in rows], "caption": [f"picture {i}" for i in rows]}
            write_parquet(tmp_path / f"train-{part}.parquet", columns)
        source = open_source("parquet", tmp_path, cache=tmp_path / "cache")
        stream = ParquetStream(tmp_path)
        for start in (0, 3, 4, 6, 7):
            rows = [(name, stream.sample(row)) for name, row in stream.rows(start)]
            assert [name for name, _ in rows] == [source.name(i) for i in range(start, 7)]
            for (_, sample), i in zip(rows, range(start, 7), strict=True):
                assert sample.caption == source.read(i).caption
                assert same(sample.picture, source.read(i).picture)


def test_a_captioned_set_is_a_source(toy_set):
    images = load_captioned_images(toy_set, "train")
    source = Captioned(images)
    assert len({source.name(i) for i in range(len(source))}) == len(source) == 36
    assert source.read(3).caption == "blue circle, solid style"
    assert torch.equal(torch.from_numpy(np.array(source.read(3).picture)).permute(2, 0, 1), images.pixels[3])


class TestPictures:
    """What a file becomes: RGB on white, upright, the right values."""

    def test_transparent_is_white(self):
        image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        image.putpixel((0, 0), (10, 20, 30, 255))
        image.putpixel((1, 0), (0, 0, 0, 128))
        found = picture_of(encoded(image))
        assert found.mode == "RGB"
        assert [found.getpixel((x, 0)) for x in range(3)] == [(10, 20, 30), (127, 127, 127), (255, 255, 255)]
        palette = image.quantize(8)
        assert picture_of(encoded(palette, "GIF", transparency=palette.getpixel((3, 3)))).getpixel((3, 3)) == (255,) * 3

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "CMYK"])
    def test_any_mode(self, mode):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        found = picture_of(encoded(picture(1).convert(mode), kind))
        assert (found.mode, found.size) == ("RGB", (40, 32))

    def test_sixteen_bits_of_grey_keep_their_range(self):
        values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16).repeat(2, axis=0)
        found = picture_of(encoded(Image.fromarray(values)))
        assert [found.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 128, 255]

    def test_upright_as_the_camera_says(self):
        image = picture(2, 40, 20)
        exif = Image.Exif()
        exif[0x0112] = 6  # turned a quarter
        found = picture_of(encoded(image, "PNG", exif=exif))
        assert same(found, image.transpose(Image.Transpose.ROTATE_270))

    def test_the_first_of_several(self):
        data = encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)])
        assert same(picture_of(data), Image.open(io.BytesIO(data)).convert("RGB"))

    def test_the_bytes_say_what_it_is(self):
        assert same(picture_of(encoded(picture(3), "BMP")), picture(3))
        with pytest.raises(BadSample, match="not a PNG, JPEG, WebP, GIF or BMP"):
            picture_of(encoded(picture(3), "TIFF"))  # a decoder that is not opened to strangers
