"""``rdt gateway``: the HTTP front, ``python -m rdt_core.gateway`` under another name."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from rdt_core.errors import ConfigError

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_NEEDED = ("fastapi", "uvicorn", "jinja2", "torch", "ray")


def run(context: typer.Context) -> None:
    """Serve the gateway; `rdt gateway --help` lists its flags."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the gateway needs {', '.join(missing)}, which this Python does not have. Install it with "
            "`pip install 'rdt-core[gateway,metrics,ray,torch]'`."
        )
    from rdt_core.gateway.__main__ import main  # noqa: PLC0415  the other commands run without it

    raise typer.Exit(main(context.args))
