"""The gateway's status page, as HTML and in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.contract.test_gateway import KEY, SETTINGS, Gateway, gateway_of
from tests.local_group import LocalGroup, local_group

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def group() -> Iterator[LocalGroup]:
    with local_group() as made:
        yield made


@pytest.fixture(scope="module")
def gateway(group: LocalGroup) -> Iterator[Gateway]:
    """A gateway with one pair of two engines, three syncs and a failed one; the trainers are one ahead."""
    with group.serve_engine() as one, group.serve_engine() as two, gateway_of(group) as made:
        body = {"pair_name": "actor-rollout", "group": group.name, "inference_worker_urls": [one, two]}
        assert made.post("/connect", **body).status_code == 200
        for _ in range(3):
            assert made.update("actor-rollout", group.write_and_publish()).status_code == 200
        assert made.update("actor-rollout", group.version + 1, timeout_s=0.1).status_code == 409
        group.write_and_publish()
        yield made


def page_of(gateway: Gateway) -> str:
    answer = httpx.get(gateway.url, auth=("anyone", KEY))
    assert answer.status_code == 200
    return answer.text


def test_the_page_tells_groups_engines_versions_and_syncs(gateway: Gateway) -> None:
    page = page_of(gateway)
    for shown in (
        "actor-rollout",
        "group policy, connected",
        "published version <b>4</b>",
        "2 of 2 trainer ranks are alive",
        "NotPublishedError in publish_wait",
        "bytes from trainer 1 by memory",
    ):
        assert shown in page
    assert page.count('class="good">served') == 3


def test_the_page_runs_no_script_and_loads_nothing(gateway: Gateway) -> None:
    answer = httpx.get(gateway.url, auth=("anyone", KEY))
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for loading in ("<script", "src=", "href=", "@import", "url("):
        assert loading not in answer.text


def test_what_comes_from_outside_is_escaped(group: LocalGroup, gateway: Gateway) -> None:
    sync_error = "<img src=x onerror=alert(1)>"
    with gateway_of(group) as other:
        other.post("/connect", pair_name="x", group=sync_error, inference_worker_urls=["http://127.0.0.1:9"])
        assert sync_error not in page_of(other)
    assert "onerror" not in page_of(gateway)


def test_a_browser_is_asked_for_the_key_and_api_clients_send_it_as_ever(gateway: Gateway) -> None:
    for headers in ({}, {"Authorization": "Basic !"}, {"Authorization": "Bearer wrong"}):
        refused = httpx.get(gateway.url, headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
    assert httpx.get(gateway.url, auth=("anyone", "wrong")).status_code == 401
    assert gateway.http.get("/").status_code == 200
    # A password that a browser keeps must not be good for anything but looking.
    assert httpx.get(f"{gateway.url}/pairs", auth=("anyone", KEY)).status_code == 401


def test_a_gateway_without_pairs_says_so(group: LocalGroup) -> None:
    with gateway_of(group, SETTINGS) as empty:
        assert "No pair is connected" in page_of(empty)


def test_a_browser_shows_the_timeline_and_the_heat_map(gateway: Gateway, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {BROWSERS} is installed; on Debian `apt install chromium`")
    file = tmp_path / "status.html"
    file.write_text(page_of(gateway))
    shot = tmp_path / "status.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,900"]
    folder = f"--user-data-dir={tmp_path / 'profile'}"
    for output in ("--dump-dom", f"--screenshot={shot}"):
        done = subprocess.run(
            [browser, *flags, folder, output, f"file://{file}"],
            capture_output=True,
            text=True,
            timeout=BROWSER_TIMEOUT_S,
            check=True,
        )
        if output == "--dump-dom":
            assert done.stdout.count('<i class="prepare"') == 3 + 1, "three bars and the key"
            assert done.stdout.count("bytes from trainer") == 4, "two engine ranks by two trainer ranks"
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 20_000, "a blank page of this size compresses to less"
