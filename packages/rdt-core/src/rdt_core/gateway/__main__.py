"""Serves the gateway, ``rdt gateway``. Flags are those of AReaL's gateway, and a few more."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from rdt_core import choice, settings
from rdt_core.errors import ConfigError
from rdt_core.gateway.app import make_app
from rdt_core.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHUTDOWN_TIMEOUT_S = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until ended; returns 2 when the settings cannot be used."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        wanted = settings_of(args)
    except (ConfigError, OSError) as error:
        print(f"rdt gateway: {error}", file=sys.stderr)  # noqa: T201  a command's own message
        return 2
    serve(wanted, args)
    return 0


def serve(wanted: GatewaySettings, args: argparse.Namespace) -> None:
    """Run the server in this thread until it is ended by a signal."""
    uvicorn.run(
        make_app(wanted),
        host=wanted.host,
        port=wanted.port,
        log_level=args.log_level,
        access_log=False,
        server_header=False,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
    )


def settings_of(args: argparse.Namespace) -> GatewaySettings:
    """The settings that the flags and the environment ask for.

    Raises:
        ConfigError: they would let anyone drive the gateway.
        OSError: the key file cannot be read.
    """
    key = args.admin_api_key or settings.read_key(settings.GATEWAY_API_KEY)
    if args.api_key_file:
        key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
    return GatewaySettings(
        host=args.host,
        port=args.port,
        api_key=key,
        group=args.group,
        transport=args.transport,
        commit_policy=args.commit_policy,
        fan_out=args.fan_out,
        read_share=args.read_share,
        engine_api_key=settings.read_key(settings.ENGINE_API_KEY),
        trainer_api_key=settings.read_key(settings.TRAINER_API_KEY),
        init_timeout_s=args.init_timeout,
        update_timeout_s=args.update_timeout,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="rdt gateway", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7080, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--admin-api-key",
        default="",
        help="bearer token of clients; other users can see it in the process list, so better "
        f"{settings.GATEWAY_API_KEY} or --api-key-file",
    )
    parser.add_argument("--api-key-file", default="", help="file that holds the bearer token of clients")
    parser.add_argument("--group", default="", help="sync group of a /connect that names none")
    parser.add_argument(
        "--transport", default=choice.AUTO, help="for every link (default: %(default)s, each link chooses)"
    )
    parser.add_argument(
        "--commit-policy",
        default="group",
        help="group: all engines of a pair or none; engine: each for itself (default: %(default)s)",
    )
    parser.add_argument(
        "--fan-out",
        default="auto",
        help="auto, always or never: engine ranks of one node that need the same read it once, together "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--read-share",
        type=float,
        default=1.0,
        help="share of the time in which an engine rank moves bytes while it reads; below 1 it rests "
        "between pieces, so that generation feels less of it (default: %(default)s)",
    )
    parser.add_argument("--init-timeout", type=float, default=300.0, help="seconds for a connect")
    parser.add_argument(
        "--update-timeout", type=float, default=120.0, help="seconds for each phase of an update"
    )
    parser.add_argument("--ssl-certfile", default=None, help="serve HTTPS with this certificate")
    parser.add_argument("--ssl-keyfile", default=None, help="private key of the certificate")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
