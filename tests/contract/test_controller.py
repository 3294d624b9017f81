"""The gateway's controller in Python: the same pairs, without HTTP of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from rdt_core.errors import NotConnectedError, NotPublishedError, StaleVersionError, UpdateFailedError
from rdt_core.gateway.controller import WeightUpdateController
from rdt_core.gateway.errors import UnsupportedRequestError
from rdt_core.sync import WeightSync
from tests.contract.notes import Notes
from tests.contract.test_gateway import SETTINGS, trainer_apps
from tests.contract.world import expected_fingerprint
from tests.integration.test_sync import fingerprint
from tests.local_group import LocalGroup, local_group


def controller_of(group: LocalGroup, *observers: Notes) -> WeightUpdateController:
    def connect(name: str, engines: list[str], **options: Any) -> WeightSync:
        return WeightSync.connect(name, engines, channel=group.channel, **options)

    return WeightUpdateController(SETTINGS, observers=observers, connect=connect)


def test_it_connects_updates_and_disconnects_a_group() -> None:
    notes = Notes()
    with (
        local_group() as group,
        group.serve_engine() as engine,
        controller_of(group, notes) as controller,
    ):
        with pytest.raises(NotConnectedError):
            controller.update_weights(1)
        with pytest.raises(UnsupportedRequestError, match="train_worker_urls"):
            controller.connect("p", inference_worker_urls=[engine])
        controller.connect("p", group=group.name, inference_worker_urls=[engine])
        group.write_and_publish()
        version = group.write_and_publish()
        first = controller.update_weights(version)
        assert controller.update_weights(version) is first
        assert notes.count("synced") == 1
        assert fingerprint(engine) == expected_fingerprint(version)
        with pytest.raises(NotPublishedError):
            controller.update_weights(version + 1, timeout_s=0.1)
        with pytest.raises(StaleVersionError):
            controller.update_weights(version - 1)
        for _ in range(2):
            controller.disconnect()
        assert httpx.get(f"{engine}/rdt/status").json()["ranks"][0]["group"] is None


def test_where_each_engine_commits_for_itself_one_that_is_gone_is_named_and_tried_again() -> None:
    with local_group() as group, group.serve_engine() as engine:

        def connect(name: str, engines: list[str], **options: Any) -> WeightSync:
            return WeightSync.connect(name, engines, channel=group.channel, **options)

        settings = replace(SETTINGS, commit_policy="engine")
        with WeightUpdateController(settings, connect=connect) as controller:
            with group.serve_engine() as gone:
                controller.connect("p", group=group.name, inference_worker_urls=[engine, gone])
            version = group.write_and_publish()
            done = controller.update_weights(version)
            assert [failure.engine for failure in done.report.failures] == [gone]
            assert fingerprint(engine) == expected_fingerprint(version)
            with pytest.raises(UpdateFailedError, match=gone):
                controller.update_weights(version)


def test_engines_read_as_the_settings_say() -> None:
    with local_group() as group, group.serve_engine() as engine:
        made: list[WeightSync] = []

        def connect(name: str, engines: list[str], **options: Any) -> WeightSync:
            made.append(WeightSync.connect(name, engines, channel=group.channel, **options))
            return made[-1]

        with WeightUpdateController(
            replace(SETTINGS, read_share=0.5, fan_out="always"), connect=connect
        ) as controller:
            controller.connect("p", group=group.name, inference_worker_urls=[engine])
            version = group.write_and_publish()
            controller.update_weights(version)
            assert made[0].engines[engine][0]["read_share"] == 0.5
            assert made[0].engines[engine][0]["landing_key"]
            assert fingerprint(engine) == expected_fingerprint(version)


def test_it_drives_trainers_that_are_driven_over_http() -> None:
    group = LocalGroup()
    with (
        trainer_apps(group) as trainers,
        group.serve_engine() as engine,
        controller_of(group) as controller,
    ):
        controller.connect("p", train_worker_urls=trainers, inference_worker_urls=[engine])
        result = controller.update_weights(group.write())
        assert result.publish_s > 0
        assert fingerprint(engine) == expected_fingerprint(group.version)
