# mmdet's RetinaNet made small, to learn small objects on a CPU from a random start: a leaf adds the
# backbone, the neck's inputs, the data and the length.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../schedules/adamw_small.py',
    'mmdet::_base_/default_runtime.py',
]
width = 64
model = dict(
    backbone=dict(_delete_=True),
    # From stride 4 on, because the objects are small.
    neck=dict(
        out_channels=width,
        start_level=0,
        add_extra_convs=False,
        num_outs=4,
        norm_cfg=dict(type='BN'),
    ),
    bbox_head=dict(
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        # The levels share the head but not its statistics, so no BN.
        norm_cfg=dict(type='GN', num_groups=8),
        anchor_generator=dict(ratios=[1.0], strides=[4, 8, 16, 32]),
        # Boxes are learned by their overlap: single coordinates stay loose.
        reg_decoded_bbox=True,
        loss_bbox=dict(_delete_=True, type='GIoULoss', loss_weight=2.0),
    ),
)
