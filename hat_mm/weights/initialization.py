"""Initializes models without a line of mmengine's log for each parameter."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger


def initialize(model: Any) -> None:
    """Calls ``model.init_weights()``, which also loads what ``init_cfg`` names.

    Constructors leave some parameters uninitialized, those of mmdet's DINO for example.
    """
    with only_warnings():
        model.init_weights()


@contextmanager
def only_warnings() -> Iterator[None]:
    """Keeps all but warnings and errors out of mmengine's log for a while."""
    logger = MMLogger.get_current_instance()

    def is_warning(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger.addFilter(is_warning)
    try:
        yield
    finally:
        logger.removeFilter(is_warning)
