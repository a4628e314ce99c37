"""Augmentation: white stays white, left stays left, and all draws come from the generator."""

import torch

from latteflow.data.transforms import augment, blend, distort, nudge, patches_of, soften
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


def test_distortion_keeps_white_and_never_mirrors():
    white = torch.ones(64, 3, 32, 32)
    kept = distort(white, seeded())
    changed = (kept != white).any(dim=1).float().mean(dim=(1, 2))
    assert (changed == 0).float().mean() > 0.3  # half have no hole
    assert changed.max() < 0.2  # a hole is at most three eighths wide
    ink = 1 - distort(marked(512), seeded())
    left, right = ink[..., :16].sum((1, 2, 3)), ink[..., 16:].sum((1, 2, 3))
    assert (left > right).float().mean() > 0.9  # all but those whose right side a hole coloured


def test_distortion_is_strong_differs_and_repeats():
    changed = distort(marked(32), seeded(3))
    assert torch.equal(distort(marked(32), seeded(3)), changed)
    assert not torch.equal(distort(marked(32), seeded(4)), changed)
    assert changed.abs().max() <= 1
    assert len({tuple(picture.flatten().tolist()) for picture in changed}) == 32
    mild = augment(marked(32), seeded(3))
    assert (changed - marked(32)).abs().mean() > 2 * (mild - marked(32)).abs().mean()


def test_some_distorted_pictures_lose_their_colours():
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(900, 3, 16, 16)
    middle = distort(red, seeded())[:, :, 8, 8]
    assert 0.03 < (middle.std(dim=1) < 1e-6).float().mean() < 0.12


def test_blending_says_what_it_did():
    pictures = torch.rand(200, 3, 4, 4, generator=seeded())
    blended, other, own = blend(pictures, seeded(1), 0.5)
    assert sorted(other.tolist()) == list(range(200))
    assert 0.35 < (own == 1).float().mean() < 0.65
    assert own.min() >= 0
    expected = own[:, None, None, None] * pictures + (1 - own)[:, None, None, None] * pictures[other]
    torch.testing.assert_close(blended, expected)
    assert torch.equal(blend(pictures, seeded(1), 0.0)[0], pictures)
    assert (blend(pictures, seeded(1), 1.0)[2] < 1).all()


def test_nudging_moves_whole_pixels_onto_white():
    pictures = marked(64)
    moved = nudge(pictures, seeded(), 2)
    assert torch.equal(nudge(pictures, seeded(), 2), moved)
    seen = set()
    for picture in moved:
        rows, columns = (picture[0] < 0).nonzero().T
        assert len(rows) == 12 * 5
        assert set(picture.unique().tolist()) == {-1.0, 1.0}
        seen.add((int(rows.min()) - 10, int(columns.min()) - 4))
    assert len(seen) > 10  # down and right each on its own
    assert {row for row, _ in seen} == {column for _, column in seen} == {-2, -1, 0, 1, 2}
    edge = -torch.ones(64, 3, 8, 8)
    assert (nudge(edge, seeded(), 2)[:, :, 2:-2, 2:-2] == -1).all()
    assert (nudge(edge, seeded(), 2) == 1).any()


def test_softening_blurs_and_keeps_white_and_flat_areas():
    white = torch.ones(8, 3, 16, 16)
    assert torch.equal(soften(white, seeded()), white)
    pictures = marked(64)
    soft = soften(pictures, seeded())
    assert torch.equal(soften(pictures, seeded()), soft)
    assert soft.abs().max() <= 1
    assert (soft - pictures).abs().mean() < 0.1
    edge = (soft[:, 0, 16, 8] - soft[:, 0, 16, 9]).abs()  # 2 in the sharp picture
    assert edge.max() < 2.1
    assert edge.mean() < 1.7
    assert len({round(float(value), 4) for value in edge}) > 30
