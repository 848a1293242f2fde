"""Shared by the tests of backbones."""

import io
import logging
from collections.abc import Iterator

import pytest
from mmengine.logging import MMLogger


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What OpenMMLab's current logger writes, after the level."""
    stream = io.StringIO()
    logger, handler = MMLogger.get_current_instance(), logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter('%(levelname)s %(message)s'))
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
