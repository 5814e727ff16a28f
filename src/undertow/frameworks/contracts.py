"""Lets mypy hold each framework's files to their contracts in `base.py` and `classifier.py`. Nothing here runs.

A new framework adds a row for each capability that it has.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..classifier import Zoo
    from . import base
    from .jax import arrays as jax_arrays
    from .jax import explain as jax_explain
    from .jax import record as jax_record
    from .jax import zoo as jax_zoo
    from .jax.inspect import layers as jax_layers
    from .jax.inspect import redirect as jax_redirect
    from .jax.inspect import trace as jax_trace
    from .jax.record import gradients as jax_gradients
    from .keras import arrays as keras_arrays
    from .keras import explain as keras_explain
    from .keras import record as keras_record
    from .keras import zoo as keras_zoo
    from .keras.inspect import blocks as keras_blocks
    from .keras.inspect import layers as keras_layers
    from .keras.inspect import redirect as keras_redirect
    from .keras.inspect import trace as keras_trace
    from .torch import arrays as torch_arrays
    from .torch import explain as torch_explain
    from .torch import memory as torch_memory
    from .torch import prepare as torch_prepare
    from .torch import record as torch_record
    from .torch import zoo as torch_zoo
    from .torch.explain import rules as torch_rules
    from .torch.inspect import blocks as torch_blocks
    from .torch.inspect import derivatives as torch_derivatives
    from .torch.inspect import layers as torch_layers
    from .torch.inspect import redirect as torch_redirect
    from .torch.inspect import trace as torch_trace

    ARRAYS: tuple[base.Arrays, ...] = (torch_arrays, keras_arrays, jax_arrays)
    EXPLAINERS: tuple[base.Explainer, ...] = (torch_explain, keras_explain, jax_explain)
    RULES_EXPLAINERS: tuple[base.RulesExplainer, ...] = (torch_rules,)
    PREPARERS: tuple[base.Preparer, ...] = (torch_prepare,)
    MEMORIES: tuple[base.Memory, ...] = (torch_memory,)
    INSPECTORS: tuple[base.Inspector, ...] = (torch_layers, keras_layers, jax_layers)
    TRACERS: tuple[base.Tracer, ...] = (torch_trace, keras_trace, jax_trace)
    REDIRECTORS: tuple[base.Redirector, ...] = (torch_redirect, keras_redirect, jax_redirect)
    BLOCK_READERS: tuple[base.BlockReader, ...] = (torch_blocks, keras_blocks)
    DIFFERENTIATORS: tuple[base.Differentiator, ...] = (torch_derivatives,)
    RECORDERS: tuple[base.Recorder, ...] = (torch_record, keras_record)
    JAX_RECORDERS: tuple[base.Recorder, ...] = (jax_record,)  # mypy joins no three modules of such a protocol
    LOSS_RECORDERS: tuple[base.LossRecorder, ...] = (jax_gradients,)
    ZOOS: tuple[Zoo, ...] = (torch_zoo, keras_zoo, jax_zoo)
