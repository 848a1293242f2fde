# What the toy R-CNNs share: data, schedule, and small parts for mmdet's models, which learn the
# shapes on a CPU within minutes.
_base_ = [
    '../datasets/shapes_instance.py',
    '../schedules/adamw_shapes.py',
    'mmdet::_base_/default_runtime.py',
]
num_classes = len(_base_.metainfo.classes)
width = 64
norm_cfg = dict(type='BN')
neck = dict(out_channels=width, norm_cfg=norm_cfg, num_outs=4)
rpn_head = dict(
    in_channels=width,
    feat_channels=width,
    anchor_generator=dict(strides=[4, 8, 16, 32]),
)
# One sample a bin: mmcv's RoIAlign would otherwise take a third of the time on a CPU.
roi_extractor = dict(out_channels=width, finest_scale=28, roi_layer=dict(sampling_ratio=1))
bbox_head = dict(
    in_channels=width,
    fc_out_channels=256,
    num_classes=num_classes,
    reg_class_agnostic=True,
)
mask_head = dict(
    num_convs=2,
    in_channels=width,
    conv_out_channels=width,
    num_classes=num_classes,
    class_agnostic=True,
    norm_cfg=norm_cfg,
)
proposals = dict(nms_pre=300, max_per_img=100)
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=16),
    checkpoint=dict(interval=1, max_keep_ckpts=2),
    visualization=dict(score_thr=0.5),
)
randomness = dict(seed=0)
