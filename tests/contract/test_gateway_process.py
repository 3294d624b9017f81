"""The gateway as its own process, over TLS."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.local_group import free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_TIMEOUT_S = 120.0


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the test's certificate, is not installed")
    files = (tmp_path / "cert.pem", tmp_path / "key.pem")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    subprocess.run(
        ["openssl", "req", *kind, *subject, "-out", str(files[0]), "-keyout", str(files[1])],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return files


@pytest.fixture
def https(certificate: tuple[Path, Path]) -> Iterator[httpx.Client]:
    """A client of a gateway process with that certificate."""
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port)]
    tls = ["--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "rdt_core.gateway", *flags, *tls],
        env={**os.environ, "RDT_GATEWAY_API_KEY": "of this test"},
    )
    trust = ssl.create_default_context(cafile=str(certificate[0]))
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, timeout=30.0) as client:

        def is_up() -> bool:
            assert process.poll() is None, "the gateway ended"
            try:
                return client.get("/health").is_success
            except httpx.TransportError:
                return False

        try:
            wait_for(is_up, START_TIMEOUT_S)
            yield client
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)
    # uvicorn ends itself by the signal once it has shut down.
    assert process.returncode in (0, -15)


def test_the_command_serves_https_and_wants_the_key(https: httpx.Client) -> None:
    assert https.get("/health").json() == {"status": "healthy"}
    assert https.get("/pairs").status_code == 401
    answer = https.get("/pairs", headers={"Authorization": "Bearer of this test"})
    assert answer.json() == {"pairs": []}
    plain = str(https.base_url).replace("https", "http")
    with pytest.raises(httpx.TransportError):
        httpx.get(plain + "/health")
