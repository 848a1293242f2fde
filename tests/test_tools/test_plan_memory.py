"""The plan of memory: fake tensors count what real ones keep."""

import argparse
import json

import hypothesis
import plan_memory
import pytest
from hypothesis import strategies as st
from mmengine.config import ConfigDict

from hat_mm.engine.cli import UserError

TINY = ConfigDict(
    type='hat_mm.FasterViT',
    arch=dict(
        embed_dims=8, stem_dims=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4), window_size=4
    ),
)


@pytest.mark.parametrize('with_cp', [False, True])
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(height=st.integers(32, 90), width=st.integers(32, 90))
def test_fake_tensors_count_what_real_ones_keep(with_cp, height, width):
    shape = (2, 3, height, width)
    fake = plan_memory.count_backbone(TINY, shape, with_cp)
    assert fake == plan_memory.count_backbone(TINY, shape, with_cp, fake=False)
    assert fake[0] > fake[1] >= 0


def test_checkpointing_keeps_less():
    plain, with_cp = (plan_memory.count_backbone(TINY, (1, 3, 64, 64), cp)[0] for cp in (0, 1))
    assert with_cp < plain / 2


def test_plan():
    found = dict(
        parameters=4e9, largest_unit=1e8, outside_units=2e8,
        activations=1e10, largest_block=1e9, activations_with_cp=2e9, rest=5e8,
    )  # fmt: skip
    args = argparse.Namespace(batch=2, processes=8, spare=2)
    row = plan_memory.plan(found, args)
    assert row['states, DDP'] == '20.0'
    assert row['states, FSDP2'] == '2.8'  # 2 + 2 x 0.2 + 4 x 0.1
    assert row['activations'] == '21.0'
    assert row['with_cp'] == '7.0'
    assert row['DDP'] == '41.0, fits 80'
    assert row['FSDP2, with_cp'] == '9.8, fits 24'
    assert plan_memory.plan(found | dict(rest=4e10), args)['DDP'] == '120.0, too large'


@pytest.mark.slow
def test_a_detector(tmp_path, capsys):
    config = 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'
    arguments = [config, '--size', '100', '130', '--out', str(tmp_path / 'plan.json')]
    plan_memory.main(arguments)
    table = capsys.readouterr().out
    assert 'mask-rcnn_fastervit-tiny_fpn_shapes 100x130' in table
    [found] = json.loads((tmp_path / 'plan.json').read_text()).values()
    assert found['size'] == [128, 160]
    assert found['rest'] > found['activations']
    plan_memory.main(arguments)  # from the file
    assert capsys.readouterr().out == table


def test_other_backbones_are_refused(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']\n")
    with pytest.raises(UserError, match='none of FasterViT'):
        plan_memory.measure(str(path), (64, 64))
