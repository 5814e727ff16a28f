"""Lets transformers import torchvision in tests and in examples of docstrings, also beside a CPU-only torch."""

import importlib.util
from pathlib import Path

from undertow.frameworks.torch.zoo.importing import declare_operators

spec = importlib.util.find_spec("torchvision")
if spec is not None and spec.origin is not None:
    declare_operators(Path(spec.origin).parent)
