"""Writes models as ONNX and OpenVINO files for any image size, and checks what it wrote.

PyTorch's exporter records a module of :mod:`hat_mm.engine.graphs`; OpenVINO converts the ONNX file.
"""

import ast
import copy
import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from torch import nn

from hat_mm import compat
from hat_mm.configs import find_dataset_meta, find_test_dataset
from hat_mm.layers import Deployable, switch_to_deploy
from hat_mm.weights import fileio, loading, sharded
from hat_mm.weights.names import some
from hat_mm.weights.official import IMAGENET_MEAN, IMAGENET_STD
from hat_mm_runtime import ENDS, META
from hat_mm_runtime.images import prepare as normalized

from . import onnx_ops
from .build import build_model, build_type, read_type, swaps_channels
from .cli import UserError, make_writable, read_config
from .comparison import compare
from .environment import versions
from .exported import open_file
from .graphs import Graph, inference_graph
from .quantization import find_pictures, prepare, quantize, read_image, require_nncf

OPSET = 20
PRECISIONS = ('fp32', 'fp16', 'bf16', 'int8')
# Sizes (height, width) at which a file is compared with PyTorch.
SIZES = ((320, 416), (333, 500), (608, 480))
# Windows, levels and RoIs are in the plural here; what is single would become a constant.
_TRACED = (333, 500)
# What protobuf can hold in one file, with room for the graph.
_LARGEST = 2**31 - 2**27
_IMAGENET = dict(mean=[*IMAGENET_MEAN], std=[*IMAGENET_STD], bgr_to_rgb=True)


def export(
    model: Any,
    checkpoint: str | Path | None,
    out: str | Path,
    *,
    precision: str = 'fp32',
    calibration: str | Path = 'dataset',
    samples: int = 64,
    static: tuple[int, int] | None = None,
    opset: int = OPSET,
    scores: bool = False,
    paste_masks: bool = False,
    check: bool = True,
    images: Sequence[str | Path] = (),
) -> Path:
    """Writes a model with its weights as a file for onnxruntime or OpenVINO.

    The graph maps ``input``, normalized images (B, 3, H, W), to final results: detectors, which
    take one image, to ``dets`` (1, N, 5) with boxes and scores, ``labels`` (1, N) and ``masks``,
    segmentors and classifiers to ``output``, a bare backbone to ``stage0`` and so on.

    Args:
        model: Path of a config, a config, a type such as ``hat_mm.FasterViT:arch=0``, or a built
            model, which is copied.
        checkpoint: The weights; None for those that the model has.
        out: File to write. Its end is the format: ``.onnx``, or ``.xml`` with a ``.bin`` beside it.
        precision: ``'fp16'`` stores the weights in half precision, which halves the file; in which
            precision it is computed is the engine's choice. ``'bf16'``, for OpenVINO, also has it
            computed in bfloat16 where the processor can. ``'int8'`` computes in 8 bits but for what
            is sensitive.
        calibration: For ``'int8'``: a folder of pictures that show the ranges of the network's
            tensors; ``'dataset'`` for the training images of the config.
        samples: For ``'int8'``: how many of them are used, if there are as many.
        static: Height and width of the images, one at a time; None for any size.
        opset: Version of the ONNX operators, at least 20.
        scores: Whether a segmentor's output is the scores of all classes instead of the class.
        paste_masks: Whether masks are pasted into the image.
        check: Whether the file is compared with PyTorch before it gets its name.
        images: Pictures for the comparison; by default one that comes with matplotlib.

    Returns:
        The path of the file.

    Raises:
        UserError: An argument is wrong, the model is not supported or does not fit the checkpoint,
            or the file does not give the model's results.
        hat_mm.compat.DependencyError: A package is missing.
    """
    out = _check_arguments(out, precision=precision, static=static, opset=opset, samples=samples)
    pictures = [read_image(path) for path in images or [_sample()]] if check else []
    built, cfg = _build(model)
    examples = find_pictures(calibration, cfg, samples) if precision == 'int8' else []
    built = built.cpu().float()
    if precision == 'int8' and sum(x.nbytes for x in built.parameters()) > _LARGEST:
        raise UserError('int8 is for models of less than 2 GiB in float32; fp16 is for any')
    saved = {} if checkpoint is None else load_weights(built, checkpoint)
    built.eval()  # of some models it returns None
    built = revert_sync_batchnorm(built.requires_grad_(False))
    graph = inference_graph(_folded(built), scores=scores, paste_masks=paste_masks)
    meta = dict(
        task=graph.task,
        **_describe(built, cfg, saved),
        **graph.settings(),
        precision='fp32' if precision == 'int8' else precision,
        static=static,
        checkpoint_sha256=None if checkpoint is None else fileio.sha256(checkpoint),
        versions=versions(),
    )
    for path in examples:  # an error is better now than after minutes
        prepare(path, meta)
    traced = _trace(graph, static=static, opset=opset)
    sizes = [static] if static else SIZES
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}.') as folder:
        written = Path(folder, out.name)
        if precision == 'int8':
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                source = _write(traced, Path(inner, 'float.onnx'), meta, half=False)
                _check(source, built, pictures, sizes)
                quantize(source, written, meta=meta, pictures=examples, sensitive=graph.final)
        else:
            _write(traced, written, meta, half=precision != 'fp32')
        _check(written, built, pictures, sizes)
        existed = out.exists()
        parts = sorted(Path(folder).iterdir(), key=lambda path: path.name == out.name)
        for path in parts:
            fileio.sync(path)
            os.replace(path, out.with_name(path.name))
        if existed and len(parts) == 1:  # the weights of the file that was replaced
            out.with_name(f'{out.name}.data').unlink(missing_ok=True)
    return out


