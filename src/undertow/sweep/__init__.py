"""One task over a data set, in shards, on one machine or many; resumable at any moment."""

from .reader import Sweep as Sweep
from .reader import SweepCheck as SweepCheck
from .reader import SweepStatus as SweepStatus
from .sweep import explain as explain
from .sweep import record as record
from .sweep import trust as trust
