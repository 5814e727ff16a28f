"""Which axis of a module's output holds the samples and which the channels: from its class, its weights, or the user.

Not every tensor starts with its samples: recurrent and attention modules of torch have time first unless they are told
otherwise. What the modules do not settle is left open, so that no row bears another sample's name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..internals import CONVOLUTION, NORM, in_memory
from ..submodules import is_keras

Shape = Sequence[int]
_LAST = (nn.Linear, nn.Bilinear, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
_SECOND = (NORM, nn.GroupNorm, nn.LocalResponseNorm)
_SPATIAL = {
    getattr(nn, f"{name}{n}d"): n
    for n in (1, 2, 3)
    for name in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "LPPool", "InstanceNorm", "MaxUnpool")
}
_ATTENTION = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_REMEMBERED = 10_000
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


@dataclass(frozen=True)
class Axes:
    """The axes of one tensor.

    Attributes:
        samples: the axis that holds the samples; None where none does, or where that is not sure.
        channels: the axis that holds the channels or features; None where that is not sure.
        single: there is no axis of samples because the tensor is one sample's.
        certain: the module's class, or the user, says where the samples are; else the first axis is taken for theirs.
    """

    samples: int | None
    channels: int | None
    single: bool = False
    certain: bool = True

    @property
    def sampled(self) -> bool:
        """Whether each row belongs to a sample."""
        return self.single or self.samples is not None

    def letters(self, ndim: int) -> str:
        """Return a letter for each axis: b the samples, c the channels, - any other.

        >>> Axes(samples=1, channels=2).letters(3)
        '-bc'
        """
        return "".join("b" if i == self.samples else "c" if i == self.channels else "-" for i in range(ndim))


def from_letters(letters: str) -> Axes:
    """Read axes as a user writes them: b the samples, c the channels, any other letter a further axis.

    >>> from_letters("tbc")
    Axes(samples=1, channels=2, single=False, certain=True)
    """
    samples, channels = (letters.index(letter) if letter in letters else None for letter in "bc")
    return Axes(samples, channels, single=samples is None)


def dense(x: Tensor) -> Tensor:
    """Return a tensor whose memory holds all of its values; of a sharded one (DTensor), this process's part."""
    x = x.to_local() if hasattr(x, "to_local") else x
    return in_memory(x if x.layout is torch.strided else x.to_dense())


def arranged(module: nn.Module, x: Tensor, axes: Axes | None = None) -> Tensor:
    """View a module's output, or its gradient, as `(B, C, ...)`: samples, then channels or features, then the rest.

    B is 1 where no axis holds the samples; where it is not sure which one holds the channels, the second is taken.
    """
    x = dense(x)
    axes = axes or module_axes(module, "", x.shape) or Axes(0 if x.ndim else None, own_channels(module, x.shape))
    if x.ndim == 0 or (x.ndim == 1 and axes.channels is None):
        return x.reshape(-1, 1)
    channels = axes.channels
    if axes.samples is None:
        x, channels = x.unsqueeze(0), None if channels is None else channels + 1
    elif axes.samples != 0:
        x = x.movedim(axes.samples, 0)
        channels = channels if channels is None or channels > axes.samples else channels + 1
    return x if channels is None or channels == 1 else x.movedim(channels, 1)


def module_axes(module: nn.Module, position: str, shape: Shape) -> Axes | None:
    """Return the axes of an output of a module whose class settles them; None where it does not.

    Args:
        position: of the tensor in the output: "" for one alone, "0", "1.0".
        shape: of the tensor.
    """
    n = len(shape)
    if is_keras(module):
        return _of_keras(module, n)
    if isinstance(module, CONVOLUTION):
        return _images(n, len(module.kernel_size))
    if (spatial := next((k for cls, k in _SPATIAL.items() if isinstance(module, cls)), None)) is not None:
        return _images(n, spatial)
    if isinstance(module, nn.RNNBase):
        return _recurrent(position, n, module.batch_first)
    if isinstance(module, nn.RNNCellBase):
        return Axes(0, 1) if n == 2 else Axes(None, 0, single=True)
    if isinstance(module, nn.MultiheadAttention) and position == "1":  # the weights (B, T, S) or (B, heads, T, S)
        return Axes(0, 1 if n == 4 else None) if n > 2 else None
    if (batch_first := is_batch_first(module)) is not None:
        return Axes(0 if batch_first else 1, 2) if n == 3 else Axes(None, n - 1, single=True)
    if isinstance(module, _SECOND) and n > 1:
        return Axes(0, 1)
    return None


def _of_keras(module: nn.Module, n: int) -> Axes | None:
    """Return the axes of an output of Keras's layers, which have their samples first."""
    from ...keras_layers import channel_axis

    return Axes(0, 1 if channel_axis(module) == 1 else n - 1) if n > 1 else None


def is_batch_first(module: nn.Module) -> bool | None:
    """Return whether the samples come before time in a recurrent or attention module; None for any other."""
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention | nn.Transformer):
        return bool(module.batch_first)
    if isinstance(module, _ATTENTION):
        return is_batch_first(module.self_attn)
    if isinstance(module, _STACKS):
        return next((is_batch_first(layer) for layer in module.layers if is_batch_first(layer) is not None), None)
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, or transformers' Conv1D, whose weight is `(inputs, outputs)`."""
    if isinstance(module, nn.Linear | nn.Bilinear):
        return True
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and weight.ndim == 2


