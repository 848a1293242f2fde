# What Swin's trainings leave without weight decay, beside vectors: tables of relative positions.
undecayed = {'relative_position_bias_table': dict(decay_mult=0.0)}
