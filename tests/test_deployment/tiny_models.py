"""Configs of tiny models of each kind that can be exported, on a backbone of two convolutions."""

from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

MEAN = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])


@MODELS.register_module()
class TwoConvs(nn.Module):
    """Maps of strides 4 and 8."""

    out_indices = (0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(x).relu()
        return x, self.conv2(x).relu()


BACKBONE = dict(type='mmengine.TwoConvs')
DETECTOR = dict(
    data_preprocessor=dict(
        type='DetDataPreprocessor', **MEAN, bgr_to_rgb=True, pad_size_divisor=32
    ),
    backbone=BACKBONE,
    neck=dict(type='FPN', in_channels=[16, 32], out_channels=16, num_outs=2),
)
ANCHORS = dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0], strides=[4, 8])
CODER = dict(type='DeltaXYWHBBoxCoder', target_stds=(0.1, 0.1, 0.2, 0.2))
ROI = dict(type='SingleRoIExtractor', out_channels=16, featmap_strides=[4, 8], finest_scale=20)


def _roi(size: int) -> dict:
    return dict(ROI, roi_layer=dict(type='RoIAlign', output_size=size, sampling_ratio=0))


def _box_head(agnostic: bool) -> dict:
    return dict(
        type='Shared2FCBBoxHead',
        in_channels=16,
        fc_out_channels=16,
        roi_feat_size=7,
        num_classes=3,
        bbox_coder=CODER,
        reg_class_agnostic=agnostic,
        loss_cls=dict(type='CrossEntropyLoss'),
    )


def _rcnn(**roi_head: Any) -> dict:
    return dict(
        DETECTOR,
        type='FasterRCNN',
        train_cfg=None,
        rpn_head=dict(
            type='RPNHead',
            in_channels=16,
            feat_channels=16,
            anchor_generator=ANCHORS,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        ),
        roi_head=dict(bbox_roi_extractor=_roi(7), **roi_head),
        test_cfg=dict(
            rpn=dict(
                nms_pre=200,
                max_per_img=100,
                nms=dict(type='nms', iou_threshold=0.7),
                min_bbox_size=0,
            ),
            rcnn=dict(
                score_thr=0.2,
                nms=dict(type='nms', iou_threshold=0.5),
                max_per_img=50,
                mask_thr_binary=0.5,
            ),
        ),
    )


def mask_rcnn() -> dict:
    return _rcnn(
        type='StandardRoIHead',
        bbox_head=_box_head(False),
        mask_roi_extractor=_roi(14),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=16,
            conv_out_channels=16,
            num_classes=3,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        ),
    )


def cascade_rcnn() -> dict:
    return _rcnn(
        type='CascadeRoIHead',
        num_stages=2,
        stage_loss_weights=[1, 0.5],
        bbox_head=[_box_head(True), _box_head(True)],
    )


def retinanet() -> dict:
    return dict(
        DETECTOR,
        type='RetinaNet',
        bbox_head=dict(
            type='RetinaHead',
            num_classes=3,
            in_channels=16,
            stacked_convs=1,
            feat_channels=16,
            anchor_generator=ANCHORS,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        ),
        test_cfg=dict(
            nms_pre=100, score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50
        ),
    )


def dino() -> dict:
    attention = dict(embed_dims=256, num_levels=2, num_heads=2, num_points=2)
    ffn = dict(embed_dims=256, feedforward_channels=32)
    return dict(
        DETECTOR,
        type='DINO',
        # DINO ignores padding; a file is given the image without any.
        data_preprocessor=dict(DETECTOR['data_preprocessor'], pad_size_divisor=1),
        num_queries=40,
        num_feature_levels=2,
        with_box_refine=True,
        as_two_stage=True,
        neck=dict(
            type='ChannelMapper',
            in_channels=[16, 32],
            out_channels=256,
            kernel_size=1,
            act_cfg=None,
            norm_cfg=dict(type='GN', num_groups=4),
            num_outs=2,
        ),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
        decoder=dict(
            num_layers=1,
            return_intermediate=True,
            post_norm_cfg=None,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=256, num_heads=2),
                cross_attn_cfg=attention,
                ffn_cfg=ffn,
            ),
        ),
        positional_encoding=dict(num_feats=128, normalize=True),
        bbox_head=dict(
            type='DINOHead',
            num_classes=3,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            sync_cls_avg_factor=True,
        ),
        dn_cfg=dict(group_cfg=dict(num_dn_queries=10)),
        test_cfg=dict(max_per_img=20),
    )


def _segmentor(head: dict) -> dict:
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', **MEAN, bgr_to_rgb=True, size_divisor=None, size=(64, 64)
        ),
        backbone=BACKBONE,
        decode_head=dict(
            head, channels=16, num_classes=5, in_index=(0, 1), norm_cfg=dict(type='BN')
        ),
        test_cfg=dict(mode='whole'),
    )


def upernet() -> dict:
    return _segmentor(dict(type='UPerHead', in_channels=[16, 32], pool_scales=(1, 2, 3, 6)))


def semantic_fpn() -> dict:
    config = _segmentor(dict(type='FPNHead', in_channels=[16, 16], feature_strides=[4, 8]))
    return dict(config, neck=DETECTOR['neck'])


def classifier() -> dict:
    arch = dict(
        embed_dims=4, stem_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4
    )
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(type='ClsDataPreprocessor', **MEAN, to_rgb=True),
        backbone=dict(type='hat_mm.FasterViT', arch=arch, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', in_channels=32, num_classes=7),
    )


KINDS = {
    'mask_rcnn': ('mmdet', mask_rcnn),
    'retinanet': ('mmdet', retinanet),
    'dino': ('mmdet', dino),
    'upernet': ('mmseg', upernet),
    'semantic_fpn': ('mmseg', semantic_fpn),
    'classifier': ('mmpretrain', classifier),
    'cascade_rcnn': ('mmdet', cascade_rcnn),
}


def config(kind: str) -> Config:
    scope, model = KINDS[kind]
    return Config(dict(default_scope=scope, model=model()))


def spread(model: nn.Module) -> nn.Module:
    """Gives untrained weights the spread that makes classes and boxes differ."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith('backbone'):
            nn.init.normal_(parameter, std=1 / parameter[0].numel() ** 0.5)
    return model.eval()
