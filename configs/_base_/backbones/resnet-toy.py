# mmdet's ResNet-50 with a quarter of the channels, without weights to start from.
backbone = dict(
    type='mmdet.ResNet',
    depth=50,
    base_channels=16,
    frozen_stages=-1,
    norm_eval=False,
    # Plugins work on the residual branches, which would all be zero at the start.
    zero_init_residual=False,
    style='pytorch',
    init_cfg=None,
)
channels = [64, 128, 256, 512]
