"""Which samples a step sees follows from seed and step alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.data.loader import batch_indices, generator_of, kept_apart


@settings(max_examples=60, deadline=None)
@given(number=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_every_epoch_holds_every_sample_once(number, batch_size, seed, epochs):
    steps = -(-number * epochs // batch_size)
    stream = torch.cat([batch_indices(step, number=number, batch_size=batch_size, seed=seed) for step in range(steps)])
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        assert stream[epoch * number : (epoch + 1) * number].sort().values.tolist() == list(range(number))


@settings(max_examples=60, deadline=None)
@given(step=st.integers(0, 10**6), number=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_batch_is_a_pure_function_of_seed_and_step(step, number, batch_size, seed):
    first = batch_indices(step, number=number, batch_size=batch_size, seed=seed)
    torch.rand(3)  # the global generator has no say
    assert torch.equal(batch_indices(step, number=number, batch_size=batch_size, seed=seed), first)
    assert first.dtype == torch.int64
    assert first.shape == (batch_size,)


def test_epochs_and_seeds_differ():
    epochs = [batch_indices(step, number=50, batch_size=50, seed=0).tolist() for step in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert batch_indices(0, number=50, batch_size=50, seed=1).tolist() != epochs[0]


def test_generators_differ_by_seed_and_by_every_part_of_the_key():
    keys = [(0,), (1,), (0, "step"), (0, "step", 1), (0, "step", 2), (0, "step", 1, 0), (0, "1"), (0, 1)]
    draws = [torch.rand(4, generator=generator_of(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert torch.rand(4, generator=generator_of(0, "step", 1)).tolist() == draws[3]


def test_the_seeds_are_the_same_for_ever():
    """A run resumed with a later version goes on with the same samples: this number must not change."""
    assert generator_of(7, "epoch", 1).initial_seed() == 839277825198138934


@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 200), validation=st.integers(0, 220), fewer=st.integers(0, 220))
def test_as_many_are_kept_apart_as_asked_and_the_same_always(number, validation, fewer):
    apart = kept_apart(number, validation)
    assert (apart.dtype, apart.shape) == (torch.bool, (number,))
    assert int(apart.sum()) == min(number, validation)
    torch.manual_seed(validation)
    assert torch.equal(kept_apart(number, validation), apart)
    assert fewer > validation or not (kept_apart(number, fewer) & ~apart).any()


def test_every_class_of_a_sorted_source_is_kept_and_trained():
    """A hundred classes of a hundred, one after the other, of which a tenth is kept."""
    kept = kept_apart(10_000, 1000).reshape(100, 100).sum(1)
    assert kept.min() > 0
    assert kept.max() < 30


def test_what_is_kept_apart_is_the_same_for_ever():
    """A run resumed with a later version must not train on what it was measured with: these must not change."""
    assert kept_apart(40, 6).nonzero()[:, 0].tolist() == [1, 26, 27, 28, 31, 33]
