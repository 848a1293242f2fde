"""Small models with random weights, and exported files with constant results."""

import json

import cv2
import numpy as np
import onnx
import torch
from mmengine.config import Config
from test_deployment.tiny_models import config, spread

import hat_mm
import hat_mm_runtime

# --- exported files -------------------------------------------------------------------------------

CLASSES = ['cat', 'dog', 'élan']
META = dict(
    classes=CLASSES,
    palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]],
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=1,
    resize=[],
    precision='fp32',
    static=None,
)
DETECTING = dict(META, task='detection', pad_size_divisor=32, mask_threshold=0.5)
SEGMENTING = dict(META, task='segmentation', out_channels=5, threshold=None)
CLASSIFYING = dict(META, task='classification')


def write(path, meta, **outputs):
    """A file whose outputs do not depend on the image."""
    arrays = {name: onnx.numpy_helper.from_array(array, name) for name, array in outputs.items()}
    nodes = [
        onnx.helper.make_node('Constant', [], [name], value=tensor)
        for name, tensor in arrays.items()
    ]
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        'constant',
        [make('input', 1, ['batch', 3, 'height', 'width'])],
        [make(name, tensor.data_type, tensor.dims) for name, tensor in arrays.items()],
    )
    opset = [onnx.helper.make_opsetid('', 20)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.helper.set_model_props(model, {hat_mm_runtime.META: json.dumps(meta)})
    onnx.save(model, path)
    return path


def picture(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


# --- models -----------------------------------------------------------------------------------

PIPELINES = {
    'mmdet': [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(160, 96), keep_ratio=True),
        dict(type='PackDetInputs'),
    ],
    'mmseg': [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(160, 96), keep_ratio=True),
        dict(type='PackSegInputs'),
    ],
    'mmpretrain': [
        dict(type='LoadImageFromFile'),
        dict(type='ResizeEdge', scale=96, edge='short'),
        dict(type='CenterCrop', crop_size=64),
        dict(type='PackInputs'),
    ],
}
NUM_CLASSES = {'mmdet': 3, 'mmseg': 5, 'mmpretrain': 7}


def model_of(kind: str, backbone: dict | None = None) -> torch.nn.Module:
    """A tiny model with random weights, as ``get_model`` returns it."""
    cfg: Config = config(kind)
    if backbone is not None:
        cfg.model.backbone = backbone
    scope = cfg.default_scope
    classes = [f'c{i}' for i in range(NUM_CLASSES[scope])]
    cfg.test_dataloader = dict(
        dataset=dict(pipeline=PIPELINES[scope], metainfo=dict(classes=classes))
    )
    return spread(hat_mm.get_model(cfg))
