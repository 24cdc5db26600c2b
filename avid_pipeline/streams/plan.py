"""The order of an epoch, as a pure function of the manifest and a few numbers.

How the order is made:

1. Shards are shuffled, and their instances laid end to end. The line is cut into canonical *streams* of neighbours,
   equally long to one instance. There are as many streams as a global batch has clips, or a multiple of that; then
   streams that follow each other in turn lie far apart in the line.
2. A stream is cut into blocks of neighbours. All visits of all its blocks, over all passes, are shuffled together;
   a block is read from its first instance to its last. So the visits of an instance lie anywhere in the epoch, and
   a stream reads runs of a shard.
3. The streams take turns, one instance each; where they are not equally long, the longer ones have one more turn at
   the end of each pass. The streams begin at different places of their first block, so that they do not all go on
   to another block at once.
4. The line of visits is cut into global batches; an incomplete last one is dropped.

An instance is at most once in a global batch: streams share no instance. A batch holds one visit of a stream, or two
that follow each other (around the end of a pass), and two that follow each other are never of one instance.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from avid_pipeline.errors import PlanError
from avid_pipeline.shards_spec.manifest import Manifest
from avid_pipeline.streams.batches import Batch, IntArray, LazyBatches

# First word of the key of every generator here, so that no two purposes share a sequence.
_SHARD_ORDER, _BLOCK_ORDER = range(2)

# A stream of one block would go pass after pass.
_BLOCKS_PER_STREAM = 8
# With fewer instances in a stream, their visits cannot be shuffled over all passes and kept apart.
_FEW = 5


class EpochPlan:
    """Who reads what in one epoch; build it with :func:`plan`. It does not change, and may be pickled.

    Attributes:
        num_batches: global batches in the epoch; every rank gets as many.
        global_batch_size: visits in a global batch.
        num_streams: canonical streams; every number of ranks that can share a batch equally divides it.
        block_size: fewest instances in a block.
    """

    def __init__(
        self,
        line: IntArray,
        *,
        seed: int,
        epoch: int,
        clips_per_instance: int,
        global_batch_size: int,
        num_streams: int,
        block_size: int,
    ) -> None:
        self.num_batches = len(line) * clips_per_instance // global_batch_size
        self.global_batch_size = global_batch_size
        self.num_streams = num_streams
        self._line = line
        self._clips = clips_per_instance
        self._length, self._longer = divmod(len(line), num_streams)
        self._blocks = max(1, self._length // min(block_size, max(1, self._length // _BLOCKS_PER_STREAM)))
        self.block_size = self._length // self._blocks
        generator = np.random.default_rng([_BLOCK_ORDER, seed, epoch])
        self._firsts = _first_places(self._length, self._longer, num_streams, global_batch_size)
        self._visits, self._ends = self._shuffle_visits(generator)

    def global_batch(self, step: int) -> Batch:
        """The global batch at a step of the epoch, in its order; the same for any number of ranks and workers.

        Raises:
            PlanError: the epoch has no such step.
        """
        return self._look_up(self._places(step))

    def rank_batch(self, step: int, rank: int, world_size: int, parts: int = 1) -> Batch:
        """A rank's equal share of the global batch at a step.

        Every visit has a slot of the batch, and ranks have equal ranges of slots, in their order: so what lies side by
        side on one rank does so on neighbouring ranks. A slot keeps reading the same streams; only where a pass ends
        within a batch may single visits move to another.

        Args:
            step: of the epoch.
            rank: from 0.
            world_size: number of ranks.
            parts: equal ranges of slots that the batch is trained in, one after the other: the first so many of the
                rank's visits are its share of the first part, whatever the number of ranks.

        Raises:
            PlanError: the epoch has no such step, there is no such rank, or :meth:`check_world_size` fails.
        """
        self._check_rank(rank, world_size)
        places = self._places(step)
        streams = places % len(self._line) % self.num_streams
        slots = _one_each(streams % self.global_batch_size)
        by_slot = places[np.argsort(slots)]
        return self._look_up(by_slot.reshape(parts, world_size, -1)[:, rank].reshape(-1))

    def rank_batches(self, rank: int, world_size: int, first: int = 0, parts: int = 1) -> Sequence[Batch]:
        """A rank's shares of all global batches from step ``first`` on, each made when it is asked for.

        Raises:
            PlanError: there is no such rank, ``first`` is not within the epoch, or :meth:`check_world_size` fails.
        """
        self._check_rank(rank, world_size)
        if not 0 <= first <= self.num_batches:
            raise PlanError(f"first step {first} of the epoch: expected 0 to {self.num_batches}")
        make = partial(self.rank_batch, rank=rank, world_size=world_size, parts=parts)
        return LazyBatches(make, range(first, self.num_batches))

    def check_world_size(self, world_size: int) -> None:
        """Whether so many ranks can share the epoch: each must get as many clips of every global batch.

        Raises:
            PlanError: they cannot; the message says the largest possible number.
        """
        size = self.global_batch_size
        if world_size < 1:
            raise PlanError(f"{world_size} ranks: expected at least 1")
        if size % world_size == 0:
            return
        below = max(number for number in range(1, min(world_size, size) + 1) if size % number == 0)
        possible = f"the largest possible number is {size}"
        if below < size:
            possible += f", and below {world_size} it is {below}"
        larger = -(-size // world_size) * world_size
        if larger <= len(self._line):
            possible += f"; or use a batch size that is a multiple of {world_size}, such as {larger}"
        elif world_size > len(self._line):
            possible += (
                f"; the data have {len(self._line)} instances, and an instance is at most once in a global batch"
            )
        raise PlanError(f"{world_size} ranks cannot share a global batch of {size} clips equally: {possible}")

    def _check_rank(self, rank: int, world_size: int) -> None:
        self.check_world_size(world_size)
        if not 0 <= rank < world_size:
            raise PlanError(f"rank {rank}: expected 0 to {world_size - 1}")

    def _places(self, step: int) -> IntArray:
        """Places of a global batch in the line of visits, int64 [global batch size]."""
        if not 0 <= step < self.num_batches:
            raise PlanError(f"step {step} of the epoch: expected 0 to {self.num_batches - 1}")
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size, dtype=np.int64)

    def _look_up(self, places: IntArray) -> Batch:
        """The visits at places in the line of visits."""
        passes, turns = np.divmod(places, len(self._line))
        rounds, streams = np.divmod(turns, self.num_streams)
        lengths = self._length + (streams < self._longer)
        delays = streams * self.block_size // self.num_streams
        before = (streams * self._length + np.minimum(streams, self._longer)) * self._clips
        positions = (passes * lengths + rounds + delays) % (lengths * self._clips) + before
        # As the type of the ends, for searching would convert all of them.
        found = np.searchsorted(self._ends, positions.astype(self._ends.dtype), side="right")
        begins = np.where(found > 0, self._ends[found - 1], 0)
        visits, blocks = np.divmod(self._visits[found].astype(np.int64), self._blocks)
        instances = self._line[self._firsts[streams] + blocks * lengths // self._blocks + positions - begins]
        return Batch(instances, visits)

    def _shuffle_visits(self, generator: np.random.Generator) -> tuple[npt.NDArray[np.integer], IntArray]:
        """All block visits, stream after stream, each stream's in order.

        Returns:
            ``visit number x blocks + block`` of each, and where it ends if all were read one after the other; both
            [streams x clips x blocks].
        """
        count = self._blocks * self._clips
        visits = np.empty((self.num_streams, count), dtype=_smallest_type(count))
        sizes = np.empty((self.num_streams, count), dtype=_smallest_type(len(self._line) * self._clips))
        few = self._length < _FEW
        for stream in range(self.num_streams):
            longer = stream < self._longer
            if few:
                row = _pass_after_pass(self._blocks, self._clips, generator, differ=longer)
            else:
                row = generator.permutation(count)
                if self.block_size == 1:
                    _separate(row, self._blocks, generator)
            visits[stream] = row
            bounds = np.arange(self._blocks + 1) * (self._length + longer) // self._blocks
            sizes[stream] = np.diff(bounds)[row % self._blocks]
        flat = sizes.reshape(-1)
        return visits.reshape(-1), np.cumsum(flat, out=flat)


def plan(
    manifest: Manifest,
    *,
    seed: int,
    epoch: int,
    clips_per_instance: int,
    global_batch_size: int,
    canonical_streams: int = 64,
    block_size: int = 8,
    subset: str | None = None,
) -> EpochPlan:
    """Plan an epoch of training from the manifest alone.

    Args:
        manifest: of the data set.
        seed: of the training run.
        epoch: from 0; every epoch has another order.
        clips_per_instance: visits of every instance in the epoch.
        global_batch_size: clips in a step over all ranks.
        canonical_streams: into at least how many streams the data are cut; there are never fewer than a global batch
            has clips, and always a multiple of that. Few data are cut into fewer.
        block_size: how many neighbouring instances a stream reads together; fewer where streams are short, so that
            visits spread there too.
        subset: only the instances of this subset of the manifest; they keep their indices.

    Raises:
        PlanError: the global batch is larger than the data, or a number is too small.
        ManifestError: there is no subset of that name.
    """
    _check_at_least(0, seed=seed, epoch=epoch)
    _check_at_least(
        1,
        clips_per_instance=clips_per_instance,
        global_batch_size=global_batch_size,
        canonical_streams=canonical_streams,
        block_size=block_size,
    )
    chosen = None if subset is None else manifest.subset_indices(subset)
    count = manifest.num_samples if chosen is None else len(chosen)
    if global_batch_size > count:
        raise PlanError(
            f"global batch size {global_batch_size}: the {'data set' if subset is None else f'subset {subset}'} has "
            f"{count} instances, and an instance is at most once in a global batch; use at most {count}, "
            f"for at most {count} ranks"
        )
    batches = -(-canonical_streams // global_batch_size)
    batches = max(1, min(batches, count // (_BLOCKS_PER_STREAM * global_batch_size)))
    return EpochPlan(
        _line_of_instances(manifest, chosen, seed, epoch),
        seed=seed,
        epoch=epoch,
        clips_per_instance=clips_per_instance,
        global_batch_size=global_batch_size,
        num_streams=batches * global_batch_size,
        block_size=block_size,
    )


def _check_at_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise PlanError(f"{name}: expected at least {least}, found {value}")


def _line_of_instances(manifest: Manifest, chosen: IntArray | None, seed: int, epoch: int) -> IntArray:
    """The chosen instance indices (ascending; None for all), shard after shard in a shuffled order."""
    sizes = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
    stops = np.cumsum(sizes)
    starts = stops - sizes
    if chosen is not None:
        starts, stops = np.searchsorted(chosen, starts), np.searchsorted(chosen, stops)
    order = np.random.default_rng([_SHARD_ORDER, seed, epoch]).permutation(len(sizes))
    sizes = (stops - starts)[order]
    # Ranges laid end to end: places in the line, moved from where a range lies there to where it begins.
    line = np.repeat(starts[order] - np.cumsum(sizes) + sizes, sizes)
    line += np.arange(len(line), dtype=np.int64)
    return line if chosen is None else chosen[line]


def _first_places(length: int, longer: int, num_streams: int, global_batch_size: int) -> IntArray:
    """Where each stream begins in the line of instances, int64 [streams].

    Streams of one global batch lie as far apart as they can: neighbours in the line are in different batches.

    Args:
        length: of the shorter streams.
        longer: how many streams have one instance more; they are the first ones to take their turn.
        num_streams: a multiple of the global batch size.
        global_batch_size: how many streams a batch takes.
    """
    streams = np.arange(num_streams, dtype=np.int64)
    in_line = streams.reshape(-1, global_batch_size).T.reshape(-1)
    lengths = length + (in_line < longer)
    firsts = np.empty_like(streams)
    firsts[in_line] = np.cumsum(lengths) - lengths
    return firsts


def _pass_after_pass(blocks: int, clips: int, generator: np.random.Generator, *, differ: bool) -> IntArray:
    """Block visits in which each pass has all blocks, in another order.

    Args:
        blocks: of the stream.
        clips: passes.
        generator: draws the orders.
        differ: whether the first block of a pass must not be the last of the pass before.
    """
    passes = generator.permuted(np.broadcast_to(np.arange(blocks), (clips, blocks)), axis=1)
    if differ and blocks > 1:
        for before, after in pairwise(passes):
            if before[-1] == after[0]:
                after[:2] = after[1::-1]
    return (passes + np.arange(clips)[:, None] * blocks).reshape(-1)


def _separate(visits: IntArray, blocks: int, generator: np.random.Generator) -> None:
    """Change places, in place, until no two visits in a row are of one block.

    With five blocks or more there always is a place to change with: fewer than four fifths of all visits are of the
    block or next to one, and fewer than a fifth are of the block that follows.
    """
    count = len(visits)
    clashes = np.flatnonzero(np.diff(visits % blocks) == 0)

    def block_at(place: int) -> int:
        return int(visits[place]) % blocks if 0 <= place < count else -1

    for clash in clashes.tolist():
        moved = clash + 1
        block = block_at(moved)
        while block_at(clash) == block_at(moved):
            other = int(generator.integers(count))
            beside = (block_at(other - 1), block_at(other), block_at(other + 1))
            if block not in beside and block_at(other) != block_at(moved + 1):
                visits[moved], visits[other] = visits[other], visits[moved]


def _one_each(wanted: IntArray) -> IntArray:
    """Slot of each entry: the wanted one, save that no two have the same.

    Where several want one slot, the first has it, and the others go, in order, to the slots that nobody wants.
    """
    first = np.unique(wanted, return_index=True)[1]
    slots = wanted.copy()
    moved = np.ones(len(wanted), dtype=bool)
    moved[first] = False
    slots[moved] = np.setdiff1d(np.arange(len(wanted)), wanted)
    return slots


def _smallest_type(largest: int) -> type[np.integer]:
    return np.int32 if largest < 2**31 else np.int64
