"""Recording a network in JAX: its modules and places, and a probe that is given what a pass has shown of them."""

from .objective import objective as objective
from .parameters import named_parameters as named_parameters
from .parameters import new_parameter_probe as new_parameter_probe
from .parameters import optimizer_groups as optimizer_groups
from .parameters import optimizers_of as optimizers_of
from .probe import layouts as layouts
from .probe import new_probe as new_probe
from .probe import world as world
from .sites import identity as identity
from .sites import named_modules as named_modules
from .sites import visits as visits
