"""Tests files that :mod:`hat_mm.engine.export` wrote as if they were models.

It is what ``tools/test.py CONFIG MODEL.onnx`` uses: data, pre-processing and metrics are the
config's, only the network is the file.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor

from hat_mm import compat
from hat_mm.registry import MODELS
from hat_mm_runtime import Model

from .cli import UserError
from .graphs import paste


def open_file(path: str | Path) -> Model:
    """Opens a file.

    Raises:
        hat_mm_runtime.ModelError: It is missing or broken, or was not written by hat_mm.
        hat_mm.compat.DependencyError: onnxruntime or OpenVINO is not installed.
    """
    compat.require('openvino' if Path(path).suffix == '.xml' else 'onnxruntime')
    return Model(path)


TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}


@MODELS.register_module()
class ExportedModel(BaseModel):
    """A model whose network is an exported file; for testing it with a config.

    Args:
        module: The config's model. Its pre-processing is used, not its weights.
        file: Path of the file.
        data_preprocessor: The config's, where it stands beside the model.

    Raises:
        UserError: The file is not one of this config's task.
        hat_mm_runtime.ModelError: It cannot be opened.
        hat_mm.compat.DependencyError: onnxruntime or OpenVINO is not installed.
    """

    def __init__(
        self, module: dict[str, Any], file: str, data_preprocessor: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.file = open_file(file)
        scope = importlib.import_module('mmengine.registry').DefaultScope.get_current_instance()
        task = TASKS.get(scope and scope.scope_name)
        if task != self.file.meta['task']:
            raise UserError(
                f"{file!r} is for {self.file.meta['task']}, the config's default_scope is "
                f'{scope and scope.scope_name!r}'
            )
        if data_preprocessor is not None:
            module = {'data_preprocessor': data_preprocessor, **module}
        registry = importlib.import_module(f'{scope.scope_name}.registry')
        self.model = registry.MODELS.build(module)
        self.data_preprocessor = self.model.data_preprocessor
        if task == 'segmentation':
            self.model.encode_decode = self._encode_decode
            # Test time augmentation reads these.
            self.out_channels = self.model.out_channels
            self.decode_head = self.model.decode_head
            if self.out_channels != self.file.meta['out_channels']:
                raise UserError(
                    f'{file!r} has {self.file.meta["out_channels"]} classes, the config '
                    f'{self.out_channels}'
                )

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        """Predicts a batch as the config's model does.

        Raises:
            ValueError: ``mode`` is not ``'predict'``.
        """
        if mode != 'predict':
            raise ValueError(f'a file can only predict, got mode={mode!r}')
        if self.file.meta['task'] == 'segmentation':
            return self.model.predict(inputs, data_samples)
        for image, sample in zip(inputs, data_samples, strict=True):
            if self.file.meta['task'] == 'classification':
                scores = torch.from_numpy(self._run(image[None])['output'])[0]
                sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))
            else:
                sample.pred_instances = self._detect(image, sample)
        return data_samples

    def _run(self, images: Tensor) -> dict[str, np.ndarray]:
        return self.file.run(images.cpu().numpy())

    def _encode_decode(self, inputs: Tensor, batch_img_metas: Any = None) -> Tensor:
        """Scores of the classes, (B, K, H, W), in place of mmseg's."""
        outputs = torch.cat(
            [torch.from_numpy(self._run(image[None])['output']) for image in inputs]
        )
        if outputs.dtype != torch.float32:  # classes: certain scores
            outputs = F.one_hot(outputs[:, 0], max(self.out_channels, 2)).permute(0, 3, 1, 2) * 1e3
            outputs = outputs[:, 1:] - 500 if self.out_channels == 1 else outputs
        return outputs.to(inputs)

    def _detect(self, image: Tensor, sample: Any) -> InstanceData:
        """Detects in one image; boxes and masks are of the original image's size."""
        # As alone in its batch: only the image and what the divisor asks for.
        height, width = sample.img_shape[:2]
        divisor = getattr(self.data_preprocessor, 'pad_size_divisor', 1)
        rows, cols = (-(-n // divisor) * divisor for n in (height, width))
        outputs = self._run(image[None, :, :rows, :cols])
        dets, labels = (torch.from_numpy(outputs[name][0]) for name in ('dets', 'labels'))
        limit = dets.new_tensor([width, height, width, height])
        scale = dets.new_tensor(sample.scale_factor).repeat(2)
        boxes = dets[:, :4].clamp(min=dets.new_zeros(4), max=limit) / scale
        found = InstanceData(bboxes=boxes, scores=dets[:, 4], labels=labels)
        if 'masks' in outputs:
            masks = torch.from_numpy(outputs['masks'][0])
            pasted = masks.dtype == torch.bool
            size = tuple(sample.ori_shape[:2])
            found.masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
            # One by one: all masks of a large image at once take gigabytes.
            for i, mask in enumerate(masks):
                if pasted:
                    mask = mask[None, None, :height, :width].float()
                    probability = F.interpolate(mask, size, mode='bilinear')[0, 0]
                else:
                    probability = paste(mask[None], boxes[i : i + 1], size)[0]
                found.masks[i] = probability >= self.file.meta['mask_threshold']
        return found
