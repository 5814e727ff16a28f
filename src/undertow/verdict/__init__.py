"""Does a map deserve belief? Six questions, each in a file of its own, and a sentence."""

from .evaluation import Cost as Cost
from .result import Answer as Answer
from .result import Verdict as Verdict
from .trust import trust as trust
