"""Initializes models without a line of mmengine's log for each parameter."""

import logging
from typing import Any

from mmengine.logging import MMLogger


def initialize(model: Any) -> None:
    """Calls ``model.init_weights()``, which also loads what ``init_cfg`` names.

    Constructors leave some parameters uninitialized, those of mmdet's DINO for example.
    """
    log = MMLogger.get_current_instance()
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        model.init_weights()
    finally:
        log.setLevel(level)
