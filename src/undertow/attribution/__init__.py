"""Which parts of an input spoke for a score: rule x target -> attribution."""

from .explain import explain as explain
from .preparing import Prepared as Prepared
from .preparing import prepare as prepare
from .result import Attribution as Attribution
from .text import ExplainedText as ExplainedText
from .text import explain_text as explain_text
