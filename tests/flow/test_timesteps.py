"""Training times: the right distribution, always inside the expert's interval, and fair shares of a batch."""

import math
from itertools import accumulate
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.errors import UserError
from latteflow.flow.intervals import EDGE_TOLERANCE, Intervals
from latteflow.flow.timesteps import balanced_groups, sample_timesteps, widened

SEEDED = settings(deadline=None, derandomize=True, database=None)
UNEVEN = Intervals.from_edges((0, 0.1, 0.35, 0.8, 1))


def partitions() -> st.SearchStrategy[Intervals]:
    """Return intervals with any inner edges, about half of them nearly as short as is allowed."""
    gap = st.one_of(st.integers(1, 3), st.integers(1, 12_000)).map(lambda n: 2.5 * EDGE_TOLERANCE * n)
    return st.lists(gap, max_size=30).map(lambda gaps: Intervals.from_edges([0, *accumulate(gaps), 1]))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def largest_gap(samples, cdf):
    """Return the Kolmogorov-Smirnov distance between samples and a distribution function."""
    samples = sorted(samples)
    n = len(samples)
    expected = [cdf(t) for t in samples]
    return max(max(abs((i + 1) / n - f), abs(i / n - f)) for i, f in enumerate(expected))


def global_cdf(t, mean, std):
    if t in (0, 1):
        return float(t)
    return NormalDist(mean, std).cdf(math.log(t / (1 - t)))


@pytest.mark.parametrize("k", range(4))
def test_uniform_times_fill_their_interval_evenly(k):
    n, (lo, hi) = 20_000, UNEVEN.bounds(k)
    t = sample_timesteps(torch.full((n,), k), UNEVEN, generator=seeded(k))
    assert t.dtype == torch.float32
    assert largest_gap(t.tolist(), lambda t: (t - lo) / (hi - lo)) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize(("mean", "std", "mix"), [(0.0, 1.0, 0.1), (0.7, 0.5, 0.1), (-1.0, 1.5, 0.4), (0.0, 1.0, 1.0)])
def test_logit_normal_times_follow_the_one_global_density_restricted_to_the_interval(k, mean, std, mix):
    n, (lo, hi) = 20_000, UNEVEN.bounds(k)
    t = sample_timesteps(
        torch.full((n,), k), UNEVEN, density="logit_normal", mean=mean, std=std, uniform_mix=mix, generator=seeded(k)
    )
    below, above = global_cdf(lo, mean, std), global_cdf(hi, mean, std)

    def cdf(t):
        restricted = (global_cdf(t, mean, std) - below) / (above - below)
        return mix * (t - lo) / (hi - lo) + (1 - mix) * restricted

    assert largest_gap(t.tolist(), cdf) < 1.95 / math.sqrt(n)


@SEEDED
@given(partitions(), st.integers(0, 2**31))
def test_uniform_times_route_back_to_their_group(partition, seed):
    groups = torch.arange(len(partition)).repeat(50)
    t = sample_timesteps(groups, partition, generator=seeded(seed))
    assert torch.equal(partition.group_of(t), groups)


@SEEDED
@given(st.integers(1, 28), st.floats(-1, 1), st.floats(0.7, 3), st.floats(0.1, 1), st.integers(0, 2**31))
def test_logit_normal_times_route_back_to_their_group(num_groups, mean, std, mix, seed):
    partition = Intervals.uniform(num_groups)
    groups = torch.arange(num_groups).repeat(50)
    t = sample_timesteps(
        groups, partition, density="logit_normal", mean=mean, std=std, uniform_mix=mix, generator=seeded(seed)
    )
    assert torch.equal(partition.group_of(t), groups)


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("k", range(4))
def test_widened_times_fill_what_lies_between_noise_and_their_intervals_end(k, share):
    n, (lo, hi) = 20_000, UNEVEN.bounds(k)
    groups = torch.full((n,), k)
    own = sample_timesteps(groups, UNEVEN, generator=seeded(k))
    t, begins = widened(own, groups, UNEVEN, share), lo * (1 - share)
    assert t.dtype == torch.float32
    assert begins - 1e-6 <= t.min()
    assert t.max() <= hi + 1e-6
    assert largest_gap(t.tolist(), lambda t: (t - begins) / (hi - begins)) < 1.95 / math.sqrt(n)
    if share == 0 or k == 0:
        torch.testing.assert_close(t, own, rtol=0, atol=1e-6)


def test_times_depend_on_the_generator_alone():
    groups = torch.arange(4).repeat(8)
    first, again, other = (sample_timesteps(groups, UNEVEN, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "options",
    [
        {"uniform_mix": 0.0},
        {"uniform_mix": 0.099},
        {"uniform_mix": 1.1},
        {"uniform_mix": math.nan},
        {"std": 0.0},
        {"std": -1.0},
        {"std": math.inf},
        {"mean": math.nan},
        {"mean": 30.0},  # leaves the first interval without any mass
    ],
)
def test_densities_that_starve_an_expert_are_refused(options):
    with pytest.raises(UserError):
        sample_timesteps(torch.arange(4), UNEVEN, density="logit_normal", generator=seeded(), **options)


def test_unknown_densities_are_refused_with_the_choice():
    with pytest.raises(UserError, match="logit_normal"):
        sample_timesteps(torch.arange(4), UNEVEN, density="cosine", generator=seeded())


@pytest.mark.parametrize("group", [-1, 4])
def test_groups_that_do_not_exist_are_refused(group):
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        sample_timesteps(torch.tensor([0, group]), UNEVEN, generator=seeded())


@SEEDED
@given(st.integers(1, 200), st.integers(1, 28), st.integers(0, 2**31))
def test_shares_of_a_batch_differ_by_at_most_one(batch_size, num_groups, seed):
    groups = balanced_groups(batch_size, num_groups, generator=seeded(seed))
    assert groups.shape == (batch_size,)
    assert groups.dtype == torch.int64
    counts = torch.bincount(groups, minlength=num_groups)
    assert len(counts) == num_groups
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(("batch_size", "num_groups"), [(3, 7), (10, 4), (15, 7)])
def test_the_remainder_is_shared_equally_on_average(batch_size, num_groups):
    generator, n = seeded(), 4000
    total = sum(
        torch.bincount(balanced_groups(batch_size, num_groups, generator=generator), minlength=num_groups)
        for _ in range(n)
    )
    share = (batch_size % num_groups) / num_groups
    spread = math.sqrt(n * share * (1 - share))
    assert (total - n * batch_size / num_groups).abs().max() < 4 * spread


def test_groups_come_in_random_order():
    generator = seeded()
    at_first_place = torch.stack([balanced_groups(8, 4, generator=generator)[0] for _ in range(2000)])
    assert (torch.bincount(at_first_place, minlength=4) - 500).abs().max() < 4 * math.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize(("batch_size", "num_groups"), [(0, 4), (4, 0), (-1, 4)])
def test_empty_batches_are_refused(batch_size, num_groups):
    with pytest.raises(ValueError, match="at least 1"):
        balanced_groups(batch_size, num_groups, generator=seeded())
