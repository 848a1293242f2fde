"""Long trainings on images of any size: memory stays level, losses finite."""

import random

import numpy as np
import pytest
import torch
from measuring import resident, return_free_memory
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData

from hat_mm.engine.build import build_model

CONFIG = 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
STEPS = 2000


def draw_sizes(dice):
    """Up to three sizes from 1×1 to 1500×40, or turned; small sides as often as large ones."""
    sizes = [
        (round(1500 ** dice.random()), round(40 ** dice.random()))
        for _ in range(dice.randint(1, 3))
    ]
    # All are turned or none, because a batch is padded to the largest sides.
    return sizes if dice.random() < 0.5 else [size[::-1] for size in sizes]


def draw_sample(dice, height, width):
    """Annotations: up to two boxes with filled masks."""
    boxes, masks = [], []
    for _ in range(dice.randrange(3)):
        top, left = dice.randrange(height), dice.randrange(width)
        bottom, right = dice.randint(top + 1, height), dice.randint(left + 1, width)
        boxes.append([left, top, right, bottom])
        masks.append(np.zeros((height, width), np.uint8))
        masks[-1][top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=dict(img_shape=(height, width)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([dice.randrange(3) for _ in boxes], dtype=torch.int64),
        masks=BitmapMasks(masks, height, width),
    )
    return sample


@pytest.mark.slow
def test_memory_stays_level_and_losses_finite():
    cfg = Config.fromfile(CONFIG)
    # A batch norm cannot train on a single value, which is what is left of a tiny image.
    norm = dict(type='GN', num_groups=8)
    cfg.merge_from_dict(
        {
            'model.backbone.norm_eval': True,
            'model.backbone.arch.drop_path_rate': 0.2,
            'model.neck.norm_cfg': norm,
            'model.roi_head.mask_head.norm_cfg': norm,
        }
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dice = random.Random(0)
    extract_feat = model.extract_feat

    def in_turns(images):
        # mmcv's operators have no half precision on the CPU, so the heads stay in float32.
        with torch.autocast('cpu', torch.bfloat16, enabled=step % 2 == 1):
            maps = extract_feat(images)
        assert all(torch.isfinite(x).all() for x in maps), sizes
        return tuple(x.float() for x in maps)

    model.extract_feat = in_turns
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory = []
    for step in range(STEPS):
        sizes = draw_sizes(dice)
        images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
        samples = [draw_sample(dice, *size) for size in sizes]
        data = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        assert torch.isfinite(loss), (step, sizes)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        assert torch.isfinite(norm), (step, sizes)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            return_free_memory()  # what the heap keeps depends on the order of sizes
            memory.append(resident('VmRSS') / 2**20)
            print(f'{step + 1} steps, {memory[-1]:.0f} MiB', flush=True)
    torch.set_num_threads(threads)
    half = memory[len(memory) // 2 :]
    slope = 50 * np.polyfit(range(len(half)), half, 1)[0]
    print(f'slope of the second half: {slope:+.1f} MiB in 1000 steps')
    assert slope < 20
