# Shards what is trained over all processes: add this file to the `_base_` of any config.
runner_type = 'hat_mm.FSDP2Runner'
fsdp2 = dict(
    min_params=1_000_000,  # of a block that is gathered on its own
    mixed_precision=dict(),  # or dict(param_dtype='bfloat16', reduce_dtype='float32')
    checkpoints='full',  # or 'sharded'
)
