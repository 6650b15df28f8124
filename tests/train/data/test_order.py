"""The order of the samples: hypothesis looks for a step, a split or an epoch that breaks it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fpsc.errors import UserError
from fpsc.train.data import Batch, Order, Sample, order, prefetched
from fpsc.train.data.order import permuted
from fpsc.train.data.sample import Bucket


@dataclass
class Numbers:
    """Samples that hold their own index; one shape for each bucket."""

    sizes: tuple[tuple[int, ...], ...]  # of the shards of each bucket
    together: int = 1 << 30
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(sum, self.sizes))

    @property
    def buckets(self) -> list[Bucket]:
        found, first = [], 0
        for number, shards in enumerate(self.sizes):
            found.append(Bucket(first, shards, self.together, f"bucket {number}"))
            first += sum(shards)
        return found

    def which(self, index: int) -> int:
        """The bucket of a sample."""
        return next(i for i, b in reversed(list(enumerate(self.buckets))) if index >= b.first)

    def sample(self, index: int) -> Sample:
        self.read.append(index)
        width = 1 + self.which(index)
        return Sample(f"n#{index}", torch.full((1, 1, 1, width), float(index)), {})


@dataclass
class Plain:
    """The least that a source is: no buckets."""

    count: int

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        return Sample(str(index), torch.full((1, 1, 1, 1), float(index)), {})


shards = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple)
SOURCES = st.builds(
    Numbers, st.lists(shards, min_size=1, max_size=3).map(tuple), together=st.integers(1, 7)
)
SEEDS = st.integers(0, 2**63)


def smallest(source: Numbers) -> int:
    return min(map(sum, source.sizes))


@st.composite
def splits(draw: st.DrawFn) -> tuple[Numbers, int, int]:
    """A source, and ranks and samples of each that its smallest bucket is big enough for."""
    source = draw(SOURCES)
    ranks = draw(st.integers(1, min(3, smallest(source))))
    return source, ranks, draw(st.integers(1, smallest(source) // ranks))


@given(st.integers(1, 400), st.lists(st.integers(-2, 2**64), min_size=1, max_size=3))
def test_a_permutation_hits_everything_once(count: int, key: list[int]) -> None:
    assert sorted(permuted(i, count, *key) for i in range(count)) == list(range(count))


@given(SEEDS, st.integers(0, 2**31 - 1))
def test_a_permutation_of_the_demos_clips_stays_inside(seed: int, index: int) -> None:
    assert 0 <= permuted(index, 2**31, seed) < 2**31


def test_permutations_are_spread_evenly() -> None:
    """Over many keys every place is equally likely: chi-square of 6 x 6 within five sigma."""
    n, keys = 6, 6000
    table = [[0] * n for _ in range(n)]
    for key in range(keys):
        for i in range(n):
            table[i][permuted(i, n, key)] += 1
    expected = keys / n
    chi = sum((found - expected) ** 2 / expected for row in table for found in row)
    freedom = (n - 1) ** 2
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("index", [-1, 5])
def test_a_permutation_of_what_is_not_there(index: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 4"):
        permuted(index, 5, 0)


@given(splits(), SEEDS, st.integers(1, 4))
@example((Numbers(((1,),)), 1, 1), 0, 3)
def test_every_sample_once_an_epoch(
    split: tuple[Numbers, int, int], seed: int, epochs: int
) -> None:
    """Every bucket gives all its samples before it gives one again, whatever is left over."""
    source, ranks, size = split
    found = order(source, seed)
    drawn: list[list[int]] = [[] for _ in source.sizes]
    taken: list[list[int]] = []
    for step in range(found.steps_before(epochs, ranks * size)):
        batch = [i for rank in range(ranks) for i in found.indices(step, rank, ranks, size)]
        which = {source.which(i) for i in batch}
        assert len(which) == 1  # one shape
        taken.append(batch)
    # Batches of a bucket come in any order within an epoch; the stream that they cut does not.
    for epoch in range(epochs):
        first, end = (found.steps_before(e, ranks * size) for e in (epoch, epoch + 1))
        for batch in taken[first:end]:
            drawn[source.which(batch[0])] += batch
    for bucket, stream in zip(source.buckets, drawn, strict=True):
        n, whole = len(bucket), epochs * len(bucket) // (ranks * size) * ranks * size
        assert len(stream) == whole
        counts = Counter(stream)
        assert set(counts) <= set(range(bucket.first, bucket.first + n))
        assert all(whole // n <= counts[i] for i in range(bucket.first, bucket.first + n))
        assert all(count <= -(-whole // n) for count in counts.values())


@given(SOURCES, SEEDS)
def test_batches_that_divide_a_bucket_are_its_epochs(source: Numbers, seed: int) -> None:
    found = order(source, seed)
    for epoch in range(3):
        first, end = (found.steps_before(e, 1) for e in (epoch, epoch + 1))
        drawn = [i for step in range(first, end) for i in found.indices(step, 0, 1, 1)]
        assert sorted(drawn) == list(range(len(source)))


@given(splits(), SEEDS, st.integers(0, 60))
def test_ranks_partition_the_batch(split: tuple[Numbers, int, int], seed: int, step: int) -> None:
    source, ranks, size = split
    found = order(source, seed)
    parts = [found.indices(step, rank, ranks, size) for rank in range(ranks)]
    assert [i for part in parts for i in part] == found.indices(step, 0, 1, ranks * size)


@given(splits(), SEEDS, st.integers(0, 40))
def test_a_resumed_run_is_the_unbroken_one(
    split: tuple[Numbers, int, int], seed: int, stop: int
) -> None:
    """And it reads nothing of what came before."""
    source, ranks, size = split
    unbroken = [order(source, seed).indices(step, 0, ranks, size) for step in range(stop + 5)]
    again = replace(source, read=[])
    resumed = order(again, seed)
    after = [resumed.batch(step, 0, ranks, size) for step in range(stop, stop + 5)]
    assert [[int(key[2:]) for key in batch.keys] for batch in after] == unbroken[stop:]
    assert again.read == [i for step in unbroken[stop:] for i in step]


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_seeds_differ(a: int, b: int) -> None:
    source = Plain(1000)
    first, second = (order(source, seed).indices(0, 0, 1, 8) for seed in (a, b))
    assert (first == second) == (a == b)


def test_epochs_differ() -> None:
    found = order(Plain(64), 0)
    epochs = [[i for s in range(e * 8, e * 8 + 8) for i in found.indices(s, 0, 1, 8)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1] != list(range(64))


def test_few_shards_are_open_at_once() -> None:
    """Of 20 shards 3 are shuffled together: the epoch is read in 7 groups, in another order."""
    source = Numbers(((10,) * 20,), together=3)
    found = order(source, 1)
    drawn = [found.indices(step, 0, 1, 1)[0] for step in range(200)]
    assert sorted(drawn) == list(range(200))
    groups = [{i // 10 for i in drawn[start : start + 30]} for start in range(0, 200, 30)]
    assert [len(group) for group in groups] == [3] * 6 + [2]
    assert drawn[:30] != sorted(drawn[:30])
    assert [min(group) for group in groups] != sorted(min(group) for group in groups)


def test_a_bucket_that_is_smaller_than_a_batch() -> None:
    source = Numbers(((8,), (2, 1)))
    with pytest.raises(UserError) as caught:
        order(source, 0).batch(0, rank=0, ranks=2, size=2)
    message = str(caught.value)
    assert message.startswith("bucket 1: expected at least 4") and "found 3" in message
    assert "leave_out" in message


def test_a_source_without_samples() -> None:
    with pytest.raises(UserError, match="found none"):
        order(Plain(0), 0)


@pytest.mark.parametrize(
    "given", [(-1, 0, 1, 1), (0, 1, 1, 1), (0, -1, 1, 1), (0, 0, 1, 0)], ids=str
)
def test_numbers_out_of_range(given: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected step >= 0"):
        order(Plain(4), 0).batch(*given)


# ---- read ahead


def keys(batches: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.keys for batch in batches]


def test_prefetched_is_the_order() -> None:
    found = order(Numbers(((7,), (9, 4))), 3)
    ahead = prefetched(found, 5, rank=1, ranks=2, size=2)
    assert keys([next(ahead) for _ in range(9)]) == keys(
        [found.batch(step, 1, 2, 2) for step in range(5, 14)]
    )
    ahead.close()


def test_reading_runs_ahead_and_no_further() -> None:
    source = Numbers(((50,),))
    arrived = threading.Semaphore(0)

    class Telling(Numbers):
        def sample(self, index: int) -> Sample:
            arrived.release()
            return source.sample(index)

    ahead = prefetched(order(Telling(source.sizes), 0), 0, size=1, ahead=3)
    next(ahead)
    for _ in range(5):  # one used, three that wait, one in the thread's hands
        assert arrived.acquire(timeout=30)
    assert not arrived.acquire(timeout=0.5)
    ahead.close()


def test_an_error_comes_at_its_step_and_the_thread_ends() -> None:
    class Broken(Numbers):
        def sample(self, index: int) -> Sample:
            if len(self.read) == 3:
                raise UserError("shard 3 is corrupt")
            return super().sample(index)

    ahead = prefetched(order(Broken(((9,),)), 0), 0, size=1, ahead=8)
    got = [next(ahead) for _ in range(3)]
    assert len(got) == 3
    with pytest.raises(UserError, match="shard 3"):
        next(ahead)
    assert not any(thread.name == "fpsc-data" for thread in threading.enumerate())


def test_closing_ends_the_thread() -> None:
    ahead = prefetched(order(Plain(9), 0), 0, size=1)
    next(ahead)
    ahead.close()
    assert not any(thread.name == "fpsc-data" for thread in threading.enumerate())


def test_an_order_is_a_value() -> None:
    """It holds no state: two of them agree in any order of steps."""
    a, b = order(Plain(40), 5), order(Plain(40), 5)
    assert isinstance(a, Order)
    forwards = [a.indices(step, 0, 1, 3) for step in range(30)]
    backwards = [b.indices(step, 0, 1, 3) for step in reversed(range(30))]
    assert forwards == backwards[::-1]
