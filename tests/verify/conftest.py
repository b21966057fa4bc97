"""The certified run that all tests of evidence look at and copy."""

import pytest
from evidence_case import Case


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("evidence")).make()
