"""The backbones outside OpenMMLab: one module for each other library, imported by who uses it."""
