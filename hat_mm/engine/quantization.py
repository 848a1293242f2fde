"""Post-training quantization of exported files to int8, by onnxruntime and by NNCF.

Both watch the network on pictures and store the ranges of its tensors in the file: onnxruntime as
QuantizeLinear and DequantizeLinear, NNCF as FakeQuantize. An engine computes what lies between
them in 8 bits.
"""

import importlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hat_mm import compat
from hat_mm.configs import innermost_dataset
from hat_mm_runtime import META, images

from .cli import UserError
from .own_data import SUFFIXES

# Convolutions and matrix products, which become 8 bit. The name of a node is MODULE/OPERATOR.
_PRODUCTS = ['Conv', 'ConvTranspose', 'Gemm', 'MatMul']
# What stays in float in all families, beside the first layer; docs/deployment.md has the figures.
_POSITIONS = [r'pos_embed', r'attn\.bias', 'tokenizer']


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture, (H, W, 3), BGR.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return images.read(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def require_nncf() -> Any:
    """Imports NNCF.

    Raises:
        hat_mm.compat.DependencyError: It is not installed.
    """
    os.environ.setdefault('NNCF_CI', '1')  # it would report its use to a server
    return compat.require('nncf')


def find_pictures(source: str | Path, cfg: Any, samples: int) -> list[Path]:
    """Chooses pictures for calibration, evenly spaced.

    Args:
        source: A folder, which is searched with all folders in it, or ``'dataset'`` for the
            training images of the config.
        cfg: The config, or None.
        samples: Their number, if there are as many.

    Raises:
        UserError: There are none.
    """
    if str(source) != 'dataset':
        if not os.path.isdir(source):
            raise UserError(f"calibration={str(source)!r} is neither a folder nor 'dataset'")
        named = (path for path in Path(source).rglob('*') if path.suffix.lower() in SUFFIXES)
        found = [path for path in named if path.is_file()]
    elif cfg is None or 'train_dataloader' not in cfg:
        raise UserError("calibration='dataset' needs a config with a train_dataloader")
    else:
        datasets = importlib.import_module(f'{cfg.default_scope}.registry').DATASETS
        try:
            data = datasets.build(innermost_dataset(cfg.train_dataloader))
        except OSError as error:
            raise UserError(
                f'the training images cannot be had ({error}); name a folder of pictures by '
                'calibration'
            ) from error
        found = [data.get_data_info(i).get('img_path') for i in _spaced(len(data), samples)]
        if None in found:
            raise UserError(
                'the training images are not in files of their own; name a folder of pictures by '
                'calibration'
            )
    if not found:
        raise UserError(f'calibration={str(source)!r} has no pictures')
    found = sorted(Path(path) for path in found)
    return [found[i] for i in _spaced(len(found), samples)]


def _spaced(number: int, samples: int) -> list[int]:
    return [i * number // samples for i in range(samples)] if number > samples else [*range(number)]


def quantize(
    source: Path,
    target: Path,
    *,
    meta: dict[str, Any],
    pictures: Sequence[Path],
    sensitive: Sequence[str],
) -> None:
    """Writes a file in int8.

    Args:
        source: The ONNX file in float.
        target: File to write; its end decides the format.
        meta: Metadata of the source.
        pictures: For the calibration.
        sensitive: Regular expressions for the names of modules that stay in float, beside those
            of all models.
    """
    onnx = importlib.import_module('onnx')
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        ready = Path(folder, 'model.onnx')
        # Fuses batch norms, and keeps the names of the nodes.
        importlib.import_module('onnxruntime.quantization.shape_inference').quant_pre_process(
            source, ready, skip_symbolic_shape=True
        )
        nodes = onnx.load(source, load_external_data=False).graph.node
        kept = _float_modules(nodes, sensitive)
        meta = dict(meta, precision='int8', samples=len(pictures), float=kept)
        write = _by_onnxruntime if target.suffix == '.onnx' else _by_nncf
        write(ready, target, meta=meta, pictures=pictures)


def _float_modules(nodes: Iterable[Any], sensitive: Sequence[str]) -> list[str]:
    """The modules with products that stay in float."""
    products = [node.name for node in nodes if node.op_type in _PRODUCTS]
    pattern = '|'.join([*_POSITIONS, *sensitive])
    kept = products[:1] + [name for name in products if re.search(pattern, name)]
    return sorted({name.rpartition('/')[0] for name in kept if '/' in name})


def prepare(path: Path, meta: dict[str, Any]) -> np.ndarray:
    """Reads a picture as the network is given it, (1, 3, H, W).

    Raises:
        UserError: It cannot be read, or is of no use for the file.
    """
    try:
        return images.prepare(images.read(path), meta)[0]
    except (images.PictureError, images.ModelError) as error:
        raise UserError(f'calibration with {str(path)!r}: {error}') from error


def _by_onnxruntime(
    source: Path, target: Path, *, meta: dict[str, Any], pictures: Sequence[Path]
) -> None:
    onnx = importlib.import_module('onnx')
    library: Any = importlib.import_module('onnxruntime.quantization')
    base: Any = library.CalibrationDataReader

    class Reader(base):
        paths = iter(pictures)

        def get_next(self) -> dict[str, np.ndarray] | None:
            path = next(self.paths, None)
            return None if path is None else {'input': prepare(path, meta)}

    names = [node.name for node in onnx.load(source, load_external_data=False).graph.node]
    # Nodes that belong to no module are post-processing.
    kept = [n for n in names if '/' not in n or n.rpartition('/')[0] in meta['float']]
    library.quantize_static(
        source,
        target,
        Reader(),
        op_types_to_quantize=_PRODUCTS,
        nodes_to_exclude=kept,
        per_channel=True,
        # Processors without VNNI add up pairs of products in 16 bits.
        reduce_range=True,
        activation_type=library.QuantType.QUInt8,
        weight_type=library.QuantType.QInt8,
    )
    model = onnx.load(target)
    onnx.helper.set_model_props(model, {META: json.dumps(meta)})
    # onnxruntime also names sets of operators that no node uses.
    domains = {'', *(node.domain for node in model.graph.node)}
    used = [item for item in model.opset_import if item.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)
    onnx.save(model, target)


def _by_nncf(source: Path, target: Path, *, meta: dict[str, Any], pictures: Sequence[Path]) -> None:
    nncf = require_nncf()
    openvino = importlib.import_module('openvino')
    nncf.set_log_level(logging.ERROR)
    patterns = [f'{re.escape(module)}/' for module in meta['float']]
    model = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset(pictures, lambda path: prepare(path, meta)),
        subset_size=len(pictures),
        ignored_scope=nncf.IgnoredScope(patterns=['[^/]*$', *patterns], validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE
        ),
    )
    model.set_rt_info(json.dumps(meta), [META])
    openvino.save_model(model, target, compress_to_fp16=False)