def own_channels(module: nn.Module, shape: Shape) -> int | None:
    """Return the axis of the channels in a module's output, from its class and its own weight; None if not sure."""
    n = len(shape)
    if isinstance(module, nn.LayerNorm):  # over (C, H, W), or over features
        return n - len(module.normalized_shape) if len(module.normalized_shape) > 2 else n - 1
    if isinstance(module, _LAST) or is_linear(module):
        return n - 1
    if n < 3:
        return 1 if n == 2 else None
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return None
    if weight.ndim > 2:
        return 1 if weight.ndim == n and shape[1] == weight.shape[0] else None
    second, last = shape[1] in weight.shape, shape[-1] in weight.shape
    return None if second == last else 1 if second else n - 1


class Layouts:
    """The axes of all modules of a network.

    Args:
        modules: by name.
        given: letters for the outputs of some of them, as in "tbc", for tensors of as many axes.
    """

    def __init__(self, modules: Mapping[str, nn.Module], given: Mapping[str, str]) -> None:
        self._modules, self._given = modules, given
        self._time_first = {name: module for name, module in modules.items() if is_batch_first(module) is False}
        self._sizes: dict[str, tuple[set[int], set[int]]] = {}
        self._known: dict[tuple[str, str, Shape, int | None], Axes] = {}

    @property
    def root(self) -> nn.Module | None:
        """The whole network, if it is among the modules."""
        return self._modules.get("")

    @property
    def time_first(self) -> Mapping[str, nn.Module]:
        """The modules whose samples come second, by name; watched, they tell how many samples there are."""
        return self._time_first

    def of(self, name: str, position: str, shape: Shape, samples: int | None = None) -> Axes:
        """Return the axes of a module's output.

        Args:
            samples: how many there are, where that is known: it tells samples from time.
        """
        key = (name, position, tuple(shape), samples)
        if key not in self._known:
            if len(self._known) > _REMEMBERED:  # sentences of ever other lengths
                self._known.clear()
            self._known[key] = self._find(name, position, shape, samples)
        return self._known[key]

    def _find(self, name: str, position: str, shape: Shape, samples: int | None) -> Axes:
        letters = self._given.get(name)
        if letters is not None and len(letters) == len(shape):
            return from_letters(letters)
        module = self._modules[name]
        axes = module_axes(module, position, shape)
        if axes is not None:
            return axes
        channels = self._channels(name, shape)
        if len(shape) == 1 and channels == 0:
            return Axes(None, 0, single=True)
        if len(shape) < 3 or not self._time_first:
            return Axes(0 if shape else None, channels, certain=False)
        if any(name.startswith(f"{around}.") for around in self._time_first):
            return Axes(1, channels)
        fitting = [axis for axis in (0, 1) if axis != channels and shape[axis] == samples]
        unsure = 0 if len(shape) > 3 else None  # what has time first has three axes
        return Axes(fitting[0] if len(fitting) == 1 else unsure, channels, certain=False)

    def _channels(self, name: str, shape: Shape) -> int | None:
        """Return the axis of the channels, from the module's class, its weights, or those of the modules around."""
        own = own_channels(self._modules[name], shape)
        if own is not None or len(shape) < 3:
            return own
        second, last = self._sizes_within(name)
        if not second and not last:
            second, last = self._sizes_within("")
        return _by_size(shape, second, last)

    def _sizes_within(self, name: str) -> tuple[set[int], set[int]]:
        """Return the numbers of channels that modules within one have in second place, and in last place."""
        if name not in self._sizes:
            prefix = f"{name}." if name else ""
            second, last = self._sizes[name] = set(), set()
            for other, module in self._modules.items():
                if other == name or other.startswith(prefix):
                    (second if isinstance(module, (CONVOLUTION, *_SECOND)) else last).update(_widths(module))
        return self._sizes[name]


def _widths(module: nn.Module) -> Iterator[int]:
    """Yield how many channels a module's output may have, by its settings or its own weight."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if isinstance(module, CONVOLUTION):
        yield module.out_channels
    elif isinstance(module, nn.RNNBase):
        yield module.hidden_size * (2 if module.bidirectional else 1)
    elif isinstance(module, nn.MultiheadAttention):
        yield module.embed_dim
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield module.embedding_dim
    elif isinstance(module, nn.Linear):
        yield module.out_features
    elif weight is not None and weight.ndim in (1, 2):
        yield from weight.shape


def _by_size(shape: Shape, second: set[int], last: set[int]) -> int | None:
    """Return the axis whose size is a number of channels: the second, the last, or None where that is not sure."""
    if not second and not last:
        return 1 if len(shape) > 3 else None
    fits_second, fits_last = shape[1] in second, shape[-1] in last
    if not last:
        return 1
    if fits_second != fits_last:
        return 1 if fits_second else len(shape) - 1
    return 1 if fits_second and len(shape) > 3 else None


def _images(n: int, spatial: int) -> Axes | None:
    if n == spatial + 1:
        return Axes(None, 0, single=True)
    return Axes(0, 1) if n == spatial + 2 else None


def _recurrent(position: str, n: int, batch_first: bool) -> Axes:
    """Return the axes of a recurrent module's output "0", of its packed output "0.0", or of its states."""
    if position == "0.0":
        return Axes(None, 1)
    if n < 3:
        return Axes(None, n - 1, single=True)
    return Axes(0 if batch_first and position == "0" else 1, 2)
