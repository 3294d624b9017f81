"""The gateway against its own OpenAPI description: whatever fits the schema gets an answer that does, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from rdt_core.errors import UnknownGroupError
from rdt_core.gateway.bodies import ConnectBody
from rdt_core.gateway.settings import GatewaySettings
from tests.contract.test_gateway import KEY

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed; `nox -s env-torch` brings it"
)

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from rdt_core.gateway.answers import INTERNAL_ERROR  # noqa: E402
from rdt_core.gateway.app import make_app  # noqa: E402

if TYPE_CHECKING:
    from rdt_core.sync import WeightSync


def find_no_group(group: str, engines: list[str], **options: Any) -> WeightSync:
    """What ``WeightSync.connect`` does in a cluster without trainers; no request here may start Ray."""
    del engines, options
    raise UnknownGroupError(group, "rdt")


app = make_app(GatewaySettings(api_key=KEY), connect=find_no_group)
schema = schemathesis.openapi.from_dict(app.openapi())
schema.app = app


def fits(body: object) -> bool:
    try:
        ConnectBody.model_validate(body)
    except ValueError:
        return False
    return True


@schema.parametrize()  # type: ignore[untyped-decorator]  # schemathesis is optional here, so mypy sees Any
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_fits_the_schema(case: Any) -> None:
    if case.path == "/connect" and fits(case.body):
        # Hosts that cannot be resolved would cost seconds each; one that refuses at once stands for them.
        case.body = {**case.body, "train_worker_urls": ["http://127.0.0.1:9"]}
    # What fits the schema may still be refused: by mode, by an unknown group, by a worker that is not there.
    answer = case.call_and_validate(
        headers={"Authorization": f"Bearer {KEY}"},
        excluded_checks=[positive_data_acceptance, not_a_server_error],
    )
    assert answer.status_code != INTERNAL_ERROR
