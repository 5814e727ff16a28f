"""Shows what flows backward through a neural network.

>>> import undertow as ut
>>> ut.__version__
'0.1.0'
"""

from . import derive as derive
from . import images as images
from . import lrp as lrp
from . import rules as rules
from . import show as show
from . import targets as targets
from .attribution import Attribution as Attribution
from .attribution import explain as explain
from .diagnosis import Finding as Finding
from .diagnosis import diagnose as diagnose
from .errors import FindingError as FindingError
from .errors import FrameworkError as FrameworkError
from .errors import InputError as InputError
from .errors import ModelError as ModelError
from .errors import PhotographError as PhotographError
from .errors import RuleError as RuleError
from .errors import RunError as RunError
from .errors import TargetError as TargetError
from .errors import UndertowError as UndertowError
from .errors import UndertowWarning as UndertowWarning
from .models import load as load
from .page import Text as Text
from .page import report as report
from .recording import Recording as Recording
from .recording import Schedule as Schedule
from .recording import Trace as Trace
from .recording import record as record
from .recording import redirect as redirect
from .recording import trace as trace
from .runs import Run as Run
from .runs import compare as compare
from .sites import Site as Site
from .sites import select as select
from .tables import Rule as Rule
from .verdict import Verdict as Verdict
from .verdict import trust as trust

__version__ = "0.1.0"
