"""The order of an epoch, as a pure function of the manifest and a few numbers.

How the order is made:

1. Shards are shuffled, and their instances laid end to end. The line is cut into ``streams`` equal canonical
   streams; what is left over (fewer instances than streams) is the *remainder*.
2. A stream is cut into blocks of neighbouring instances. All visits of all blocks, over all passes, are shuffled
   together; within a visit the instances are permuted. So the visits of an instance are spread over the epoch,
   and a stream reads runs of a shard.
3. The streams take turns, one instance each. After every pass-length of turns comes the remainder, once.
4. The line of visits is cut into global batches; an incomplete last one is dropped.

An instance is at most once in a global batch: streams share no instance, and within a stream two visits of one
instance are always at least a batch apart.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from avid_pipeline.errors import PlanError
from avid_pipeline.shards_spec.manifest import Manifest
from avid_pipeline.streams.batches import Batch, IntArray, LazyBatches

# First word of the key of every generator here, so that no two purposes share a sequence.
_SHARD_ORDER, _BLOCK_ORDER, _WITHIN_BLOCK, _REMAINDER_ORDER = range(4)

# A stream of one block would go pass after pass.
_BLOCKS_PER_STREAM = 8


class EpochPlan:
    """Who reads what in one epoch; build it with :func:`plan`.

    Attributes:
        num_batches: global batches in the epoch; every rank gets as many.
        global_batch_size: visits in a global batch.
    """

    def __init__(
        self,
        line: IntArray,
        *,
        seed: int,
        epoch: int,
        clips_per_instance: int,
        global_batch_size: int,
        streams: int,
        block_size: int,
    ) -> None:
        self._line = line
        self._seed = seed
        self._epoch = epoch
        self._clips = clips_per_instance
        self._streams = streams
        self._stream_length = len(line) // streams
        self._blocks = max(1, self._stream_length // block_size)
        # Two visits of an instance this many turns of its stream apart cannot meet in a batch.
        self._apart = -(-global_batch_size // streams)
        self._block_visits = lru_cache(maxsize=streams)(self._shuffle_block_visits)
        self._permutation = lru_cache(maxsize=4 * streams)(self._permute_block)
        self.global_batch_size = global_batch_size
        self.num_batches = len(line) * clips_per_instance // global_batch_size

    def global_batch(self, step: int) -> Batch:
        """The global batch at a step of the epoch, in its order; the same for any number of ranks and workers.

        Raises:
            PlanError: the epoch has no such step.
        """
        return self._look_up(self._places(step))

    def rank_batch(self, step: int, rank: int, world_size: int) -> Batch:
        """A rank's equal share of the global batch at a step.

        A rank keeps reading the same streams; only where turns do not fill a batch evenly (once a pass, at the
        remainder) do single visits move to another rank.

        Raises:
            PlanError: the epoch has no such step, or the batch cannot be divided by the world size.
        """
        if self.global_batch_size % world_size:
            raise PlanError(
                f"a global batch of {self.global_batch_size} cannot be divided by {world_size} ranks; "
                "choose a multiple of the number of ranks"
            )
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank}: expected 0 to {world_size - 1}")
        places = self._places(step)
        turns = places % len(self._line)
        return self._look_up(places[_divide(turns % world_size, world_size) == rank])

    def rank_batches(self, rank: int, world_size: int, first: int = 0) -> Sequence[Batch]:
        """A rank's shares of all global batches from step ``first`` on, each made when it is asked for.

        Raises:
            PlanError: as :meth:`rank_batch`, when a batch is asked for.
        """
        return LazyBatches(lambda number: self.rank_batch(first + number, rank, world_size), self.num_batches - first)

    def _places(self, step: int) -> IntArray:
        """Places of a global batch in the line of visits, int64 [global batch size]."""
        if not 0 <= step < self.num_batches:
            raise PlanError(f"step {step} of the epoch: expected 0 to {self.num_batches - 1}")
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size, dtype=np.int64)

    def _look_up(self, places: IntArray) -> Batch:
        passes, turns = np.divmod(places, len(self._line))
        instances, visits = np.empty_like(places), np.empty_like(places)
        regular = turns < self._streams * self._stream_length
        positions = passes * self._stream_length + turns // self._streams
        for place in np.flatnonzero(regular):
            stream = int(turns[place] % self._streams)
            instances[place], visits[place] = self._visit(stream, int(positions[place]))
        for place in np.flatnonzero(~regular):
            number = int(turns[place]) - self._streams * self._stream_length
            instances[place], visits[place] = self._remainder(int(passes[place]))[number], passes[place]
        return Batch(instances, visits)

    def _visit(self, stream: int, position: int) -> tuple[int, int]:
        """The instance and visit number at a position of a stream, from 0 to stream length x clips."""
        _, visits, ends = self._block_visits(stream)
        turn = int(np.searchsorted(ends, position, side="right"))
        within = position - (int(ends[turn - 1]) if turn else 0)
        return int(self._permutation(stream, turn)[within]), int(visits[turn])

    def _shuffle_block_visits(self, stream: int) -> tuple[IntArray, IntArray, IntArray]:
        """All block visits of a stream in order: block numbers, visit numbers, ends in the stream."""
        order = self._generator(_BLOCK_ORDER, stream).permutation(self._blocks * self._clips)
        visits, blocks = np.divmod(order, self._blocks)
        sizes = np.diff(self._block_bounds())
        return blocks, visits, np.cumsum(sizes[blocks])

    def _permute_block(self, stream: int, turn: int) -> IntArray:
        """The instances of a stream's block visit, in their order."""
        own = self._raw_permutation(stream, turn)
        reach = self._apart - 1
        if turn == 0 or reach == 0:
            return own
        if self._must_repeat_order():
            return own
        before = self._raw_permutation(stream, turn - 1)[-reach:]
        return _keep_apart(own, before, reach)

    def _must_repeat_order(self) -> bool:
        """Whether the data are so few that only the same order in each pass keeps visits a batch apart."""
        return self._blocks == 1 and self._stream_length < 3 * self._apart

    def _raw_permutation(self, stream: int, turn: int) -> IntArray:
        blocks, visits, _ = self._block_visits(stream)
        block = int(blocks[turn])
        visit = 0 if self._must_repeat_order() else int(visits[turn])
        bounds = self._block_bounds()
        first = stream * self._stream_length + int(bounds[block])
        instances = self._line[first : first + int(bounds[block + 1] - bounds[block])]
        return self._generator(_WITHIN_BLOCK, stream, block, visit).permutation(instances)

    def _remainder(self, number: int) -> IntArray:
        rest = self._line[self._streams * self._stream_length :]
        return self._generator(_REMAINDER_ORDER, number).permutation(rest)

    def _block_bounds(self) -> IntArray:
        return np.arange(self._blocks + 1, dtype=np.int64) * self._stream_length // self._blocks

    def _generator(self, purpose: int, *words: int) -> np.random.Generator:
        return np.random.default_rng([purpose, self._seed, self._epoch, *words])


