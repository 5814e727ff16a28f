"""Symbolic derivatives by the chain rule and of matrix expressions, checked numerically against autograd.

SymPy, networkx and PyTorch are imported on first use.
"""

from .blocks import Blocks as Blocks
from .blocks import from_model as from_model
from .chain import Derivative as Derivative
from .direction import Directional as Directional
from .direction import directional as directional
from .network import Network as Network
