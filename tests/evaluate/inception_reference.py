"""Seeded weights and pictures for the Inception network, and what torch-fidelity makes of them.

python inception_reference.py, in an environment with torch-fidelity 0.4.0 (and torchvision, which it needs), writes the
two fixtures that ``test_inception.py`` compares with: the names and shapes of its network's state, and its features.
The published weights are in neither: the weights here are drawn at random.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = FIXTURES / "inception-2015-12-05-names.txt"
FEATURES = FIXTURES / "inception-2015-12-05-seeded.safetensors"
SIZES = ((64, 64), (40, 72), (331, 300))
KEPT = 4
"""Of features, every so manieth is kept: coprime to the 7 channels of the spatial ones."""


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes in the published file, as the fixture lists them."""
    lines = [line.split() for line in NAMES.read_text().splitlines()]
    return {name: tuple(int(side) for side in shape) for name, *shape in lines}


def seeded_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of such sizes that activations neither vanish nor grow."""
    state = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        generator = torch.Generator().manual_seed(number)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("bn.weight"):
            state[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        elif len(shape) == 1:
            state[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            inputs = torch.Size(shape[1:]).numel()
            state[name] = torch.randn(shape, generator=generator) * (2 / inputs) ** 0.5
    return state


def seeded_pictures() -> list[torch.Tensor]:
    """One uint8 picture (1, 3, height, width) of each size, with patches of colour and noise."""
    pictures = []
    for number, (height, width) in enumerate(SIZES):
        generator = torch.Generator().manual_seed(1000 + number)
        patches = torch.randint(256, (1, 3, 5, 5), generator=generator)
        rows, columns = torch.arange(height) * 5 // height, torch.arange(width) * 5 // width
        noise = torch.randint(-30, 31, (1, 3, height, width), generator=generator)
        pictures.append((patches[:, :, rows][:, :, :, columns] + noise).clamp(0, 255).to(torch.uint8))
    return pictures


def reference_features(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch-fidelity's network of these weights says, whole; ``spatial`` as ADM's evaluator takes it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], file.name)
    spatial: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, found: spatial.append(found[:, :7]))
    with torch.no_grad():
        found = [network(picture) for picture in seeded_pictures()]
    return {
        "pooled": torch.cat([pooled for pooled, _ in found]),
        "logits": torch.cat([logits for _, logits in found]),
        "spatial": torch.cat(spatial).permute(0, 2, 3, 1).flatten(1),
    }


def main() -> None:
    # A CPU build of torch lacks what torchvision's own operators, unused here, are compiled against.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    # What it would load, unless told otherwise, is a download.
    theirs.load_state_dict_from_url = lambda *args, **kwargs: {}
    load = theirs.FeatureExtractorInceptionV3.load_state_dict
    theirs.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    shapes = theirs.FeatureExtractorInceptionV3("inception", ["2048"]).state_dict()
    theirs.FeatureExtractorInceptionV3.load_state_dict = load
    shapes = {name: tuple(value.shape) for name, value in shapes.items()}
    NAMES.write_text("".join(" ".join([name, *map(str, shape)]) + "\n" for name, shape in shapes.items()))
    features = reference_features(seeded_state(shapes))
    save_file({name: value[:, ::KEPT].contiguous() for name, value in features.items()}, FEATURES)
    sys.stdout.write(f"{NAMES} and {FEATURES}\n")


if __name__ == "__main__":
    main()
