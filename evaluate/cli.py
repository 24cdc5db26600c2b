"""``avid-evaluate``: what was learned."""

import json
from pathlib import Path

import click
import torch
from tabulate import tabulate

from avid_pipeline.clips.settings import ClipSettings
from avid_pipeline.config import parse_config
from avid_pipeline.embedding import embed_dataset
from avid_pipeline.errors import CheckpointError
from avid_pipeline.models import load_pretrained
from avid_pipeline.models.pretrained import WEIGHTS_NAME
from avid_pipeline.retrieval import RECALL_AT, RetrievalResult, chance, retrieve
from avid_pipeline.shards_spec.command_line import FriendlyCommand, FriendlyGroup, storage_option
from avid_pipeline.shards_spec.manifest import SpectrogramStatistics
from avid_pipeline.shards_spec.reader import open_dataset
from avid_pipeline.shards_spec.storage import open_storage
from avid_pipeline.train.checkpoint import has_record, read_record


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Evaluate a checkpoint: a run folder, a checkpoint folder of it, or a published .pth.tar file."""


@main.command(cls=FriendlyCommand)
@click.argument("checkpoint")
@click.option("--data", required=True, help="Root of held-out data: a folder or URL of shards.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: retrieval.json beside "
              "a local CHECKPOINT folder, else in the current folder]")  # fmt: skip
@click.option("--clips", default=10, show_default=True, type=click.IntRange(min=1), help="Clips of each instance.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Clips in a pass.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads that decode.  [default: one for each core]")
@storage_option
def retrieval(
    checkpoint: str,
    data: str,
    output: Path | None,
    clips: int,
    batch_size: int,
    workers: int | None,
    storage_option: dict[str, str],
) -> None:
    """Cross-modal retrieval: recall of each instance's own sound or picture, median rank, class precision."""
    reader = open_dataset(data, storage_option)
    model = load_pretrained(checkpoint)
    if torch.cuda.is_available():
        model = model.to("cuda")
    clip, statistics = _clip_settings(checkpoint)
    embeddings = embed_dataset(
        model,
        reader,
        clip,
        clips_per_instance=clips,
        batch_size=batch_size,
        statistics=statistics,
        workers=workers,
    )
    labels = embeddings.labels if bool((embeddings.labels >= 0).any()) else None
    results = {
        "video to audio": retrieve(embeddings.video, embeddings.audio, labels),
        "audio to video": retrieve(embeddings.audio, embeddings.video, labels),
        "chance": chance(len(reader), labels),
    }
    click.echo(f"retrieval among {len(reader):,} instances, {clips} clips each")
    click.echo(_table(results))
    path = output or _default_output(checkpoint)
    _write(path, checkpoint, data, len(reader), clips, results)
    click.echo(f"written to {path}")


def _clip_settings(checkpoint: str) -> tuple[ClipSettings, SpectrogramStatistics | None]:
    """Clip settings and statistics that a checkpoint of ours was trained with; the paper's for a published one."""
    # A weights file of ours lies in the folder that says how it was trained.
    folder = checkpoint.removesuffix(WEIGHTS_NAME) or "."
    if Path(folder).is_file() or not has_record(open_storage(folder)):
        return ClipSettings(), None
    record = read_record(open_storage(folder))
    if record.config is None:
        return ClipSettings(), record.spectrogram_statistics
    if "clip" not in record.config:
        raise CheckpointError(f"{checkpoint}: its record has no clip settings; it was written by another release")
    return parse_config(record.config["clip"], ClipSettings, checkpoint), record.spectrogram_statistics


def _table(results: dict[str, RetrievalResult]) -> str:
    rows = []
    for name, result in results.items():
        precision = "-" if result.class_precision is None else f"{100 * result.class_precision:.1f} %"
        recalls = [f"{100 * result.recall[k]:.1f} %" for k in RECALL_AT]
        rows.append([name, *recalls, f"{result.median_rank:g}", precision])
    headers = ["", *(f"R@{k}" for k in RECALL_AT), "median rank", "class P@1"]
    return tabulate(rows, headers=headers, stralign="right", disable_numparse=True)


def _default_output(checkpoint: str) -> Path:
    folder = Path(checkpoint)
    return folder / "retrieval.json" if folder.is_dir() else Path("retrieval.json")


def _write(
    path: Path, checkpoint: str, data: str, instances: int, clips: int, results: dict[str, RetrievalResult]
) -> None:
    content = {
        "checkpoint": checkpoint,
        "data": data,
        "instances": instances,
        "clips_per_instance": clips,
        **{name.replace(" ", "_"): result.to_json() for name, result in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
