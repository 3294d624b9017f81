"""The gateway's status page: rendered here, no script, no build step, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import jinja2
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from rdt_core import __version__
from rdt_core.engine_routes import key_guard
from rdt_core.errors import RdtError
from rdt_core.report import SyncFailure, SyncReport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from rdt_core.gateway.pair import Pair
    from rdt_core.gateway.pairs import Pairs

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_MAX_AT_ONCE = 16
_MAX_NUMBERED_COLUMNS = 32


def make_status_router(pairs: Pairs, api_keys: Sequence[str]) -> APIRouter:
    """The route ``/``. A browser sends the key as the password of any user, API clients as a bearer token."""
    router = APIRouter(dependencies=[Depends(_browser_guard(api_keys))])

    @router.get("/", response_class=HTMLResponse)
    async def status_page() -> HTMLResponse:
        return HTMLResponse(await run_in_threadpool(render, pairs.all()), headers=_HEADERS)

    return router


def render(pairs: Sequence[Pair]) -> str:
    """The page. Blocks until every pair's coordinator has answered or failed to."""
    with ThreadPoolExecutor(max_workers=_MAX_AT_ONCE) as pool:
        views = list(pool.map(_view_pair, pairs))
    return _template().render(pairs=views, version=__version__)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rdt_core.gateway"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("status.html")


def _browser_guard(api_keys: Sequence[str]) -> Callable[[Request], Awaitable[None]]:
    guard = key_guard(api_keys)
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys if key]

    async def check(request: Request) -> None:
        sent = hashlib.sha256(_password(request).encode()).digest()
        matches = [secrets.compare_digest(sent, digest) for digest in digests]
        if any(matches):
            return
        try:
            await guard(request)
        except HTTPException as error:
            error.headers = {"WWW-Authenticate": 'Basic realm="rdt gateway", charset="UTF-8"'}
            raise

    return check


def _password(request: Request) -> str:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(sent, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _view_pair(pair: Pair) -> dict[str, Any]:
    described = pair.describe()
    unreachable, status = "", None
    try:
        status = pair.status()
    except RdtError as error:
        unreachable = error.message
    trainers: Mapping[Any, Any] = (status or {}).get("trainers", {})
    published = min((int(trainer["version"]) for trainer in trainers.values()), default=0)
    report = pair.last.report if pair.last else None
    return {
        "name": described["pair_name"],
        "group": described["group"],
        "state": described["state"],
        "running_version": described["running_version"],
        "last_error": described["last_error"],
        "unreachable": unreachable,
        "published": published,
        "world_size": (status or {}).get("world_size", 0),
        "alive": sum(bool(trainer["alive"]) for trainer in trainers.values()),
        "silent": [rank for rank, trainer in sorted(trainers.items()) if not trainer["alive"]],
        "num_leases": len((status or {}).get("leases", ())),
        "engines": [_view_engine(pair, url, published) for url in described["engines"]],
        "syncs": _view_syncs(pair.history()),
        "heat": _view_heat(report) if report is not None else None,
    }


def _view_engine(pair: Pair, url: str, published: int) -> dict[str, Any]:
    ranks = pair.engine_ranks().get(url, ())
    serves = pair.last.report.version if pair.last else 0
    return {
        "url": url,
        "num_ranks": len(ranks),
        "version": serves,
        "behind": max(0, published - serves),
        "transports": sorted({name for rank in ranks for name in rank.get("trainers", {}).values()}),
        "modes": sorted({str(rank["mode"]) for rank in ranks if "mode" in rank}),
        "nbytes": sum(int(rank.get("nbytes", 0)) for rank in ranks),
    }


def _view_syncs(history: Sequence[SyncReport | SyncFailure]) -> list[dict[str, Any]]:
    """Newest first; bars share one scale, the longest sync shown."""
    longest = max((_seconds(sync) for sync in history), default=0.0) or 1.0
    return [_view_sync(sync, longest) for sync in reversed(history)]


def _view_sync(sync: SyncReport | SyncFailure, longest_s: float) -> dict[str, Any]:
    view = {
        "version": sync.version,
        "began": datetime.fromtimestamp(sync.started_unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "total": _show_seconds(_seconds(sync)),
    }
    if isinstance(sync, SyncFailure):
        error = f"{sync.error_type} in {sync.phase}"
        share = _percent(sync.seconds, longest_s)
        return {**view, "shares": [("wait", share)], "stall": "", "rate": "", "error": error}
    parts = (
        ("wait", sync.publish_wait_s),
        ("prepare", sync.prepare_s),
        ("commit", max(0.0, sync.total_s - sync.publish_wait_s - sync.prepare_s)),
    )
    return {
        **view,
        "shares": [(name, _percent(seconds, longest_s)) for name, seconds in parts],
        "stall": _show_seconds(sync.stall_s),
        "rate": f"{sync.gigabytes_per_s:.2f}",
        "error": "",
    }


def _view_heat(report: SyncReport) -> dict[str, Any]:
    """Bytes that each engine rank read from each trainer rank in the last completed sync."""
    columns = sorted({link.trainer_rank for row in report.ranks for link in row.links})
    most = max((link.nbytes for row in report.ranks for link in row.links), default=0) or 1
    has_text = len(columns) <= _MAX_NUMBERED_COLUMNS
    rows = []
    for row in report.ranks:
        by_trainer = {link.trainer_rank: link for link in row.links}
        cells = []
        for rank in columns:
            link = by_trainer.get(rank)
            nbytes = link.nbytes if link else 0
            tip = f"{nbytes:,} bytes from trainer {rank}"
            if link is not None:
                tip += f" by {link.transport} in {_show_seconds(link.seconds)}"
            text = f"{nbytes / 1e6:.3g}" if has_text and nbytes else ""
            cells.append({"share": round(nbytes / most, 3), "tip": tip, "text": text})
        rows.append({"name": f"{row.engine} {row.rank}", "cells": cells})
    return {"version": report.version, "columns": columns, "rows": rows, "most": most}


def _seconds(sync: SyncReport | SyncFailure) -> float:
    return sync.total_s if isinstance(sync, SyncReport) else sync.seconds


def _percent(seconds: float, longest_s: float) -> float:
    return round(100 * seconds / longest_s, 2)


def _show_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
