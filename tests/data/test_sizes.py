"""Sizes of one area, the nearest for each picture, and batches of one size that lose no sample."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latteflow.data.sizes import BucketedBatches, as_input, bucket_sizes, fitted, nearest_size
from latteflow.errors import UserError
from picture_sets import picture


def test_sizes_by_hand():
    assert bucket_sizes(256, factor=32) == ((256, 256),)
    assert bucket_sizes(256, factor=32, most_aspect=2) == ((192, 320), (224, 288), (256, 256), (288, 224), (320, 192))
    assert bucket_sizes(64, factor=8, most_aspect=3)[0] == (40, 96)


@settings(max_examples=100, deadline=None)
@given(
    side=st.sampled_from([256, 512, 1024]) | st.integers(1, 24).map(lambda n: n * 32),
    factor=st.sampled_from([8, 16, 32]),
    most_aspect=st.floats(1, 8),
)
def test_no_size_costs_more_than_the_square_or_much_less(side, factor, most_aspect):
    sizes = bucket_sizes(side, factor=factor, most_aspect=most_aspect)
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes)
    assert [size[::-1] for size in reversed(sizes)] == list(sizes)  # what lies can stand
    for height, width in sizes:
        assert height % factor == width % factor == 0
        assert side * side - factor * min(height, width) < height * width <= side * side
        assert max(height, width) <= most_aspect * min(height, width)


@pytest.mark.parametrize(
    ("size", "most_aspect", "message"),
    [(250, 1, "size 250 is not a multiple of 32.*take 256"), (5, 1, "take 32"), (256, 0.5, "an aspect of 0.5")],
)
def test_sizes_that_cannot_be(size, most_aspect, message):
    with pytest.raises(UserError, match=message):
        bucket_sizes(size, factor=32, most_aspect=most_aspect)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_the_nearest_size_is_the_nearest_by_ratio(width, height):
    sizes = bucket_sizes(512, factor=32, most_aspect=2)
    found = nearest_size(width, height, sizes)

    def distance(size):
        one, other = size[1] / size[0], width / height
        return max(one / other, other / one)

    assert distance(sizes[found]) <= min(map(distance, sizes)) * (1 + 1e-12)
    mirrored = nearest_size(height, width, [size[::-1] for size in sizes])
    assert mirrored == found or math.isclose(distance(sizes[found]), distance(sizes[mirrored]))


def test_the_middle_between_two_sizes_is_the_geometric_one():
    sizes = ((32, 128), (64, 64), (128, 32))
    assert [nearest_size(*shape, sizes) for shape in ((22, 10), (19, 10), (10, 19), (10, 22))] == [0, 1, 1, 2]
    assert nearest_size(2, 1, sizes) == 0  # the first of two as near


def test_pictures_as_long_as_wide_take_the_square():
    sizes = bucket_sizes(1024, factor=32, most_aspect=2)
    assert sizes[nearest_size(333, 333, sizes)] == (1024, 1024)
    assert sizes[nearest_size(3000, 10, sizes)] == sizes[0]
    assert sizes[nearest_size(10, 3000, sizes)] == sizes[-1]


class TestFitted:
    @pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24), (96, 96)])
    @pytest.mark.parametrize("given", [(40, 40), (100, 30), (30, 100), (1, 1), (7, 200)])
    def test_the_size_asked_for_and_the_same_every_time(self, size, given):
        image = picture(0, *given)
        found = fitted(image, size)
        assert (found.dtype, tuple(found.shape)) == (torch.uint8, (3, *size))
        assert torch.equal(found, fitted(image.copy(), size))

    def test_a_picture_of_that_size_is_left_alone(self):
        image = picture(1, 40, 24)
        assert torch.equal(fitted(image, (24, 40)).permute(1, 2, 0), torch.from_numpy(np.array(image)))

    def test_what_is_cut_off_is_the_same_on_both_sides(self):
        image = Image.new("RGB", (60, 20), "red")
        image.paste((0, 255, 0), (20, 0, 40, 20))  # the middle third
        assert fitted(image, (20, 20)).flatten(1).unique(dim=1).tolist() == [[0], [255], [0]]
        standing = fitted(image.transpose(Image.Transpose.ROTATE_90), (20, 20))
        assert standing.flatten(1).unique(dim=1).tolist() == [[0], [255], [0]]

    def test_shrinking_sees_every_pixel(self):
        """Fine stripes become grey, not the colour of whichever is hit."""
        stripes = np.zeros((64, 64, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        found = fitted(Image.fromarray(stripes), (8, 8))[:, 2:-2, 2:-2].int()
        assert (found - 127).abs().max() <= 2

    def test_input_is_between_minus_one_and_one(self):
        found = as_input(torch.tensor([[0, 51, 255]], dtype=torch.uint8))
        assert found.dtype == torch.float32
        assert torch.allclose(found, torch.tensor([[-1.0, -0.6, 1.0]]))


buckets = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)


class TestBucketedBatches:
    @settings(max_examples=80, deadline=None)
    @given(buckets=buckets, batch_size=st.integers(1, 12), seed=st.integers(0, 2**40))
    def test_a_batch_is_of_one_bucket_and_no_sample_is_lost(self, buckets, batch_size, seed):
        batches = BucketedBatches(buckets, batch_size, seed)
        epochs = 2 * batch_size  # by then every bucket has filled its batches without a rest, twice
        steps = batches.first_step(epochs)
        assert steps == 2 * len(buckets)
        seen = torch.zeros(len(buckets), dtype=torch.int64)
        streams = {}
        for step in range(steps):
            index = batches.indices(step)
            assert index.shape == (batch_size,)
            [bucket] = buckets[index].unique().tolist()
            streams.setdefault(bucket, []).append(index)
            seen += torch.bincount(index, minlength=len(buckets))
        assert seen.tolist() == [epochs] * len(buckets)  # all equally often
        for bucket, parts in streams.items():
            stream, members = torch.cat(parts), (buckets == bucket).nonzero()[:, 0].tolist()
            for start in range(0, len(stream), len(members)):  # one whole pass after the other
                assert sorted(stream[start : start + len(members)].tolist()) == members

    @settings(max_examples=80, deadline=None)
    @given(buckets=buckets, batch_size=st.integers(1, 12), seed=st.integers(0, 99), step=st.integers(0, 10**6))
    def test_a_pure_function_of_seed_and_step(self, buckets, batch_size, seed, step):
        first = BucketedBatches(buckets, batch_size, seed).indices(step)
        torch.rand(3)  # the global generator has no say
        other = BucketedBatches(buckets, batch_size, seed)
        other.indices(step + 1)
        assert torch.equal(other.indices(step), first)

    def test_epochs_seeds_and_the_order_of_buckets_differ(self):
        buckets = torch.arange(64) // 16
        batches = BucketedBatches(buckets, 4, seed=0)
        assert batches.first_step(1) == 16
        epochs = [[batches.indices(16 * epoch + i).tolist() for i in range(16)] for epoch in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        order = [int(buckets[index[0]]) for index in epochs[0]]
        assert order != sorted(order)
        assert [BucketedBatches(buckets, 4, seed=1).indices(i).tolist() for i in range(16)] != epochs[0]

    def test_one_bucket_is_not_drawn_like_another(self):
        batches = BucketedBatches(torch.arange(40) % 2, 20, seed=0)
        one, other = sorted((batches.indices(step).tolist() for step in range(2)), key=lambda index: index[0] % 2)
        assert [i + 1 for i in one] != other

    def test_the_batches_are_the_same_for_ever(self):
        """A run resumed with a later version goes on with the same samples: these numbers must not change."""
        batches = BucketedBatches(torch.arange(9) % 2, 3, seed=7)
        assert [batches.indices(step).tolist() for step in range(4)] == [[3, 1, 5], [0, 8, 4], [6, 2, 4], [7, 1, 5]]
