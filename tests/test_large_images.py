"""Large images: mmseg's sliding window, and the code of docs/large_images.md on a small picture."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from hat_mm.engine import cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs/large_images.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
UPERNET = ROOT / 'configs/fastervit/fastervit-0_upernet_8xb2-160k_ade20k-512x512.py'
TOY = ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
TINY = dict(
    embed_dims=16, stem_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), window_size=2,
    carriers=(2,),
)  # fmt: skip
SMALL = {
    'model.backbone': dict(_delete_=True, type='hat_mm.FasterViT', arch=TINY),
    'model.decode_head.in_channels': [16, 32, 64, 128],
    'model.decode_head.channels': 8,
    'model.auxiliary_head': None,
}


# --- segmentation --------------------------------------------------------------------------------


def block(words: str) -> str:
    """The page's block of Python that contains ``words``."""
    (found,) = (code for code in BLOCKS if words in code)
    return found


@pytest.fixture(scope='module')
def segmentor():
    """The page's segmentor, made small, and how it is asked."""
    text = block('inference_model').replace('512, 512', '64, 64').replace('341, 341', '43, 43')
    assert '64, 64' in text
    assert '43, 43' in text
    build, ask = text.split('checkpoint = ')
    space = {}
    exec(build.replace("'configs/", f"'{ROOT}/configs/"), space)
    space['cfg'].merge_from_dict(SMALL)
    torch.manual_seed(0)
    exec('checkpoint = None\n' + ask.split('\n', 1)[1].split('result =')[0], space)
    return space


def predict(space, mode, image):
    """Class map, scores and the sizes of all inputs of the backbone."""
    model, sizes = space['model'], []
    hook = model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[-2:]))
    model.test_cfg.mode = mode
    result = space['inference_model'](model, image)
    hook.remove()
    return result.pred_sem_seg.data, result.seg_logits.data, [tuple(size) for size in sizes]


def test_slide_covers_the_picture_with_crops(segmentor):
    image = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    labels, scores, sizes = predict(segmentor, 'slide', image)
    assert labels.shape == (1, 96, 150)
    assert torch.isfinite(scores).all()
    assert sizes == [(64, 64)] * 6
    _, whole, sizes = predict(segmentor, 'whole', image)
    assert sizes == [(96, 150)]  # not resized to the test scale
    assert not torch.allclose(whole, scores, rtol=1e-3, atol=1e-3)


def test_slide_of_a_picture_within_the_crop_is_whole(segmentor):
    image = np.random.default_rng(1).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    _, slide, sizes = predict(segmentor, 'slide', image)
    assert sizes == [(50, 61)]
    torch.testing.assert_close(slide, predict(segmentor, 'whole', image)[1])


def test_slide_through_the_test_tool(tmp_path):
    """With the options of the page's command, crops and the picture made small."""
    (command,) = re.findall(r'^python (tools/test.py .*mode=slide.*)$', PAGE, re.MULTILINE)
    options = command.split('--cfg-options ')[1].split()
    options = [o.replace('=512,512', '=64,64').replace('=341,341', '=43,43') for o in options]
    options = [o.replace('.scale=4000', '.scale=150') for o in options]
    assert set(options) == {
        'model.test_cfg.mode=slide',
        'model.test_cfg.crop_size=64,64',
        'model.test_cfg.stride=43,43',
        'test_dataloader.dataset.pipeline.1.scale=150',
    }
    rng = np.random.default_rng(0)
    for folder, suffix, shape in (
        ('images', 'jpg', (96, 150, 3)),
        ('annotations', 'png', (96, 150)),
    ):
        (tmp_path / folder / 'validation').mkdir(parents=True)
        picture = rng.integers(0, 151, shape, dtype=np.uint8)
        cv2.imwrite(str(tmp_path / folder / f'validation/0.{suffix}'), picture)
    cfg = Config.fromfile(str(UPERNET))
    cfg.merge_from_dict(SMALL)
    cfg.merge_from_dict(
        {
            'test_dataloader.dataset.data_root': str(tmp_path),
            'test_dataloader.num_workers': 0,
            'test_dataloader.persistent_workers': False,
        }
    )
    cfg.dump(tmp_path / 'small.py')
    from mmseg.registry import MODELS as SEGMENTORS
    from mmseg.utils import register_all_modules as register_mmseg

    register_mmseg()
    torch.save({'state_dict': SEGMENTORS.build(cfg.model).state_dict()}, tmp_path / 'start.pth')
    sizes = []
    from hat_mm import FasterViT

    forward = FasterViT.forward

    def watched(self, x):
        sizes.append(tuple(x.shape[-2:]))
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FasterViT, 'forward', watched)
        metrics = cli.test(
            [str(tmp_path / 'small.py'), str(tmp_path / 'start.pth'), '--work-dir', str(tmp_path),
             '--out', str(tmp_path / 'maps'), '--cfg-options', *options]
        )  # fmt: skip
    assert 'mIoU' in metrics
    assert sizes == [(64, 64)] * 6
    assert cv2.imread(str(tmp_path / 'maps/0.png'), cv2.IMREAD_UNCHANGED).shape == (96, 150)


# --- detection -----------------------------------------------------------------------------------


def test_tiles_through_sahi(tmp_path, monkeypatch):
    """The page's blocks on a picture of 2 × 2 tiles, with an untrained detector."""
    pytest.importorskip('sahi', reason='tiled detection needs sahi: pip install sahi')
    register_all_modules()
    torch.manual_seed(0)
    cfg = Config.fromfile(str(TOY))
    cfg.model.test_cfg.rpn.min_bbox_size = 16
    cfg.model.test_cfg.rcnn.max_per_img = 20
    cfg.dump(tmp_path / 'toy.py')
    model = MODELS.build(cfg.model)
    model.init_weights()
    # Masks that fill their boxes: SAHI refuses those without area.
    torch.nn.init.constant_(model.roi_head.mask_head.conv_logits.bias, 10.0)
    meta = {'dataset_meta': dict(cfg.metainfo)}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, tmp_path / 'start.pth')
    monkeypatch.chdir(tmp_path)

    space = {}
    exec(block('draw_scene').replace('4000, 3000', '800, 768'), space)
    assert cv2.imread('large.png').shape == (768, 800, 3)
    assert len(space['boxes']) >= 4  # a scene in each of the 2 × 2 cells

    code = re.sub(r"'configs/[^']*'", "'toy.py'", block('get_sliced_prediction'))
    code = re.sub(r"'work_dirs/[^']*'", "'start.pth'", code)
    # Untrained, it is sure of nothing; below 0.1 SAHI would not merge by default.
    code, changed = re.subn(r'confidence_threshold=0\.\d', 'confidence_threshold=0.1', code)
    assert changed == 1
    exec(code, space)
    found = space['result'].object_prediction_list
    assert found
    corners = np.array([o.bbox.to_xyxy() for o in found])
    assert (corners >= 0).all()
    assert (corners[:, 2] <= 800).all()
    assert (corners[:, 3] <= 768).all()
    assert (corners[:, 2] > 512).any()  # beyond the first tile
    assert all(o.mask.bool_mask.shape == (768, 800) for o in found)
    assert {o.category.name for o in found} <= {'circle', 'square', 'triangle'}

    exec(block('bbox_overlaps'), space)
