# mmdet's Faster R-CNN made small, to learn on a CPU within minutes to find small shapes and what a
# far marker makes of them: a leaf adds the backbone and the neck's inputs.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../datasets/shapes_relation.py',
    '../schedules/adamw_relation.py',
    'mmdet::_base_/default_runtime.py',
]
width = 64
proposals = dict(nms_pre=200, max_per_img=50)
model = dict(
    backbone=dict(_delete_=True),
    neck=dict(out_channels=width, norm_cfg=dict(type='BN'), num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        # Squares, as the boxes of the objects are, from 16 pixels a side, as small as they are.
        anchor_generator=dict(scales=[4], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        # One sample a bin: mmcv's RoIAlign would otherwise take a third of the time on a CPU.
        bbox_roi_extractor=dict(
            out_channels=width, finest_scale=28, roi_layer=dict(sampling_ratio=1)
        ),
        bbox_head=dict(
            in_channels=width,
            fc_out_channels=256,
            num_classes=len(_base_.metainfo.classes),
            reg_class_agnostic=True,
        ),
    ),
    # Half of the boxes are objects: background says nothing of the relation, and with the usual
    # quarter of many boxes it is not learned in the time.
    train_cfg=dict(rpn_proposal=proposals, rcnn=dict(sampler=dict(num=12, pos_fraction=0.5))),
    test_cfg=dict(rpn=proposals),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=_base_.max_iters, max_keep_ckpts=1),
    visualization=dict(score_thr=0.5),
)
randomness = dict(seed=0)
