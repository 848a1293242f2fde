"""The programs of ``tools/`` as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


def tool(name: str) -> ModuleType:
    """The module ``tools/NAME.py``; ``tools/test.py`` on the path would hide Python's own."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
