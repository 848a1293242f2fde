# mmseg's UPerNet made small, to learn the toy label maps on a CPU within minutes: a leaf adds the
# backbone and the heads' inputs.
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    '../datasets/shapes_semantic.py',
    '../schedules/adamw_shapes.py',
    'mmseg::_base_/default_runtime.py',
]
num_classes = len(_base_.metainfo.classes)
width = 32
norm_cfg = dict(type='BN')
# Nine pixels of ten are background, and would drown what tells the shapes apart.
loss_decode = dict(class_weight=[0.2, 1.0, 1.0, 1.0])
# Padding counts as background: mmseg's loss cannot weight classes where pixels are to be ignored.
data_preprocessor = dict(size=_base_.crop_size, seg_pad_val=0)
model = dict(
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(_delete_=True),
    decode_head=dict(
        channels=width, num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=loss_decode
    ),
    auxiliary_head=dict(
        channels=width, num_classes=num_classes, norm_cfg=norm_cfg, loss_decode=loss_decode
    ),
)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
log_processor = dict(by_epoch=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=16, log_metric_by_epoch=True),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook', interval=1),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
randomness = dict(seed=0)
