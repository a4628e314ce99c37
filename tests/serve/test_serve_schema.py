"""What the API says of itself is true: requests made from its description get the answers it describes."""

import pytest
import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from live import LEAKS, live
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from latteflow.serve.api.keys import ApiKeys
from latteflow.serve.api.settings import ServerSettings

KEY = "a-key-that-is-long-enough"
KEYED = {"Authorization": f"Bearer {KEY}"}
OPEN = ["GET /livez", "GET /readyz", "GET /health"]  # nothing can be asked of them in a wrong way
OPERATIONS = [
    *OPEN,
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /v1/images/generations",
    "POST /v1/chat/completions",
]


@pytest.fixture(scope="module")
def described(toy_pipe):
    with live(FakeEngine(toy_pipe), ServerSettings(model="toy", keys=ApiKeys([KEY]))) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEYED)
        yield {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, mode) for label in OPERATIONS for mode in GenerationMode if label not in OPEN or mode.is_positive],
)
def test_the_description_is_true(described, label, mode):
    """Every answer has a described status and shape, requests against the description are refused, none breaks it.

    What the description cannot say (give one of two fields, a size the model draws) may refuse a request that fits it.
    """
    assert set(described) == set(OPERATIONS)
    operation = described[label]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def holds(case):
        assert not LEAKS.search(case.call_and_validate(headers=KEYED, excluded_checks=[positive_data_acceptance]).text)

    holds()
