"""Who goes next, and that nobody waits for ever."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.serve.engine.policy import choose


def drawing(kind, t=0.0, passed_over=0):
    return SimpleNamespace(kind=kind, t=t, passed_over=passed_over)


def chosen(drawings, max_batch=4, patience=8):
    return choose(drawings, lambda one: one.kind, max_batch=max_batch, patience=patience)


def test_the_fullest_kind_goes_first():
    drawings = [drawing("a"), drawing("b"), drawing("b")]
    assert chosen(drawings) == drawings[1:]
    assert [one.passed_over for one in drawings] == [1, 0, 0]


def test_fuller_than_a_forward_counts_no_more():
    """Of two kinds that fill a forward, the one that is further on its way makes room first."""
    drawings = [drawing("a", 0.1) for _ in range(6)] + [drawing("b", 0.6) for _ in range(2)]
    assert [one.kind for one in chosen(drawings, max_batch=2)] == ["b", "b"]


def test_patience_ends():
    lonely = drawing("a", passed_over=8)
    assert chosen([drawing("b"), drawing("b"), lonely]) == [lonely]


def test_within_a_kind_those_who_waited_longest():
    drawings = [drawing("a", passed_over=i) for i in (0, 3, 1, 2)]
    assert chosen(drawings, max_batch=2) == [drawings[1], drawings[3]]


@settings(max_examples=50, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 4), min_size=1, max_size=24),
    max_batch=st.integers(1, 5),
    patience=st.integers(1, 6),
    arrivals=st.lists(st.integers(0, 4), min_size=60, max_size=60),
)
def test_nobody_is_passed_over_without_end(kinds, max_batch, patience, arrivals):
    """With n under way, a picture waits for fewer than patience + n forwards, whoever else comes in place of others."""
    drawings = [drawing(kind) for kind in kinds]
    for arrival in arrivals:
        for one in chosen(drawings, max_batch, patience):
            one.kind = arrival  # on to another group, or another picture in its slot
        assert max(one.passed_over for one in drawings) < patience + len(drawings)