def plan(
    manifest: Manifest,
    *,
    seed: int,
    epoch: int,
    clips_per_instance: int,
    global_batch_size: int,
    canonical_streams: int = 64,
    block_size: int = 128,
) -> EpochPlan:
    """Plan an epoch of training from the manifest alone.

    Args:
        manifest: of the data set.
        seed: of the training run.
        epoch: from 0; every epoch has another order.
        clips_per_instance: visits of every instance in the epoch.
        global_batch_size: clips in a step over all ranks.
        canonical_streams: into how many streams the data are cut; what any number of ranks and loader workers
            that divides it reads together is the same. Small data sets use fewer (a divisor of it).
        block_size: about how many neighbouring instances a stream visits together; fewer where streams are short, so
            that visits spread there too.

    Raises:
        PlanError: the global batch is larger than the data set, or a number is not positive.
    """
    numbers = {
        "clips_per_instance": clips_per_instance,
        "global_batch_size": global_batch_size,
        "canonical_streams": canonical_streams,
        "block_size": block_size,
    }
    for name, value in numbers.items():
        if value < 1:
            raise PlanError(f"{name}: expected at least 1, found {value}")
    count = manifest.num_samples
    if global_batch_size > count:
        raise PlanError(
            f"global batch size {global_batch_size}: the data set has {count} instances, and an instance is at "
            f"most once in a global batch; use at most {count}"
        )
    streams = _usable_streams(count, global_batch_size, canonical_streams)
    apart = -(-global_batch_size // streams)
    return EpochPlan(
        _line_of_instances(manifest, seed, epoch),
        seed=seed,
        epoch=epoch,
        clips_per_instance=clips_per_instance,
        global_batch_size=global_batch_size,
        streams=streams,
        block_size=max(min(block_size, count // streams // _BLOCKS_PER_STREAM), 3 * apart if apart > 1 else 1),
    )


def _usable_streams(count: int, global_batch_size: int, canonical_streams: int) -> int:
    """The largest divisor of the canonical streams that leaves every stream room to keep visits apart."""
    for streams in range(canonical_streams, 1, -1):
        if canonical_streams % streams == 0 and count // streams >= 3 * -(-global_batch_size // streams):
            return streams
    return 1


def _line_of_instances(manifest: Manifest, seed: int, epoch: int) -> IntArray:
    """All instance indices, shard after shard in a shuffled order."""
    order = np.random.default_rng([_SHARD_ORDER, seed, epoch]).permutation(len(manifest.shards))
    parts: Sequence[IntArray] = [
        np.arange(shard.first_index, shard.first_index + shard.samples, dtype=np.int64)
        for shard in (manifest.shards[number] for number in order)
    ]
    return np.concatenate(parts)


def _keep_apart(instances: IntArray, before: IntArray, reach: int) -> IntArray:
    """Move instances out of the first ``reach`` places that were among the last places before.

    They change places with instances from the middle; the last ``reach`` places stay as they are, so that what
    follows can be planned without knowing what this function did.
    """
    moved = instances.copy()
    recent = np.isin(moved, before)
    clashing = np.flatnonzero(recent[:reach])
    free = reach + np.flatnonzero(~recent[reach : len(moved) - reach])[: len(clashing)]
    moved[clashing], moved[free] = instances[free], instances[clashing]
    return moved


def _divide(wanted: IntArray, world_size: int) -> IntArray:
    """Rank of each entry: the wanted one, save that every rank gets equally many.

    Entries beyond a rank's share go, in order, to the ranks that lack some.
    """
    share = len(wanted) // world_size
    ranks = wanted.copy()
    surplus: list[int] = []
    lacking: list[int] = []
    for rank in range(world_size):
        mine = np.flatnonzero(wanted == rank)
        surplus += mine[share:].tolist()
        lacking += [rank] * (share - len(mine))
    ranks[sorted(surplus)] = lacking
    return ranks
