"""Classifiers of torchvision and timm, the packaged one, and a person's own."""

from .catalogue import names as names
from .catalogue import rows as rows
from .classifiers import from_object as from_object
from .classifiers import load as load
from .classifiers import seeded as seeded
