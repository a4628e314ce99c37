"""Files that the reference evaluators read, and theirs."""

import io
import zipfile

import numpy as np
import pytest
import torch
from fidelity_toys import pictures

from latteflow.errors import UserError
from latteflow.evaluate.moments import Normal
from latteflow.evaluate.picture_arrays import (
    pictures_shape,
    read_pictures,
    read_statistics,
    write_pictures,
    write_statistics,
)


def normal(values, number=None, seed=0):
    features = torch.randn(values + 5, values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Normal(features.mean(dim=0), torch.cov(features.T), number)


def test_pictures_are_adms_array_and_come_back(tmp_path):
    some = pictures(10, size=(6, 4))
    for batch, name in ((3, "a.npz"), (10, "b.npz")):
        write_pictures(tmp_path / name, some.split(batch), 10)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as loaded:
        assert loaded.files == ["arr_0"]
        assert loaded["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(loaded["arr_0"], some.permute(0, 2, 3, 1).numpy())
    assert pictures_shape(tmp_path / "a.npz") == (10, 6, 4, 3)
    chunks = list(read_pictures(tmp_path / "a.npz", batch=4))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert torch.equal(torch.cat(chunks), some)


def test_what_numpy_compressed_is_read_too(tmp_path):
    some = pictures(5)
    np.savez_compressed(tmp_path / "a.npz", arr_0=some.permute(0, 2, 3, 1).numpy(), arr_1=np.arange(5))
    assert torch.equal(torch.cat(list(read_pictures(tmp_path / "a.npz"))), some)


@pytest.mark.parametrize(
    ("chunks", "number", "said"),
    [
        ([pictures(3), pictures(2, size=(8, 4))], 5, "among those of"),
        ([pictures(3)], 4, "3 pictures were given, and 4 announced"),
        ([], 1, "0 pictures were given"),
        ([pictures(3).float()], 3, "give uint8"),
        ([pictures(3).permute(0, 2, 3, 1)], 3, "give uint8"),
    ],
)
def test_a_file_of_pictures_is_whole_or_not_there(tmp_path, chunks, number, said):
    with pytest.raises(UserError, match=said):
        write_pictures(tmp_path / "a.npz", chunks, number)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="has to end in"):
        write_pictures(tmp_path / "a.npy", [], 0)


def test_statistics_come_back_and_numpy_reads_them(tmp_path):
    file = tmp_path / "a.npz"
    pooled, spatial = normal(4, 9), normal(3, 9, 1)
    write_statistics(file, pooled, spatial, {"network": "a network", "height": 8})
    with np.load(file) as loaded:
        assert set(loaded.files) == {"mu", "sigma", "n", "mu_s", "sigma_s", "network", "height"}
        np.testing.assert_array_equal(loaded["sigma_s"], spatial.covariance.numpy())
    found, found_spatial, about = read_statistics(file)
    assert about == {"network": "a network", "height": 8}
    for one, other in ((found, pooled), (found_spatial, spatial)):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.covariance, other.covariance)
        assert one.number == 9


def test_statistics_of_pytorch_fid_and_adm_are_read(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(3, "f4"), sigma=np.eye(3, dtype="f4"))
    pooled, spatial, _ = read_statistics(tmp_path / "fid.npz")
    assert pooled.number is None
    assert spatial is None
    assert pooled.covariance.dtype == torch.float64
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 8, 8, 3), "u1"),
        mu=np.zeros(3),
        sigma=np.eye(3),
        mu_s=np.zeros(2),
        sigma_s=np.eye(2),
    )
    assert len(read_statistics(tmp_path / "adm.npz")[1].mean) == 2
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((2, 8, 8, 3), "u1"))
    assert read_statistics(tmp_path / "pictures.npz") is None
    assert pictures_shape(tmp_path / "fid.npz") is None


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(3)}, "sigma of missing"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "sigma of"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "mu of"),
        ({"mu": np.zeros(3, "i8"), "sigma": np.eye(3)}, "floating point"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) * np.nan}, "not finite"),
        ({"mu": np.array([0, np.inf]), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "n": 3}, "3 features of 3 pictures"),
        ({"mu": np.array([{}]), "sigma": np.eye(3)}, "plain arrays"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=said):
        read_statistics(tmp_path / "a.npz")


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    for read in (read_statistics, pictures_shape, lambda file: list(read_pictures(file))):
        file.unlink(missing_ok=True)
        with pytest.raises(UserError, match="no file"):
            read(file)
        file.write_bytes(b"no archive")
        with pytest.raises(UserError, match="no whole"):
            read(file)
    np.savez(file, mu=np.zeros(3))
    with pytest.raises(UserError, match="no array arr_0"):
        list(read_pictures(file))
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), "u1"), np.zeros((0, 8, 8, 3), "u1")):
        np.savez(file, arr_0=wrong)
        with pytest.raises(UserError, match=r"give uint8 \(pictures, height, width, 3\)"):
            pictures_shape(file)


def test_an_array_that_is_cut_short_is_refused(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.zeros((4, 8, 8, 3), "u1"))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue()[:-100])
    with pytest.raises(UserError, match="cut short"):
        list(read_pictures(tmp_path / "a.npz", batch=2))