# --- what is asked for ----------------------------------------------------------------------------


def _check_arguments(
    out: str | Path, *, precision: str, static: tuple[int, int] | None, opset: int, samples: int
) -> Path:
    out = Path(out)
    if out.suffix not in ENDS:
        raise UserError(f'{str(out)!r} must end with one of {", ".join(ENDS)}')
    if out.is_dir() or not out.parent.is_dir():
        what = 'is a folder' if out.is_dir() else 'would be in a folder that does not exist'
        raise UserError(f'{str(out)!r} {what}')
    make_writable(str(out.parent), 'folder')
    if precision not in PRECISIONS:
        raise UserError(f'precision={precision!r} must be one of {", ".join(PRECISIONS)}')
    if precision == 'bf16' and out.suffix != '.xml':
        raise UserError(f'precision={precision!r} is for OpenVINO, so for .xml, not {out.name!r}')
    if samples < 1:
        raise UserError(f'samples={samples} must be at least 1')
    if static is not None and (
        not isinstance(static, Sequence)
        or [isinstance(n, int) and n > 0 for n in static] != [True, True]
    ):
        raise UserError(f'static={static!r} must be a height and a width')
    if opset < OPSET:
        raise UserError(f'opset={opset} must be at least {OPSET}')
    compat.require('onnxscript')
    compat.require('onnxruntime')
    if out.suffix == '.xml':
        compat.require('openvino')
        if precision == 'int8':
            require_nncf()
    return out


def _sample() -> Path:
    cbook = importlib.import_module('matplotlib.cbook')
    return Path(cbook.get_sample_data('grace_hopper.jpg', asfileobj=False))


def _build(model: Any) -> tuple[nn.Module, Any]:
    """The model and its config, None if there is none."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model), None
    if isinstance(model, str | Path):
        if not str(model).endswith('.py'):
            kind, arguments = read_type(str(model))
            if '.' not in kind or os.sep in kind:
                raise UserError(f'{str(model)!r} is neither a config (.py) nor a type with scope')
            return build_type(kind, arguments), None
        model = read_config(str(model))
    if not isinstance(model, Config) or None in (model.get('model'), model.get('default_scope')):
        raise UserError('the model must be a Config with a model and a default_scope')
    cfg = copy.deepcopy(model)
    return build_model(cfg), cfg


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Fills the model; returns the checkpoint's metadata."""
    if sharded.is_sharded(path):
        raise UserError(
            f'{str(path)!r} is the folder of a sharded training: '
            'tools/model_converters/publish_model.py makes a file of its weights'
        )
    if not os.path.isfile(path):
        raise UserError(f'checkpoint {str(path)!r} does not exist')
    checkpoint = fileio.read(path)
    try:
        report = model.load_state_dict(loading.unwrap(checkpoint), strict=False)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        cause = ' '.join(str(error).split())[:500]
        raise UserError(f'checkpoint {str(path)!r} does not fit the model: {cause}') from error
    for what, names in (('lacks', report.missing_keys), ('also has', report.unexpected_keys)):
        if names:
            raise UserError(
                f'checkpoint {str(path)!r} does not fit the model: it {what} {len(names)} '
                f'tensors ({some(names)})'
            )
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return meta if isinstance(meta, dict) else {}


def _folded(model: nn.Module) -> nn.Module:
    """A copy in deploy form, whose tables of positions make the graph smaller."""
    model = copy.deepcopy(model)
    if any(isinstance(module, Deployable) for module in model.modules()):
        switch_to_deploy(model)
    return model


# --- what inference has to know -------------------------------------------------------------------


def _describe(model: nn.Module, cfg: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Classes, normalization and the rule for sizes, for the file's metadata."""
    named = {**find_dataset_meta(cfg), **(saved.get('dataset_meta') or {})}
    named = {key.lower(): value for key, value in named.items()}
    before: Any = getattr(model, 'data_preprocessor', None)
    normalization = dict(_IMAGENET)
    if before is not None:
        normalized = getattr(before, 'mean', None) is not None
        normalization = dict(
            mean=before.mean.flatten().tolist() if normalized else [0.0] * 3,
            std=before.std.flatten().tolist() if normalized else [1.0] * 3,
            bgr_to_rgb=swaps_channels(before),
        )
    divisor = getattr(before, 'pad_size_divisor', None)
    divisor = divisor or (getattr(before, 'test_cfg', None) or {}).get('size_divisor') or 1
    return dict(
        classes=_plain(named.get('classes')),
        palette=_plain(named.get('palette')),
        **normalization,
        pad_size_divisor=divisor,
        resize=_resizing(cfg),
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda x: np.asarray(x).tolist()))


