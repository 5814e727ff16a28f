"""Runs into tables. No framework is needed."""

from .compare import Comparison as Comparison
from .compare import compare as compare
from .quantiles import SiteQuantiles as SiteQuantiles
from .quantiles import quantiles as quantiles
