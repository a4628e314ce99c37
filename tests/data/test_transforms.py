"""Augmentation: white stays white, left stays left, and all draws come from the generator."""

import torch

from latteflow.data.transforms import augment, patches_of
from toys import seeded


def marked(number):
    """White pictures with a dark bar on the left."""
    pictures = torch.ones(number, 3, 32, 32)
    pictures[:, :, 10:22, 4:9] = -1
    return pictures


def test_white_stays_white():
    white = torch.ones(64, 3, 32, 32)
    assert torch.equal(augment(white, seeded()), white)


def test_the_border_that_comes_in_is_white():
    black = -torch.ones(64, 3, 32, 32)
    corners = augment(black, seeded())[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 0.99).any()  # moved or shrunk: what was outside is white, not black
    assert corners.max() <= 1


def test_never_mirrors():
    ink = 1 - augment(marked(256), seeded())
    left, right = ink[..., :16].sum((1, 2, 3)), ink[..., 16:].sum((1, 2, 3))
    assert (left > 2 * right).all()
    top, bottom = ink[:, :, :16].sum((1, 2, 3)), ink[:, :, 16:].sum((1, 2, 3))
    assert ((top / bottom).log().abs() < 2).all()


def test_pictures_are_changed_each_its_own_way_and_alike_for_one_generator():
    changed = augment(marked(8), seeded(3))
    assert torch.equal(augment(marked(8), seeded(3)), changed)
    assert not torch.equal(augment(marked(8), seeded(4)), changed)
    assert len({tuple(picture.flatten().tolist()) for picture in changed}) == 8
    assert changed.abs().max() <= 1


def test_colours_move_by_channel_and_little():
    grey = torch.zeros(64, 3, 32, 32)
    middle = augment(grey, seeded())[:, :, 16, 16]
    assert middle.abs().max() < 0.16
    assert middle.std(1).min() > 1e-4


def test_patches_of_one_square_stand_side_by_side():
    picture = torch.arange(32 * 48, dtype=torch.float32).reshape(1, 1, 32, 48).expand(1, 3, 32, 48)
    patches, grid = patches_of(picture, patch_size=8)
    assert grid.tolist() == [[1, 4, 6]]
    assert patches.shape == (24, 192)
    corners = patches[:, 0].tolist()
    assert corners[:4] == [0, 8, 8 * 48, 8 * 48 + 8]
    assert corners[4] == 16
    assert patches[0, :10].tolist() == [*range(8), 48, 49]
