"""The order of examples is a pure function of seed and position."""

import itertools

import numpy as np
import pytest

from diffusion_lab.data.order import GlobalBatches, coin, order


def take(n, **options):
    return list(itertools.islice(iter(GlobalBatches(**options)), n))


def test_every_epoch_is_another_permutation():
    epochs = order(0, 7, range(21)).reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(epochs[0], order(1, 7, range(7)))


def test_order_does_not_depend_on_how_it_is_asked():
    whole = order(3, 11, range(50))
    assert np.array_equal(order(3, 11, [40, 2, 17]), whole[[40, 2, 17]])


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_processes_and_micro_batches_share_the_global_batch(world, accumulate):
    parts = [
        take(3 * accumulate, start=16, batch_size=16, rank=r, world=world, accumulate=accumulate)
        for r in range(world)
    ]
    assert all(len(batch) == 16 // world // accumulate for rank in parts for batch in rank)
    for step in range(3):
        micro = range(step * accumulate, (step + 1) * accumulate)
        # interleaving the processes gives the rows of each micro-batch in order
        rows = [row for j in micro for row in np.stack([rank[j] for rank in parts], 1).ravel()]
        assert rows == list(range(16 * (step + 1), 16 * (step + 2)))


def test_a_later_start_continues():
    assert take(2, start=32, batch_size=16) == take(4, start=0, batch_size=16)[2:]


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="divide"):
        GlobalBatches(start=0, batch_size=10, world=3)
    with pytest.raises(ValueError, match="start"):
        GlobalBatches(start=5, batch_size=10)
    with pytest.raises(ValueError, match="zero"):
        order(0, 0, [0])


def test_coins_are_fair_independent_and_addressed():
    bits = coin(0, range(100_000))
    assert abs(bits.mean() - 0.5) < 0.01 and abs((bits[1:] == bits[:-1]).mean() - 0.5) < 0.01
    assert np.array_equal(coin(0, [5, 99]), bits[[5, 99]])
    assert abs((coin(1, range(100_000)) == bits).mean() - 0.5) < 0.01
