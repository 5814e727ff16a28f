"""Shows what flows backward through a neural network.

>>> import undertow as ut
>>> ut.__version__
'0.1.0'
"""

from . import rules as rules
from .attribution import Attribution as Attribution
from .attribution import explain as explain
from .errors import FrameworkError as FrameworkError
from .errors import InputError as InputError
from .errors import ModelError as ModelError
from .errors import PhotographError as PhotographError
from .errors import RuleError as RuleError
from .errors import TargetError as TargetError
from .errors import UndertowError as UndertowError

__version__ = "0.1.0"
