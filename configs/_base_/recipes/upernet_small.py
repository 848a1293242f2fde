# mmseg's UPerNet made small, to learn on a CPU from a random start: a leaf adds the backbone, the
# heads' inputs, the data and the length.
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../schedules/adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
]
width = 32
norm_cfg = dict(type='BN')
head = dict(channels=width, norm_cfg=norm_cfg)
model = dict(pretrained=None, backbone=dict(_delete_=True), decode_head=head, auxiliary_head=head)
optim_wrapper = dict(
    optimizer=dict(lr=4e-4, weight_decay=0.05), clip_grad=dict(_delete_=True, max_norm=10.0)
)
auto_scale_lr = dict(base_batch_size=4)
# A training that was interrupted, or killed, is resumed exactly.
runner_type = 'hat_mm.ExactResumeRunner'
custom_hooks = [dict(type='hat_mm.NonFiniteLossHook')]
randomness = dict(seed=0)
