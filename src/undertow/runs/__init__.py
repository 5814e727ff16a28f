"""Everything on the disk: a run's format, its reader, and tables made of runs. Needs no framework."""

from .check import Check as Check
from .check import Fault as Fault
from .compare import Comparison as Comparison
from .compare import Comparisons as Comparisons
from .compare import SameClass as SameClass
from .compare import compare as compare
from .compare import same_class as same_class
from .quantiles import Quantiles as Quantiles
from .quantiles import SiteQuantiles as SiteQuantiles
from .quantiles import quantiles as quantiles
from .reader import Run as Run
