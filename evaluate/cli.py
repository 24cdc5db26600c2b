"""``avid-evaluate``: what was learned."""

import click

from avid_pipeline.evaluate.classification.commands import finetune, linear
from avid_pipeline.evaluate.feature_command import features
from avid_pipeline.evaluate.search_commands import knn, retrieval
from avid_pipeline.shards_spec.command_line import FriendlyGroup


@click.group(cls=FriendlyGroup)
@click.version_option(package_name="avid-pipeline")
def main() -> None:
    """Evaluate a checkpoint: a run folder, a checkpoint folder of it, a published .pth.tar file, or .safetensors.

    Alone it is one process; under torchrun the ranks share the work, with the same numbers:
    torchrun --nproc-per-node 8 -m avid_pipeline.evaluate knn CHECKPOINT --data ROOT.
    """


for _command in (features, finetune, knn, linear, retrieval):
    main.add_command(_command)


if __name__ == "__main__":
    main()
