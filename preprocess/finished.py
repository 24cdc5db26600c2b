"""Samples of a shard that is built again: they are carried over, not converted again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from avid_pipeline.shards_spec.errors import ShardError
from avid_pipeline.shards_spec.sample import MEMBERS
from avid_pipeline.shards_spec.shard_file import ShardIndex, load_index
from avid_pipeline.shards_spec.storage import Storage

_CHUNK_BYTES = 8 << 20


class FinishedSamples:
    """The samples of a finished shard, by key; build it with :meth:`take`."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self._path = path
        self._index = index
        self._places = {key: place for place, key in enumerate(index.keys)}

    @classmethod
    def take(
        cls, storage: Storage, name: str, sha256: str, keys: Sequence[str], folder: Path
    ) -> "FinishedSamples | None":
        """Fetch a finished shard.

        Args:
            storage: the data set's root.
            name: of the shard.
            sha256: its checksum.
            keys: the samples that it must hold, in order.
            folder: where to put a copy of it.

        Returns:
            None where the shard is damaged, so that all of it must be converted again.

        Raises:
            StorageError: the root cannot be read.
        """
        try:
            index = load_index(storage, name.removesuffix(".tar") + ".index.npz")
        except ShardError:
            return None
        digest = hashlib.sha256()
        path = folder / "finished.tar"
        with path.open("wb") as file:
            for piece in storage.chunks(name):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256 or index.keys != tuple(keys):
            path.unlink()
            return None
        return cls(path, index)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def extract(self, key: str, folder: Path) -> dict[str, Path]:
        """Copy a sample's members to files in ``folder``; member name to file."""
        place = self._places[key]
        files: dict[str, Path] = {}
        with self._path.open("rb") as shard:
            for column, name in enumerate(MEMBERS):
                size = int(self._index.sizes[place, column])
                if size < 0:
                    continue
                shard.seek(int(self._index.offsets[place, column]))
                files[name] = folder / name
                with files[name].open("wb") as file:
                    while size > 0 and (piece := shard.read(min(size, _CHUNK_BYTES))):
                        file.write(piece)
                        size -= len(piece)
        return files
