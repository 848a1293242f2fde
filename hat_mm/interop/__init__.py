"""The backbones outside OpenMMLab: one module per library; only its users import it."""
