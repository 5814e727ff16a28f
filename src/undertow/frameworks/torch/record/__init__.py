"""Recording a PyTorch network: its modules, and a probe that reads them for one batch."""

from .objective import objective as objective
from .parameters import named_parameters as named_parameters
from .parameters import new_parameter_probe as new_parameter_probe
from .parameters import optimizer_groups as optimizer_groups
from .parameters import optimizers_of as optimizers_of
from .probe import new_probe as new_probe
from .sites import identity as identity
from .sites import layouts as layouts
from .sites import named_modules as named_modules
from .sites import visits as visits
from .sites import world as world
