"""A tiny model on disk, shared by all fault tests."""

from __future__ import annotations

import pytest
from tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
