"""Runs models that hat_mm exported, with NumPy, OpenCV, and onnxruntime or OpenVINO.

>>> from hat_mm_runtime import Model
>>> model = Model('mask_rcnn.onnx')
>>> found = model('street.jpg')
>>> found.boxes, found.scores, found.names
>>> picture = found.draw()
"""

import os

# onnxruntime reports its use to a server, and reads this when it is imported.
os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')

from .images import ModelError, PictureError
from .model import ENDS, META, Model
from .results import Classification, Detections, Segmentation

__all__ = [
    'ENDS',
    'META',
    'Classification',
    'Detections',
    'Model',
    'ModelError',
    'PictureError',
    'Segmentation',
]
