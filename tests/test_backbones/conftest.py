"""Shared by the tests of backbones."""

import io
import logging
from collections.abc import Iterator

import pytest
from mmengine.logging import MMLogger


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What OpenMMLab's current logger writes."""
    stream = io.StringIO()
    logger, handler = MMLogger.get_current_instance(), logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
