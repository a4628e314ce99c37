"""Sets as figures see them."""

import numpy as np
import pytest
import torch
from fidelity_toys import PlainNetwork, ToyNetwork, pictures

from latteflow.errors import UserError
from latteflow.evaluate import measured as module
from latteflow.evaluate.feature_networks import Features
from latteflow.evaluate.measured import measure, measured_file
from latteflow.evaluate.moments import Moments
from latteflow.evaluate.picture_arrays import write_pictures


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 16)


def same(one, other):
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-8, atol=1e-10)
    assert one.number == other.number


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_change_nothing(chunk):
    some, network = pictures(60), ToyNetwork()
    found = measure(network, some.split(chunk), "some")
    features = network(some)
    same(found.pooled, Moments.of(features.pooled).fitted())
    same(found.spatial, Moments.of(features.spatial).fitted())
    assert torch.equal(found.features, features.pooled)
    assert torch.equal(found.probabilities, features.probabilities)
    assert (found.size, found.network, found.name) == ((8, 8), network.identity, "some")
    whole = measure(network, [some], "some")
    for halves, others in zip(found.halves, whole.halves, strict=True):
        for half, other in zip(halves, others, strict=True):
            assert half.number == other.number
            torch.testing.assert_close(half.scatter, other.scatter)


def test_halves_are_two_sets_of_about_one_size_that_no_order_decides():
    """Two kinds of pictures in turns: halves of every second one would be one kind each."""
    some = torch.stack([pictures(200), pictures(200, 1, brightness=0.2)], dim=1).flatten(0, 1)
    halves = measure(ToyNetwork(), some.split(50), "some").halves[0]
    assert sum(half.number for half in halves) == 400
    assert all(160 < half.number < 240 for half in halves)
    assert (halves[0].mean - halves[1].mean).abs().max() < 0.1
    kinds = ToyNetwork()(some).pooled
    assert (kinds[::2].mean(dim=0) - kinds[1::2].mean(dim=0)).abs().min() > 0.2


def test_statistics_alone_keep_no_features():
    found = measure(ToyNetwork(), pictures(60).split(20), "some", keep=False)
    assert found.features is None
    assert found.probabilities is None
    assert found.pooled.number == 60


def test_too_few_unlike_and_broken_pictures_are_refused():
    with pytest.raises(UserError, match="covariance of 6 features needs more pictures than that: got 6"):
        measure(ToyNetwork(), [pictures(6)], "few")
    with pytest.raises(UserError, match="no pictures to measure"):
        measure(ToyNetwork(), [], "none")
    with pytest.raises(UserError, match="pictures of 8x4 among those of 8x8"):
        measure(ToyNetwork(), [pictures(9), pictures(9, size=(8, 4))], "mixed")

    class Broken(ToyNetwork):
        def _features(self, pictures):
            found = super()._features(pictures)
            return Features(found.pooled.log().where(found.pooled > 1, torch.nan), None, None)

    with pytest.raises(UserError, match="not finite"):
        measure(Broken(), [pictures(20)], "broken")


def test_a_saved_reference_comes_back(tmp_path):
    found = measure(ToyNetwork(), [pictures(60)], "some")
    found.save(tmp_path / "some.npz")
    again = measured_file(tmp_path / "some.npz", ToyNetwork())
    same(again.pooled, found.pooled)
    same(again.spatial, found.spatial)
    assert (again.size, again.network, again.name) == ((8, 8), found.network, "some.npz")
    assert again.features is None
    with pytest.raises(UserError, match="measured with Toy, 8 pixels, and this is Plain, 8 pixels"):
        measured_file(tmp_path / "some.npz", PlainNetwork())


def test_a_file_of_pictures_is_measured(tmp_path):
    some = pictures(60)
    write_pictures(tmp_path / "some.npz", [some], 60)
    found = measured_file(tmp_path / "some.npz", ToyNetwork())
    same(found.pooled, measure(ToyNetwork(), [some], "some").pooled)
    assert found.features.shape == (60, 6)


def test_of_adms_files_statistics_and_pictures_are_taken(tmp_path):
    """Distances are to statistics of more pictures than those that are in the file."""
    more, some = measure(ToyNetwork(), [pictures(200)], "more"), pictures(60)
    arrays = {"mu": more.pooled.mean, "sigma": more.pooled.covariance, "arr_0": some.permute(0, 2, 3, 1)}
    np.savez(tmp_path / "adm.npz", **{name: value.numpy() for name, value in arrays.items()})
    found = measured_file(tmp_path / "adm.npz", ToyNetwork())
    assert found.pooled.frechet_distance(more.pooled) == pytest.approx(0, abs=1e-9)
    assert found.pooled.number is None
    assert found.spatial is None
    assert found.size == (8, 8)
    assert len(found.features) == 60
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5), arr_0=arrays["arr_0"].numpy())
    with pytest.raises(UserError, match="statistics of 5 features, and this network has 6"):
        measured_file(tmp_path / "other.npz", ToyNetwork())
    np.savez(tmp_path / "nothing.npz", labels=np.zeros(5))
    with pytest.raises(UserError, match="neither pictures"):
        measured_file(tmp_path / "nothing.npz", ToyNetwork())


def test_statistics_of_another_size_than_the_pictures_beside_them_are_refused(tmp_path):
    found = measure(ToyNetwork(), [pictures(60)], "some")
    some = pictures(60, size=(8, 4)).permute(0, 2, 3, 1).numpy()
    mu, sigma = found.pooled.mean.numpy(), found.pooled.covariance.numpy()
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma, height=8, width=8, arr_0=some)
    with pytest.raises(UserError, match="another size than its statistics say"):
        measured_file(tmp_path / "a.npz", ToyNetwork())
