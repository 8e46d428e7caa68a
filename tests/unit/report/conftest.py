"""A run's folder to report."""

import pytest

from tests.unit.run_folder import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")
