"""Shows what flows backward through a neural network.

>>> import undertow as ut
>>> ut.__version__
'0.1.0'
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import derive as derive
    from . import images as images
    from . import lrp as lrp
    from . import rules as rules
    from . import show as show
    from . import sweep as sweep
    from . import targets as targets
    from .attribution import Attribution as Attribution
    from .attribution import ExplainedText as ExplainedText
    from .attribution import explain_text as explain_text
    from .attribution import prepare as prepare
    from .attribution.explain import explain as explain
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
    from .sweep import Sweep as Sweep
    from .tables import Rule as Rule
    from .text_model import TextModel as TextModel
    from .trackers.export import export as export
    from .verdict import Verdict as Verdict
    from .verdict.trust import trust as trust

__version__ = "0.1.0"

_PUBLIC = {
    "attribution": "Attribution ExplainedText explain explain_text prepare",
    "diagnosis": "Finding diagnose",
    "errors": "FindingError FrameworkError InputError ModelError PhotographError RuleError RunError TargetError "
    "UndertowError UndertowWarning",
    "models": "load",
    "page": "Text report",
    "recording": "Recording Schedule Trace record redirect trace",
    "runs": "Run compare",
    "sites": "Site select",
    "sweep": "Sweep",
    "tables": "Rule",
    "text_model": "TextModel",
    "trackers.export": "export",
    "verdict": "Verdict trust",
}
"""Where the public names are. They are imported when first asked for: all of them take longer than `--help` may."""

_PLACES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted([*_PLACES, "derive", "images", "lrp", "rules", "show", "sweep", "targets"])


def _find(name: str) -> Any:
    """Import a public name, or a file or folder of the package, when it is first asked for."""
    if name in _PLACES:
        globals()[name] = getattr(import_module(f".{_PLACES[name]}", __name__), name)
        return globals()[name]
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:
    __getattr__ = _find


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
