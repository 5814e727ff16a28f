"""Which parts of an input spoke for a score: rule x target -> attribution."""

from .explain import explain as explain
from .preparing import Prepared as Prepared
from .preparing import prepare as prepare
from .result import Attribution as Attribution
