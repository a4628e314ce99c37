"""Fashion-MNIST: the publisher's files become a captioned set, and broken ones are named."""

import gzip

import numpy as np
import pytest

from latteflow.data.captioned import load_captioned_images
from latteflow.data.fashion_mnist import CLASSES, SIDE, read_idx, write_fashion_mnist
from latteflow.errors import UserError


def write_idx(file, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    file.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def source(tmp_path):
    for name, number in (("train", 12), ("t10k", 3)):
        pictures = np.arange(number * 28 * 28, dtype=np.uint32).reshape(number, 28, 28).astype(np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", (np.arange(number) % 10).astype(np.uint8))
    return tmp_path


def test_it_becomes_a_captioned_set(source, tmp_path):
    assert write_fashion_mnist(source, tmp_path / "set") == {"train": 12, "heldout": 3}
    images = load_captioned_images(tmp_path / "set", "train")
    assert images.pixels.shape == (12, 3, SIDE, SIDE)
    assert [record.label for record in images.records] == [CLASSES[i % 10] for i in range(12)]
    raw = read_idx(source / "train-images-idx3-ubyte.gz")
    for channel in images.pixels[5]:
        assert np.array_equal(channel[2:30, 2:30].numpy(), raw[5])
        assert not channel[:2].any()
        assert not channel[:, 30:].any()


def test_broken_files_are_named(source, tmp_path):
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        read_idx(tmp_path / "nothing.gz")
    file = source / "train-labels-idx1-ubyte.gz"
    whole = gzip.decompress(file.read_bytes())
    for broken, message in ((whole[:-1], "cut short"), (b"\1" + whole[1:], "no IDX file"), (whole[:6], "cut short")):
        file.write_bytes(gzip.compress(broken))
        with pytest.raises(UserError, match=message):
            read_idx(file)
    file.write_bytes(whole)
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(file)
    write_idx(file, np.zeros(11, np.uint8))
    with pytest.raises(UserError, match="12 pictures and 11 labels"):
        write_fashion_mnist(source, tmp_path / "set")
