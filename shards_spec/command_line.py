"""What the four command lines share: errors of ours become one clear message and exit code 1."""

from typing import Any

import click

from avid_pipeline.shards_spec.errors import AvidPipelineError


class _FriendlyErrors:
    """Mix-in for click commands that turns :class:`AvidPipelineError` into a message without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except AvidPipelineError as error:
            raise click.ClickException(str(error)) from error


class FriendlyCommand(_FriendlyErrors, click.Command):
    """A command whose :class:`AvidPipelineError` are shown as one message."""


class FriendlyGroup(_FriendlyErrors, click.Group):
    """A group whose :class:`AvidPipelineError` are shown as one message."""
