"""Short runs by default; ``--long`` (``make soak``) for as long as it takes to believe in them."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="thousands of kills, a million frames: some ten minutes")


@pytest.fixture(scope="session")
def long_runs(request: pytest.FixtureRequest) -> bool:
    # Not known where pytest was started for more than this folder.
    return bool(request.config.getoption("--long", default=False))
