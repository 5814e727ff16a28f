"""Recording a PyTorch network: its modules, and a probe that reads them for one batch."""

from .objective import objective as objective
from .probe import new_probe as new_probe
from .sites import identity as identity
from .sites import named_modules as named_modules
from .sites import visits as visits
from .sites import world as world
