"""Files that :mod:`hat_mm.engine.export` wrote: running them, and testing them as models.

It is what ``tools/test.py CONFIG MODEL.onnx`` uses: data, pre-processing and metrics are the
config's, only the network is the file.
"""

import importlib
import json
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

from .cli import EXPORTED, UserError
from .graphs import paste

# Key of the file's metadata, a JSON text.
META = 'hat_mm'


class ExportedFile:
    """A model file, opened with onnxruntime (``.onnx``) or OpenVINO (``.xml``) on the CPU.

    Args:
        path: The file.

    Attributes:
        meta: What the exporter wrote into the file: task, classes, normalization and the rest.

    Raises:
        UserError: The file is missing or broken, or is not from hat_mm.
        hat_mm.compat.DependencyError: onnxruntime or OpenVINO is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f'model {str(path)!r} does not exist')
        if self.path.suffix not in EXPORTED:
            raise UserError(f'model {str(path)!r} must end with one of {", ".join(EXPORTED)}')
        opening = self._open_onnx if self.path.suffix == '.onnx' else self._open_openvino
        try:
            text = opening()
        except compat.DependencyError:
            raise
        except Exception as error:  # each library has its own, and a broken file may raise any
            cause = ' '.join(str(error).split())[:300]
            raise UserError(f'model {str(path)!r} cannot be opened: {cause}') from error
        if text is None:
            raise UserError(f'model {str(path)!r} was not written by tools/deployment/export.py')
        self.meta: dict[str, Any] = json.loads(text)

    def _open_onnx(self) -> str | None:
        library = compat.require('onnxruntime')
        self._session = library.InferenceSession(str(self.path), providers=['CPUExecutionProvider'])
        self.names = [output.name for output in self._session.get_outputs()]
        self._run = lambda images: self._session.run(None, {'input': images})
        return self._session.get_modelmeta().custom_metadata_map.get(META)

    def _open_openvino(self) -> str | None:
        core = compat.require('openvino').Core()
        model = core.read_model(self.path)
        text = model.get_rt_info([META]).astype(str) if model.has_rt_info([META]) else None
        # By default, OpenVINO computes in bfloat16 where the processor can.
        compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        self.names = [output.any_name for output in compiled.outputs]
        self._run = lambda images: list(compiled([images]).values())
        return text

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the file on normalised images.

        Args:
            images: (B, 3, H, W), float32.

        Returns:
            The outputs by name.

        Raises:
            UserError: The file does not take images of this size.
        """
        fixed = self.meta.get('static')
        if fixed and (1, 3, *fixed) != images.shape:
            raise UserError(
                f'{self.path} takes one image of {fixed[0]}x{fixed[1]} (height x width), got '
                f'{images.shape[0]} of {images.shape[2]}x{images.shape[3]}'
            )
        try:
            results = self._run(np.ascontiguousarray(images))
        except Exception as error:  # each library has its own
            cause = ' '.join(str(error).split())[:300]
            if queries := self.meta.get('queries'):
                cause = f'DINO needs {queries} places on its maps, so a larger image? {cause}'
            size = f'{images.shape[2]}x{images.shape[3]} (height x width)'
            raise UserError(f'{self.path} failed on an image of {size}: {cause}') from error
        return dict(zip(self.names, results, strict=True))


_TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}


@MODELS.register_module()
class ExportedModel(BaseModel):
    """A model whose network is an exported file; for testing it with a config.

    Args:
        module: The config's model. Its pre-processing is used, not its weights.
        file: Path of the file.
        data_preprocessor: The config's, where it stands beside the model.

    Raises:
        UserError: The file is not one of this config's task.
    """

    def __init__(
        self, module: dict[str, Any], file: str, data_preprocessor: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.file = ExportedFile(file)
        scope = importlib.import_module('mmengine.registry').DefaultScope.get_current_instance()
        task = _TASKS.get(scope and scope.scope_name)
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
