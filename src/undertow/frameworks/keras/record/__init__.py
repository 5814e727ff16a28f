"""Recording a Keras network that runs eagerly: its layers, and a probe that reads them for one batch."""

from ..layers import identity as identity
from ..layers import named_modules as named_modules
from .objective import objective as objective
from .parameters import named_parameters as named_parameters
from .parameters import new_parameter_probe as new_parameter_probe
from .parameters import optimizer_groups as optimizer_groups
from .parameters import optimizers_of as optimizers_of
from .probe import layouts as layouts
from .probe import new_probe as new_probe
from .probe import visits as visits
from .probe import world as world
