"""What the chain rule says, on paper: symbols, and the proof by numbers that they are right.

SymPy, networkx and PyTorch are imported when something first needs them.
"""

from .blocks import Blocks as Blocks
from .blocks import from_model as from_model
from .chain import Derivative as Derivative
from .direction import Directional as Directional
from .direction import directional as directional
from .network import Network as Network
