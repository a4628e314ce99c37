"""A sample's draws depend on seed, step and place alone; processes, parts and groups share a batch out exactly."""

import dataclasses
import itertools

import pytest
import torch

from latteflow.data.loader import batch_indices
from latteflow.train.samples import Samples, step_samples


def samples_at(places, *, seed=0, step=5):
    places = torch.tensor(places, dtype=torch.int64)
    return Samples(100 + places, places, len(places), 64, seed, step)


def draws(samples, purpose="purpose"):
    return samples.rand(purpose), samples.integers(purpose, 1000), samples.randn(purpose, (2, 3))


def test_a_samples_draws_are_its_own_whatever_it_is_taken_with():
    whole = draws(samples_at(list(range(64))))
    for places in ([0], [63], [7, 3, 50], list(range(0, 64, 2)), []):
        for found, expected in zip(draws(samples_at(places)), whole, strict=True):
            assert torch.equal(found, expected[places])
            assert found.dtype == expected.dtype
            assert found.shape[1:] == expected.shape[1:]


def test_draws_do_not_depend_on_what_was_drawn_before():
    samples = samples_at([1, 2])
    first = samples.rand("time")
    samples.randn("noise", (5,))
    assert torch.equal(samples.rand("time"), first)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 6}, {"places": torch.tensor([3, 4])}])
def test_draws_differ_between_seeds_steps_places_and_purposes(change):
    samples = samples_at([1, 2])
    other = dataclasses.replace(samples, **change)
    for one, another in zip(draws(samples), draws(other), strict=True):
        assert not torch.equal(one, another)
    for one, another in zip(draws(samples), draws(samples, "another"), strict=True):
        assert not torch.equal(one, another)


def test_draws_of_a_step_are_uniform_normal_and_uncorrelated():
    """Places have seeds a fixed stride apart: neighbours must not look alike for that."""
    number = 4096
    samples = samples_at(list(range(number)))
    uniform, noise = samples.rand("time"), samples.randn("noise", (8,))
    sigma = number**-0.5
    assert abs(uniform.mean() - 0.5) < 4 * sigma / 12**0.5
    assert uniform.sort().values.sub((torch.arange(number) + 0.5) / number).abs().max() < 1.6 * sigma  # Kolmogorov
    assert len(uniform.unique()) == number
    assert noise.mean(0).abs().max() < 4 * sigma
    assert (noise.var(0) - 1).abs().max() < 4 * sigma * 2**0.5
    for lag in (1, 2, 3, 64):
        assert abs(torch.corrcoef(torch.stack([uniform[lag:], uniform[:-lag]]))[0, 1]) < 4 * sigma
        assert (noise[lag:] * noise[:-lag]).mean().abs() < 4 * sigma / 8**0.5
    assert samples.integers("caption", 7).bincount().tolist() == pytest.approx([number / 7] * 7, rel=0.2)
    assert samples.integers("caption", 1).unique().tolist() == [0]


def test_a_parts_generator_is_the_parts_alone():
    first, again, second = samples_at([0, 1]).generator, samples_at([0, 1]).generator, samples_at([2, 3]).generator
    drawn = [torch.rand(3, generator=generator) for generator in (first, again, second)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    samples = samples_at([0])
    assert samples.generator is samples.generator  # one for all draws of a part


def shares(processes, parts, **settings):
    return [step_samples(3, process=p, processes=processes, parts=parts, **settings) for p in range(processes)]


@pytest.mark.parametrize(
    ("batch_size", "processes", "parts"), [(12, 1, 1), (12, 2, 3), (7, 1, 3), (8, 4, 2), (5, 5, 1)]
)
def test_every_place_is_taken_once_and_in_order(batch_size, processes, parts):
    taken = shares(processes, parts, number=9, batch_size=batch_size, seed=0)
    flat = list(itertools.chain(*taken))
    assert [len(mine) for mine in taken] == [parts] * processes
    assert torch.equal(torch.cat([part.places for part in flat]), torch.arange(batch_size))
    index = batch_indices(3, number=9, batch_size=batch_size, seed=0)
    assert torch.equal(torch.cat([part.index for part in flat]), index)
    assert sum(part.share for part in flat) == pytest.approx(1)
    assert all(part.counted and part.total == part.batch_size == batch_size for part in flat)


def test_a_stages_own_order_is_taken():
    own = torch.tensor([8, 6, 4, 2])
    (part,) = step_samples(3, number=9, batch_size=4, seed=0, index=own)
    assert torch.equal(part.index, own)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("chosen", [[0], [7], [1, 2], [0, 3, 4, 5], list(range(8))])
def test_chosen_places_are_cut_where_the_batch_is(processes, parts, chosen):
    """So that a group sees the same parts with and without the others; nobody is left without a part among several."""
    settings = {"number": 20, "batch_size": 8, "seed": 0}
    everything = shares(processes, parts, **settings)
    taken = shares(processes, parts, chosen=torch.tensor(chosen), **settings)
    for mine, all_of_mine in zip(taken, everything, strict=True):
        cut = [[p for p in part.places.tolist() if p in chosen and part.counted] for part in all_of_mine]
        if processes == 1:
            assert [part.places.tolist() for part in mine] == [part for part in cut if part]
            assert all(part.counted for part in mine)
        else:
            assert len(mine) == parts
            assert [part.places.tolist() if part.counted else [] for part in mine] == cut
    flat = list(itertools.chain(*taken))
    assert sum(part.share for part in flat) == pytest.approx(1)
    index = batch_indices(3, number=20, batch_size=8, seed=0)
    for part in flat:
        assert torch.equal(part.index, index[part.places])
        if not part.counted:
            assert part.places.tolist() == chosen[:1]
            assert part.share == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_where_nothing_is_chosen_nobody_takes_anything(processes):
    nothing = torch.tensor([], dtype=torch.int64)
    assert shares(processes, 2, number=9, batch_size=4, seed=0, chosen=nothing) == [[]] * processes


def test_steps_go_through_the_set_once_an_epoch():
    seen = [i for step in range(9) for part in step_samples(step, number=12, batch_size=4, seed=3, parts=2)
            for i in part.index.tolist()]  # fmt: skip
    for epoch in range(3):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert seen[:12] != seen[12:24]
