"""Routing: every time has exactly one expert, and the solver's own times find theirs."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.errors import UserError
from latteflow.flow.intervals import EDGE_TOLERANCE, Intervals

SEEDED = settings(deadline=None, derandomize=True, database=None)


def partitions() -> st.SearchStrategy[Intervals]:
    """Return intervals with any inner edges, about half of them nearly as short as is allowed."""
    gap = st.one_of(st.integers(1, 3), st.integers(1, 12_000)).map(lambda n: 2.5 * EDGE_TOLERANCE * n)
    return st.lists(gap, max_size=30).map(lambda gaps: Intervals.from_edges([0, *accumulate(gaps), 1]))


def times(partition: Intervals) -> st.SearchStrategy[float]:
    """Return times anywhere in [0, 1], and within a few tolerances of an edge."""
    offset = st.sampled_from([-2.0, -1.0, -0.999, -0.5, 0.0, 0.5, 1.0, 2.0]).map(lambda n: n * EDGE_TOLERANCE)
    near = st.tuples(st.sampled_from(partition.edges), offset).map(lambda pair: min(max(sum(pair), 0.0), 1.0))
    return st.one_of(st.floats(0, 1), near)


@SEEDED
@given(st.data())
def test_every_time_belongs_to_exactly_one_interval(data):
    partition = data.draw(partitions())
    t = data.draw(times(partition))

    def owns(k):
        lo, hi = partition.bounds(k)
        return (k == 0 or t >= lo - EDGE_TOLERANCE) and (k == len(partition) - 1 or t < hi - EDGE_TOLERANCE)

    assert [k for k in range(len(partition)) if owns(k)] == [partition.group_of(t)]


@SEEDED
@given(st.data())
def test_numbers_and_tensors_are_routed_alike(data):
    partition = data.draw(partitions())
    t = data.draw(st.lists(times(partition), max_size=20))
    groups = partition.group_of(torch.tensor(t, dtype=torch.float64))
    assert groups.dtype == torch.int64
    assert groups.tolist() == [partition.group_of(time) for time in t]


def test_group_0_owns_the_noisiest_interval_and_edges_belong_to_the_upper_one():
    partition = Intervals.from_edges((0, 0.25, 0.5, 1))
    assert [partition.group_of(t) for t in (0.0, 0.2, 0.25, 0.3, 0.5, 0.9, 1.0)] == [0, 0, 1, 1, 2, 2, 2]
    below = [0.25 - EDGE_TOLERANCE * share for share in (0.5, 1, 2)]
    assert [partition.group_of(t) for t in below] == [1, 1, 0]


def test_a_tensor_of_times_keeps_its_shape():
    partition = Intervals.uniform(4)
    assert partition.group_of(torch.tensor([[0.0, 0.3], [0.5, 1.0]])).tolist() == [[0, 1], [2, 3]]
    assert partition.group_of(torch.tensor(0.6)).shape == ()


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 7, 14, 28])
def test_every_edge_is_routed_to_the_interval_it_opens(num_groups):
    partition = Intervals.uniform(num_groups)
    assert len(partition) == num_groups
    for dtype in (torch.float32, torch.float64):
        groups = partition.group_of(torch.tensor(partition.edges, dtype=dtype))
        assert groups.tolist() == [*range(num_groups), num_groups - 1]


@pytest.mark.parametrize("num_groups", [2, 4, 7, 14, 28])
@pytest.mark.parametrize("step_count", [28, 56, 140])
def test_float32_times_that_a_solver_accumulates_find_their_expert(num_groups, step_count):
    partition = Intervals.uniform(num_groups)
    t, step = torch.zeros((), dtype=torch.float32), torch.tensor(1 / step_count, dtype=torch.float32)
    for i in range(step_count):
        assert partition.group_of(t) == i * num_groups // step_count
        t = t + step


def test_times_read_from_float32_timesteps_would_be_misrouted_without_the_tolerance():
    partition = Intervals.uniform(7)
    expected = [i // 4 for i in range(28)]
    timesteps = torch.tensor([1000 * (1 - i / 28) for i in range(28)], dtype=torch.float32)
    t = 1 - timesteps / 1000
    by_comparison = torch.bucketize(t.double(), torch.tensor(partition.edges[1:-1], dtype=torch.float64), right=True)
    assert by_comparison.tolist() != expected  # the trap is real
    assert partition.group_of(t).tolist() == expected


@pytest.mark.parametrize("t", [-2 * EDGE_TOLERANCE, 1 + 2 * EDGE_TOLERANCE, -1.0, 80.0, math.nan, math.inf, -math.inf])
def test_times_outside_the_flow_are_refused(t):
    partition = Intervals.uniform(4)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        partition.group_of(t)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        partition.group_of(torch.tensor([0.5, t], dtype=torch.float64))


def test_times_off_the_ends_by_rounding_are_kept():
    partition = Intervals.uniform(4)
    slightly_outside = [-0.9 * EDGE_TOLERANCE, 1 + 0.9 * EDGE_TOLERANCE]
    assert [partition.group_of(t) for t in slightly_outside] == [0, 3]
    assert partition.group_of(torch.tensor(slightly_outside, dtype=torch.float64)).tolist() == [0, 3]


@pytest.mark.parametrize(
    "edges",
    [
        (),
        (0,),
        (0.1, 1),
        (0, 0.9),
        (0, 0.5, 0.5, 1),
        (0, 0.6, 0.4, 1),
        (0, 0.5, 0.5 + 1.9 * EDGE_TOLERANCE, 1),
        (0, math.nan, 1),
        (0, math.inf, 1),
        (math.nan, 1),
        ("a", 1),
        (0, None, 1),
        3,
    ],
)
def test_edges_that_are_no_partition_are_refused(edges):
    with pytest.raises(UserError, match="interval edges must"):
        Intervals.from_edges(edges)


def test_edges_may_come_from_a_configuration():
    assert Intervals.from_edges([0, "0.5", 1]) == Intervals(edges=(0.0, 0.5, 1.0)) == Intervals.uniform(2)
    assert Intervals.uniform(4).bounds(1) == (0.25, 0.5)


def test_the_constructor_validates_too():
    with pytest.raises(UserError, match="interval edges must"):
        Intervals(edges=(0.0, 2.0, 1.0))


@pytest.mark.parametrize("num_groups", [0, -1, 1_000_000])
def test_impossible_numbers_of_groups_are_refused(num_groups):
    with pytest.raises(UserError, match="number of groups"):
        Intervals.uniform(num_groups)


@pytest.mark.parametrize("k", [-1, 4])
def test_bounds_of_a_group_that_does_not_exist_are_refused(k):
    with pytest.raises(IndexError):
        Intervals.uniform(4).bounds(k)
