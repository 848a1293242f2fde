"""Ships the configs and tools of the repository in the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Copy what MIM looks for under `hat_mm/.mim` into the wheel, never into the source tree."""

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has the originals
            return
        root = Path(__file__).resolve().parent
        target = Path(self.build_lib, 'hat_mm', '.mim')
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for source in (root / name for name in SHIPPED):
            if source.is_dir():
                ignored = shutil.ignore_patterns('__pycache__', '*.pyc')
                shutil.copytree(source, target / source.name, ignore=ignored)
            elif source.exists():
                shutil.copy2(source, target)


setup(cmdclass={'build_py': BuildWithMim})
