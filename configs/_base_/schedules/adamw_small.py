# For small backbones from a random start. The config of the data adds length and learning rates; no
# weight decay on vectors.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# A training that was interrupted, or killed, is resumed exactly.
runner_type = 'hat_mm.ExactResumeRunner'
custom_hooks = [dict(type='hat_mm.NonFiniteLossHook')]
randomness = dict(seed=0)
