"""Which clips a step sees: a function of its number, so that nothing has to be read to resume."""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from fpsc.errors import UserError
from fpsc.train.data.sample import Batch, Bucket, Bucketed, Source, collate


def order(source: Source, seed: int) -> Order:
    """The order in which a run of this seed sees the samples of `source`.

    A source without `buckets` has samples of one shape.

    Raises:
        UserError: the source has no samples.
    """
    if not len(source):
        raise UserError("expected samples to train on, found none")
    if isinstance(source, Bucketed):
        buckets = tuple(source.buckets)
    else:
        buckets = (Bucket(0, (len(source),), 1, "samples"),)
    return Order(source, seed, buckets)


@dataclass(frozen=True)
class Order:
    """Every step draws its batch from one bucket; every bucket is shuffled anew once it is used up.

    Epoch e of a run with global batches of g = ranks * size ends when a bucket of n samples has
    given floor((e + 1) n / g) batches. What is left over begins the bucket's next epoch, so none is
    dropped. The batches of an epoch come in a shuffled order.
    """

    source: Source
    seed: int
    buckets: tuple[Bucket, ...]

    def batch(self, step: int, rank: int, ranks: int, size: int) -> Batch:
        """The part of a step's batch that this rank trains on.

        Args:
            step: counted from 0; with accumulation, each batch is a step.
            rank: from 0 to ranks - 1.
            size: samples for each rank.

        Raises:
            UserError: a sample cannot be read, or a bucket is smaller than ranks * size.
            ValueError: a number is out of its range.
        """
        return collate([self.source.sample(i) for i in self.indices(step, rank, ranks, size)])

    def indices(self, step: int, rank: int, ranks: int, size: int) -> list[int]:
        """The indices in the source of the samples of `batch`."""
        if step < 0 or size < 1 or not 0 <= rank < ranks:
            raise ValueError(
                "expected step >= 0, size >= 1 and 0 <= rank < ranks, found "
                f"step {step}, size {size}, rank {rank} of {ranks}"
            )
        which, number = self._place(step, ranks * size)
        first = number * ranks * size + rank * size
        return [self._sample(which, position) for position in range(first, first + size)]

    def steps_before(self, epoch: int, batch: int) -> int:
        """Steps before an epoch (counted from 0) with global batches of `batch`."""
        return sum(epoch * len(bucket) // batch for bucket in self.buckets)

    def _place(self, step: int, batch: int) -> tuple[int, int]:
        """The bucket of a step, and how many batches the bucket has given before."""
        self._check(batch)
        # Every bucket gives at least one batch an epoch, which bounds the epochs to look at.
        epochs = range(step // len(self.buckets) + 2)
        epoch = bisect_right(epochs, step, key=lambda e: self.steps_before(e, batch)) - 1
        counts = [
            (epoch + 1) * len(bucket) // batch - epoch * len(bucket) // batch
            for bucket in self.buckets
        ]
        begins = [0, *accumulate(counts)]
        at = permuted(step - self.steps_before(epoch, batch), begins[-1], self.seed, -1, epoch)
        which = bisect_right(begins, at) - 1
        return which, epoch * len(self.buckets[which]) // batch + at - begins[which]

    def _sample(self, which: int, position: int) -> int:
        """Index of a sample, by its position in all epochs of its bucket."""
        bucket = self.buckets[which]
        epoch, at = divmod(position, len(bucket))
        return bucket.first + _shuffled(bucket, at, self.seed, which, epoch)

    def _check(self, batch: int) -> None:
        for bucket in self.buckets:
            if len(bucket) < batch:
                raise UserError(
                    f"{bucket.name}: expected at least {batch} samples of this shape, a batch of "
                    f"all ranks, found {len(bucket)}. Train with a smaller batch, encode more "
                    "clips of this shape, or name these shards in data.leave_out"
                )


def _shuffled(bucket: Bucket, at: int, seed: int, stream: int, epoch: int) -> int:
    """Which sample of a bucket comes at position `at` of an epoch.

    The shards are shuffled, cut into groups of `together`, and the samples of each group shuffled.
    """
    if len(bucket.shards) <= bucket.together:
        return permuted(at, len(bucket), seed, stream, epoch)
    groups = _groups(bucket, seed, stream, epoch)
    number = bisect_right(groups.begins, at) - 1
    members = groups.members[number]
    begin, end = groups.begins[number], groups.begins[number + 1]
    within = permuted(at - begin, end - begin, seed, stream, epoch, number)
    for shard in members:
        if within < bucket.shards[shard]:
            return groups.firsts[shard] + within
        within -= bucket.shards[shard]
    raise AssertionError("a position is inside its group")


@dataclass(frozen=True)
class _Groups:
    members: list[list[int]]  # shards of each group
    begins: list[int]  # position of the first sample of each group, and the end
    firsts: list[int]  # index in the bucket of the first sample of each shard


@lru_cache(maxsize=64)
def _groups(bucket: Bucket, seed: int, stream: int, epoch: int) -> _Groups:
    count, width = len(bucket.shards), bucket.together
    shards = [permuted(i, count, seed, stream, epoch, -1) for i in range(count)]
    members = [shards[i : i + width] for i in range(0, count, width)]
    sizes = [sum(bucket.shards[shard] for shard in group) for group in members]
    return _Groups(members, [0, *accumulate(sizes)], [0, *accumulate(bucket.shards)])


MASK = 2**64 - 1


def _mixed(value: int) -> int:
    """A 64-bit number whose bits depend on all bits of `value` (the finaliser of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def permuted(index: int, count: int, *key: int) -> int:
    """Where a random permutation of 0..count-1 sends `index`; another one for every key.

    A Feistel network over the next power of four, walked until it comes back inside (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): no table, whatever the count.
    """
    if not 0 <= index < count:
        raise ValueError(f"expected an index from 0 to {count - 1}, found {index}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    state = 0
    for word in key:
        state = _mixed((state + 0x9E3779B97F4A7C15 + (word & MASK)) & MASK)
    keys = [_mixed((state + turn * 0x9E3779B97F4A7C15) & MASK) for turn in range(1, 9)]
    while True:
        left, right = index >> half, index & low
        for key_of_turn in keys:
            left, right = right, left ^ _mixed(right ^ key_of_turn) & low
        index = left << half | right
        if index < count:
            return index


def prefetched(
    order: Order, start: int, *, rank: int = 0, ranks: int = 1, size: int, ahead: int = 2
) -> Generator[Batch, None, None]:
    """The batches from step `start` on, without an end, read in a thread ahead of their use.

    An error is raised at the step that it belongs to. Closing the iterator ends the thread.

    Args:
        ahead: batches that wait at most.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, ahead))
    closed = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def read() -> None:
        step = start
        try:
            while not closed.is_set():
                put(order.batch(step, rank, ranks, size))
                step += 1
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, name="fpsc-data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
