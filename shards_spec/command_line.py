"""What the four command lines share: errors of ours become one clear message and exit code 1."""

from collections.abc import Callable
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


def parse_assignments(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Click callback: ``KEY=VALUE`` texts as a dictionary.

    Raises:
        click.BadParameter: a text has no ``=`` or no key.
    """
    assignments = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"expected KEY=VALUE, found {value!r}")
        assignments[key] = text
    return assignments


def storage_options(*names: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A repeatable ``KEY=VALUE`` option that reaches the command as a dictionary for ``open_storage``."""
    return click.option(*names, multiple=True, metavar="KEY=VALUE", callback=parse_assignments, help=help)


storage_option = storage_options(
    "--storage-option",
    "storage_option",
    help="Setting of the object store, for example aws_endpoint=http://host:9000; may be given several times. "
    "Credentials come from the usual environment variables and files.",
)
