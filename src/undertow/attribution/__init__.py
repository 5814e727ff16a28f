"""Which parts of an input spoke for a score: rule x target -> attribution."""

from .explain import explain as explain
from .result import Attribution as Attribution
