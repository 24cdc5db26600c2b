"""The published AVID-CMA checkpoints as checkpoint folders of ours, and weights of any checkpoint in one file."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch

from avid_pipeline import __version__
from avid_pipeline.errors import CheckpointError, ConfigError
from avid_pipeline.models import load_pretrained
from avid_pipeline.models.pretrained import LATEST_NAME, WEIGHTS_NAME, import_published, is_checkpoint_file
from avid_pipeline.models.published_statistics import published_statistics
from avid_pipeline.models.state_dict import model_from_state
from avid_pipeline.row_ranges import rows_per_chunk
from avid_pipeline.shards_spec.storage import is_remote, open_storage, split_url
from avid_pipeline.train.bank_snapshot import BankLayout, write_rows
from avid_pipeline.train.checkpoint_files import (
    clear_folder,
    current_versions,
    read_weights,
    write_durably,
    write_files,
    write_record,
)
from avid_pipeline.train.checkpoint_record import (
    BANK_NAME,
    RECORD_NAME,
    TRAINER_NAME,
    CheckpointRecord,
    has_record,
    locate_checkpoint,
    read_record,
)

__all__ = ["export_weights", "import_published_checkpoint"]

_SUFFIX = ".safetensors"


def import_published_checkpoint(path_or_url: str, output: str, options: Mapping[str, str] | None = None) -> str:
    """Turn a published AVID-CMA checkpoint into a checkpoint folder of ours.

    The folder is complete, and counts as a checkpoint, once its ``checkpoint.json`` is there; that is written last.

    Args:
        path_or_url: the ``.pth.tar`` file.
        output: folder or URL to write.
        options: of the object stores that either is in.

    Returns:
        The folder.

    Raises:
        CheckpointError: the file is none of these, or ``output`` holds a checkpoint or a run already.
        StorageError: ``output`` cannot be written.
    """
    published = import_published(path_or_url, options=options, copy=False)
    model = model_from_state(published.model, path_or_url)
    num_instances, dim = published.video_memory.shape
    if dim != model.projection[-1]:
        raise CheckpointError(
            f"{path_or_url}: its memories have {dim} dimensions and its embeddings {model.projection[-1]}; expected "
            "the same, the file is of another network"
        )
    root = open_storage(output, create=True, options=options)
    if has_record(root):
        taken = RECORD_NAME if root.exists(RECORD_NAME) else LATEST_NAME
        raise CheckpointError(f"{root.url_of(taken)}: a checkpoint is here already; give another output")
    others = [name for name in (WEIGHTS_NAME, TRAINER_NAME) if root.exists(name)]
    # An import that was cut short has begun with the bank; without one these are somebody's own.
    if others and not root.exists(f"{BANK_NAME}/zarr.json"):
        raise CheckpointError(f"{root.url_of(others[0])}: is here already; give another output")
    clear_folder(root, "")
    layout = BankLayout(num_instances, dim, rows_per_chunk(num_instances, 1))
    layout.write_metadata(root, BANK_NAME)
    for modality, memory in (("video", published.video_memory), ("audio", published.audio_memory)):
        write_rows(root, BANK_NAME, layout, modality, 0, memory)
    criterion = {"step": 0, "partition_function": published.partition_function}
    sha256 = write_files(root, "", model.state_dict(), {"criterion": criterion})
    record = CheckpointRecord(
        stream=None,
        config=None,
        spectrogram_statistics=published_statistics(),
        versions=current_versions(),
        sha256=sha256,
        source=f"{path_or_url}, epoch {published.epoch}",
    )
    write_record(root, "", record)
    return root.url


def export_weights(
    checkpoint: str, to: str, options: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> str:
    """Write the weights of a checkpoint to one ``.safetensors`` file, at once.

    Its header says where they come from: ``format`` (``pt``), ``source``, ``steps`` if known, ``avid-pipeline``.

    Args:
        checkpoint: run folder (its newest checkpoint), checkpoint folder, or published ``.pth.tar``; path or URL.
        to: the file, a path or URL.
        options: of the object stores that either is in.
        overwrite: replace a file that is there.

    Returns:
        Where it was written.

    Raises:
        ConfigError: ``to`` does not end in ``.safetensors``.
        CheckpointError: the checkpoint is damaged or none, or the file is there already.
        StorageError: the file cannot be written.
    """
    if not to.endswith(_SUFFIX):
        raise ConfigError(f"{to}: the file of weights must end in {_SUFFIX}, by which it is known when loaded")
    if is_remote(to):
        split_url(to)  # Refuses a URL that is only a bucket.
        parent, _, name = to.rpartition("/")
    else:
        path = Path(to.removeprefix("file://")).expanduser().absolute()
        parent, name = str(path.parent), path.name
    root = open_storage(parent, create=True, options=options)
    if not overwrite and root.exists(name):
        raise CheckpointError(f"{root.url_of(name)}: is there already; give another file, or overwrite it")
    metadata = {"format": "pt", "source": checkpoint, "avid-pipeline": __version__}
    if is_checkpoint_file(checkpoint):
        state = load_pretrained(checkpoint, options=options).state_dict()
    else:
        folder = open_storage(checkpoint, options=options)
        place = locate_checkpoint(folder)
        record = read_record(folder, place)
        state = read_weights(folder, place, record)
        metadata["source"] = record.source or (folder.url_of(place) if place else folder.url)
        if record.stream is not None:
            metadata["steps"] = str(record.stream["step"])
    write_durably(root, name, safetensors.torch.save(state, metadata))
    return root.url_of(name)
