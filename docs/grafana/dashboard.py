"""Writes ``rdt.json`` beside this file: the Grafana dashboard of weight syncs. Run it after changing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("rdt.json")
_WIDTH = 8
_HEIGHT = 8
_COLUMNS = 3
_STALL = 'group=~"$group",phase="stall"'


def _quantile(share: float, selector: str, by: str) -> str:
    rate = f"rate(rdt_sync_phase_seconds_bucket{{{selector}}}[5m])"
    return f"histogram_quantile({share}, sum by ({by}) ({rate}))"


def _mean(selector: str) -> str:
    seconds, count = (f"rate(rdt_sync_phase_seconds_{part}{{{selector}}}[5m])" for part in ("sum", "count"))
    return f"sum({seconds}) / sum({count})"


PANELS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Staleness: versions an engine is behind",
        "timeseries",
        "short",
        (('max by (engine) (rdt_staleness_versions{group=~"$group"})', "{{engine}}"),),
    ),
    (
        "Sync duration by phase, 95th percentile",
        "timeseries",
        "s",
        (
            (
                _quantile(0.95, 'group=~"$group"', "phase, le"),
                "{{phase}}",
            ),
        ),
    ),
    (
        "Stall: how long generation stood",
        "timeseries",
        "s",
        (
            (
                _mean(_STALL),
                "mean",
            ),
            (
                _quantile(0.99, _STALL, "le"),
                "p99",
            ),
        ),
    ),
    (
        "Versions",
        "timeseries",
        "short",
        (
            ('rdt_trainer_version{group=~"$group"}', "trainers, {{group}}"),
            ('min by (group) (rdt_engine_version{group=~"$group"})', "slowest engine, {{group}}"),
        ),
    ),
    (
        "Rate of one link, by kind",
        "timeseries",
        "GBs",
        (('rdt_link_gigabytes_per_second{group=~"$group"}', "{{transport}}"),),
    ),
    (
        "Bytes by kind of link",
        "timeseries",
        "Bps",
        (('sum by (transport) (rate(rdt_link_bytes_total{group=~"$group"}[5m]))', "{{transport}}"),),
    ),
    (
        "Syncs and failures a minute",
        "timeseries",
        "short",
        (
            ('60 * sum(rate(rdt_syncs_total{group=~"$group"}[5m]))', "syncs"),
            (
                '60 * sum by (phase, error_type) (rate(rdt_sync_failures_total{group=~"$group"}[5m]))',
                "{{error_type}} in {{phase}}",
            ),
        ),
    ),
    (
        "Trainer ranks, engine ranks, leases",
        "timeseries",
        "short",
        (
            ('rdt_trainer_ranks{group=~"$group"}', "trainer ranks {{state}}"),
            ('rdt_engine_ranks{group=~"$group"}', "engine ranks"),
            ('rdt_leases{group=~"$group"}', "leases"),
            ('rdt_coordinator_up{group=~"$group"}', "coordinator up"),
        ),
    ),
    (
        "Seconds since the last sync",
        "stat",
        "s",
        (('time() - rdt_last_sync_timestamp_seconds{group=~"$group"}', "{{group}}"),),
    ),
)


def make_dashboard() -> dict[str, Any]:
    """The dashboard, ready for JSON; Grafana asks for the data source when it is imported."""
    return {
        "uid": "rdt-weight-sync",
        "title": "rdt weight sync",
        "tags": ["rdt"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "__inputs": [
            {"name": "DS_PROMETHEUS", "type": "datasource", "pluginId": "prometheus", "label": "Prometheus"}
        ],
        "templating": {"list": [_group_variable()]},
        "panels": [_panel(number, *panel) for number, panel in enumerate(PANELS)],
    }


def _group_variable() -> dict[str, Any]:
    return {
        "name": "group",
        "label": "group",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${DS_PROMETHEUS}"},
        "query": "label_values(rdt_syncs_total, group)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
    }


def _panel(
    number: int, title: str, kind: str, unit: str, queries: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "title": title,
        "type": kind,
        "datasource": source,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend, "datasource": source}
            for index, (expression, legend) in enumerate(queries)
        ],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(make_dashboard(), indent=1) + "\n", encoding="utf-8")
