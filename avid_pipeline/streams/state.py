"""Where a run stands in its data: five scalars, enough to go on at any step, on any number of ranks."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from avid_pipeline.errors import CheckpointError

# Goes up when the same arguments give another order, so that no run goes on in an order that it did not begin with.
ORDER_VERSION = 1


@dataclass(frozen=True)
class StreamState:
    """Where a run stands. Only batches that were delivered to the trainer count, not those prefetched.

    Attributes:
        manifest_fingerprint: ``Manifest.fingerprint()`` of the data.
        seed: of the order.
        epoch: the epoch that the next batch belongs to, from 0.
        step: batches delivered, over all epochs.
        version: of the order, :data:`ORDER_VERSION`.
    """

    manifest_fingerprint: str
    seed: int
    epoch: int
    step: int
    version: int = ORDER_VERSION

    def to_dict(self) -> dict[str, str | int]:
        """As plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """From plain data.

        Raises:
            CheckpointError: a field is missing, unknown, of another type, or negative.
        """
        types = {field.name: field.type for field in fields(cls)}
        if not isinstance(content, dict) or content.keys() != types.keys():
            found = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else repr(content)
            raise CheckpointError(f"stream state: expected the fields {', '.join(sorted(types))}; found {found}")
        for name, expected in types.items():
            value = content[name]
            if type(value) is not expected:
                raise CheckpointError(f"stream state: {name}: expected {expected}, found {value!r}")
            if isinstance(value, int) and value < 0:
                raise CheckpointError(f"stream state: {name}: expected at least 0, found {value}")
        return cls(**content)

    def check(self, manifest_fingerprint: str, seed: int) -> None:
        """Whether a run with these data and this seed goes on from here in the order that it began with.

        Raises:
            CheckpointError: it does not; the message says what differs.
        """
        differences = []
        if self.version != ORDER_VERSION:
            differences.append(
                f"version: the run began with order {self.version}, this release makes order {ORDER_VERSION}: "
                "go on with the release it began with"
            )
        if self.manifest_fingerprint != manifest_fingerprint:
            differences.append(
                f"manifest_fingerprint: the run began with data {self.manifest_fingerprint}, the data given are "
                f"{manifest_fingerprint}: instance indices would mean other clips; give the data it began with"
            )
        if self.seed != seed:
            differences.append(f"seed: the run began with {self.seed}, found {seed}; give {self.seed}")
        if differences:
            raise CheckpointError("stream state: " + "; ".join(differences))

    def step_of_epoch(self, batches_per_epoch: int) -> int:
        """The step within :attr:`epoch` of the next batch: what ``EpochPlan.rank_batches`` takes as ``first``.

        Raises:
            CheckpointError: the epoch has no such step, so the plan is not the one that the run began with.
        """
        first = self.step - self.epoch * batches_per_epoch
        if not 0 <= first <= batches_per_epoch:
            raise CheckpointError(
                f"stream state: step {self.step} is not within epoch {self.epoch} of {batches_per_epoch} batches an "
                "epoch; go on with the batch size, clips_per_instance and subset that the run began with"
            )
        return first
