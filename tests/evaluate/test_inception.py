"""The Inception network against torch-fidelity's, through seeded weights; see ``inception_reference.py``."""

import hashlib

import pytest
import torch
from inception_reference import FEATURES, KEPT, published_shapes, seeded_pictures, seeded_state
from safetensors.torch import load_file

from latteflow.errors import UserError
from latteflow.evaluate.inception import PUBLISHED, InceptionV3, enlarged_as_tensorflow, load_inception


@pytest.fixture(scope="module")
def state():
    return seeded_state(published_shapes())


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    return file


def test_names_and_shapes_are_those_of_the_published_file():
    assert {name: tuple(value.shape) for name, value in InceptionV3().state_dict().items()} == published_shapes()


def test_it_says_what_torch_fidelitys_says(weights):
    network, digits = load_inception(weights)
    assert digits == hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    assert digits != PUBLISHED
    expected = load_file(FEATURES)
    with torch.no_grad():
        seen = [network(picture) for picture in seeded_pictures()]
    for name, values in expected.items():
        found = torch.cat([getattr(one, name) for one in seen])[:, ::KEPT]
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert {name: getattr(seen[0], name).shape[1] for name in expected} == {
        "pooled": 2048,
        "spatial": 17 * 17 * 7,
        "logits": 1008,
    }


def test_pictures_are_enlarged_from_their_corner():
    row = torch.tensor([0.0, 1, 2, 3])
    across = row.expand(1, 1, 4, 4)
    larger, smaller = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]), torch.tensor([0.0, 2])
    for picture, pick in ((across, lambda x: x[0, 0, 0]), (across.transpose(2, 3), lambda x: x[0, 0, :, 0])):
        torch.testing.assert_close(pick(enlarged_as_tensorflow(picture, 8)), larger)
        torch.testing.assert_close(pick(enlarged_as_tensorflow(picture, 2)), smaller)
        assert torch.equal(enlarged_as_tensorflow(picture, 4), picture)


def test_counters_may_be_missing(state, tmp_path):
    file = tmp_path / "without.pth"
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, file)
    network, _ = load_inception(file)
    assert torch.equal(network.fc.weight, state["fc.weight"])
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_other_files_are_refused(state, tmp_path):
    file = tmp_path / "weights.pth"
    with pytest.raises(UserError, match=f"no Inception weights at .* give torch-fidelity's weights-.*{PUBLISHED}"):
        load_inception(file)
    file.write_text("not weights")
    with pytest.raises(UserError, match="no weights that can be read"):
        load_inception(file)
    for content in ([1, 2], {"fc.weight": 3}):
        torch.save(content, file)
        with pytest.raises(UserError, match="is no state dict"):
            load_inception(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, r"1 names or shapes differ, such as fc.weight \(here \(1000, 2048\)"),
        ({"AuxLogits.fc.bias": torch.zeros(2)}, r"such as AuxLogits.fc.bias \(here \(2,\), there unknown"),
        ({"fc.bias": None}, r"such as fc.bias \(here missing, there \(1008,\)"),
    ],
)
def test_another_inceptions_weights_are_refused(state, tmp_path, changes, said):
    """torchvision's has 1,000 classes and auxiliary ones; a missing bias would be left at random."""
    changed = {name: value for name, value in {**state, **changes}.items() if value is not None}
    torch.save(changed, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=said):
        load_inception(tmp_path / "weights.pth")


def test_a_pickle_of_code_is_refused(tmp_path):
    torch.save(InceptionV3, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="no weights that can be read"):
        load_inception(tmp_path / "weights.pth")
