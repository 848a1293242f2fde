"""Measures time and memory of backbones and attention: ``python tools/analysis_tools/benchmark``.

A package with this file is found before the ``benchmark`` module of ``onnxruntime.transformers``,
which puts its own folder on the path.
"""
