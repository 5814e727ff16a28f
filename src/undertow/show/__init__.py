"""Pictures and tables from arrays. Nothing here sees a model."""

from .maps import draw as draw
