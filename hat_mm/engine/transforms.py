"""Transforms of data pipelines."""

import logging
from typing import Any

import cv2
import mmcv.transforms
import torch
from mmengine.logging import print_log

from hat_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImageOrSkip(mmcv.transforms.LoadImageFromFile):
    """mmcv's ``LoadImageFromFile`` for training, which leaves out images that cannot be read.

    The dataset takes another image at random, as for any transform that returns None. The log names
    each image that is left out and counts them. OpenCV 4 reads a JPEG file that ends too early and
    fills what is missing with grey; OpenCV 5 and ``imdecode_backend='pillow'`` do not.

    Args:
        *args: Arguments of mmcv's transform.
        **kwargs: The same, by name.

    Attributes:
        skipped: How many images were left out, by all workers of this process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = torch.zeros((), dtype=torch.int64, device='cpu').share_memory_()

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Adds ``img``, ``img_shape`` and ``ori_shape``, or returns None."""
        try:
            return super().transform(results)
        # Of the file system, mmcv, OpenCV, and pillow.
        except (OSError, AssertionError, cv2.error, SyntaxError) as error:
            self.skipped += 1
            text = f'image {results["img_path"]!r} is left out ({error})'
            print_log(f'{text}; {int(self.skipped)} so far', 'current', logging.WARNING)
            return None
