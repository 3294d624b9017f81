"""The commands of ``rdt``, put together. Each command is a module of this package and registers here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import rdt_core
from rdt_core.cli import (
    doctor_command,
    gateway_command,
    group_commands,
    manifest_command,
    plan_command,
    simulate_command,
    trace_command,
)
from rdt_core.errors import RdtError


class _Group(TyperGroup):
    """Turns our errors into one sentence on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RdtError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="rdt",
    cls=_Group,
    help="Weight sync from live trainers into live inference engines: plan it, predict it, look into it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:  # noqa: FBT001  typer calls it with the flag's value
    if asked:
        typer.echo(f"rdt {rdt_core.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[  # noqa: FBT002  a flag of the command line, handled by its callback
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Weight sync from live trainers into live inference engines: plan it, predict it, look into it."""


app.command("gateway", context_settings=gateway_command.CONTEXT)(gateway_command.run)
app.command("manifest")(manifest_command.run)
app.command("plan")(plan_command.run)
app.command("simulate")(simulate_command.run)
app.command("trace")(trace_command.run)
app.command("doctor")(doctor_command.run)
app.command("status")(group_commands.status)
app.command("update")(group_commands.update)
