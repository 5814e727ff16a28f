"""What gradients do inside a network: sites x measures x schedule -> a run; and one pass looked into, or changed."""

from .record import Recording as Recording
from .record import record as record
from .redirect import redirect as redirect
from .schedule import Schedule as Schedule
from .trace import Trace as Trace
from .trace import trace as trace
