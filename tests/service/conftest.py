"""A run that nothing interrupted: what every other must equal."""

from pathlib import Path

import pytest

from tests.service.main_job import finish, start


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(start(out))
    return out