def _resizing(cfg: Any) -> list[dict[str, Any]]:
    """The test pipeline's transforms of the size, as the config has them."""
    kinds = ('Resize', 'ResizeEdge', 'CenterCrop', 'ResizeShortestEdge')
    pipeline = find_test_dataset(cfg).get('pipeline') or []
    return [_plain(dict(step)) for step in pipeline if str(step['type']).split('.')[-1] in kinds]


# --- the file -------------------------------------------------------------------------------------


def _trace(graph: Graph, *, static: tuple[int, int] | None, opset: int) -> Any:
    """The graph as a model of onnx_ir."""
    batched = graph.batched and static is None
    example = torch.rand(2 if batched else 1, 3, *(static or _TRACED))
    axes = {**({0: 'batch'} if batched else {}), 2: 'height', 3: 'width'}
    dynamic = {} if static else dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PyTorch's own code
        program = torch.export.export(
            graph,
            (example,),
            dynamic_shapes=(dynamic,),
            strict=False,
            # PyTorch cannot prove all that holds for sizes, and a graph in ONNX need not.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        done: Any = torch.onnx.export(
            program,
            (example,),
            dynamo=True,
            input_names=['input'],
            output_names=list(graph.output_names),
            dynamic_shapes=None if static else (axes,),
            opset_version=opset,
            optimize=False,
            custom_translation_table=onnx_ops.translations(),
            verbose=False,
        )
    _optimize(done.model)
    return done.model


def _optimize(model: Any) -> None:
    """Folds constants, removes duplicates and names of source files, names nodes by their module.

    The exporter's own optimizer also rewrites patterns, which takes minutes for a large graph and
    which the engines do when they load it.
    """
    passes = importlib.import_module('onnx_ir.passes.common')
    passes.InlinePass()(model)
    importlib.import_module('onnxscript.optimizer').fold_constants(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get('pkg.torch.onnx.name_scopes', '[]'))
        if len(scopes) > 2:
            node.name = f'{scopes[-2]}/{node.name.removeprefix("node_")}'
    passes.ClearMetadataAndDocStringPass()(model)


def _write(model: Any, path: Path, meta: dict[str, Any], half: bool) -> Path:
    """Writes the model; one of more than 2 GiB as ONNX has its weights in another file."""
    onnx_ir = importlib.import_module('onnx_ir')
    openvino = path.suffix == '.xml'
    if half and not openvino:
        _halve_weights(model)
    model.metadata_props[META] = json.dumps(meta)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = f'{path.name}.data' if size > _LARGEST else None
    if not openvino:
        onnx_ir.save(model, path, external_data=data)
        return path
    library = importlib.import_module('openvino')
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder, 'model.onnx')
        onnx_ir.save(model, source, external_data=data)
        converted = library.Core().read_model(source)
        converted.set_rt_info(json.dumps(meta), [META])
        library.save_model(converted, path, compress_to_fp16=half)
        del converted  # it may read from the file
    return path


def _halve_weights(model: Any) -> None:
    """Stores large tensors in half precision, with a cast behind them, as OpenVINO does."""
    ir = importlib.import_module('onnx_ir')
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.size < 64 or abs(array).max() > 65504:
            continue
        tensor = ir.tensor(array.astype(np.float16), name=f'{name}_fp16')
        stored = ir.Value(
            name=tensor.name,
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=tensor,
        )
        cast = ir.node('Cast', [stored], {'to': int(ir.DataType.FLOAT)})
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(stored)
        cast.outputs[0].name = name


# --- the comparison -------------------------------------------------------------------------------


def _check(
    path: Path,
    model: nn.Module,
    pictures: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
) -> None:
    """Prints how far the file is from the model, for any pictures.

    Raises:
        UserError: It is too far.
    """
    if not pictures:
        return
    file = open_file(path)
    precision, wrong = file.meta['precision'], 0
    for picture in pictures:
        for height, width in sizes:
            image = cv2.resize(picture, (width, height))
            batch, _ = normalized(image, dict(file.meta, resize=[], pad_size_divisor=1))
            difference = compare(file.run(batch), model, torch.from_numpy(batch), file.meta)
            print(f'{precision}, {height}x{width}: {difference.text}')
            wrong += not difference.small
    if not wrong:
        return
    share = f'{wrong} of {len(pictures) * len(sizes)} images'
    if precision == 'int8':
        # The float file was equal. How close int8 has to be is the user's choice.
        print(
            f'warning: int8 is far from PyTorch in {share}; measure it with tools/test.py, and try '
            'other pictures for the calibration'
        )
        return
    raise UserError(
        f'the file differs from PyTorch in {share}, see above; it was not kept (--no-check keeps '
        'it)'
    )
