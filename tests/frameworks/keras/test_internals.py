"""The installed Keras and TensorFlow still have each private name that undertow uses, with the meaning it relies on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from undertow.frameworks import keras_layers
from undertow.frameworks.keras import internals


class Block(layers.Layer):
    """A layer, no model, with a layer within."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def graph_of(function, *shape: int):
    return tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec(shape, tf.float32)).graph


def operation(graph, kind: str):
    return next(op for op in graph.get_operations() if op.type == kind)


@tf.custom_gradient
def doubled(x):
    return tf.identity(x), lambda g: 2 * g


def test_layers_are_listed_at_every_depth():
    block, relu = Block(), layers.ReLU()
    model = keras.Sequential([keras.Sequential([block]), relu])
    assert internals.all_layers(model)[0] is model
    assert {block, block.dense, relu} < set(internals.all_layers(model))
    assert keras_layers.children(block) == [block.dense]
    assert keras_layers.children(model) == model.layers
    block(np.ones((1, 3), np.float32))
    assert keras_layers.own_variables(block) == []
    assert keras_layers.own_variables(block.dense) == block.weights


def test_a_layers_own_flag_is_set_alone():
    block = Block()
    block(np.ones((1, 3), np.float32))
    internals.set_trainable(block, False)
    assert (block.trainable, block.dense.trainable) == (False, True)
    assert all(variable.trainable for variable in block.dense.variables)


def test_logits_go_with_an_output():
    output, replacement = keras.activations.softmax(tf.constant([[1.0, 3.0]])), tf.constant([[0.1, 0.9]])
    internals.copy_logits(output, replacement)
    loss = keras.losses.sparse_categorical_crossentropy(np.array([1]), replacement)
    assert np.allclose(loss, np.log(1 + np.exp(-2)))
    internals.copy_logits(tf.constant(0.0), replacement)  # no output of a softmax


def test_an_operation_has_a_gradient_function_of_its_own():
    def gradient(x):
        y = tf.nn.relu(x)
        own = internals.gradient_function(y.op)
        internals.set_gradient_function(y.op, lambda op, g: 3 * own(op, g))
        tripled = tf.gradients(y, x)[0]
        internals.set_gradient_function(y.op, None)
        return tripled, tf.gradients(y, x)[0]

    tripled, plain = tf.function(gradient, autograph=False)(tf.constant([-1.0, 2.0]))
    assert tripled.numpy().tolist() == [0, 3]
    assert plain.numpy().tolist() == [0, 1]


def test_custom_gradients_are_told_from_recomputation():
    custom = operation(graph_of(doubled, 2), "IdentityN")
    recomputed = operation(graph_of(lambda x: tf.recompute_grad(lambda v: tf.nn.relu(v))(x), 2), "IdentityN")
    assert internals.has_custom_gradient(custom)
    assert internals.has_custom_gradient(recomputed)
    assert not internals.recomputes(custom)
    assert internals.recomputes(recomputed)
    assert not internals.has_custom_gradient(operation(graph_of(lambda x: tf.identity_n([x])[0], 2), "IdentityN"))


def test_a_called_function_gives_its_graph(tmp_path):
    inner = tf.function(lambda x: tf.nn.relu(x) + 1, autograph=False)
    module = tf.Module()
    module.f = tf.function(inner, input_signature=[tf.TensorSpec((2,), tf.float32)])
    tf.saved_model.save(module, tmp_path)
    for function in (inner, tf.saved_model.load(tmp_path).f):
        call = operation(graph_of(lambda x, function=function: function(x), 2), "PartitionedCall")
        body = internals.called_graph(call)
        assert [y.shape for y in body.outputs] == [(2,)]
        definition = body.as_graph_def()
        for node in definition.node:
            node.attr["_class"].list.s.append(b"loc:@elsewhere")
        internals.forget_colocation(definition)
        assert tf.graph_util.import_graph_def(definition, return_elements=[body.outputs[0].name])


def test_operations_that_run_eagerly_are_seen_with_their_gradients():
    seen = []
    x = tf.constant([[1.0, -2.0]])

    def see(*args, op_name=None, graph=None):
        if graph is None:
            seen.append(args)

    with internals.operations_seen(see):
        y = tf.nn.leaky_relu(x, 0.1)
        tf.function(lambda v: v * 2)(x)
    tf.nn.relu(x)
    (kind, inputs, attributes, outputs, _) = seen[0]
    assert (kind, inputs[0] is x, outputs[0] is y) == ("LeakyRelu", True, True)
    assert dict(zip(attributes[::2], attributes[1::2], strict=True))["alpha"] == pytest.approx(0.1)
    (gradient,) = internals.gradients_of_operation(kind, attributes, inputs, outputs, [tf.ones_like(y)])
    assert np.allclose(gradient, [[1.0, 0.1]])
    assert not any(args[0] in ("Relu", b"Relu") for args in seen)
    assert any("inference" in str(args[0]) for args in seen)
    assert internals.carries_gradient("Relu")
    assert not internals.carries_gradient("Greater")


def test_what_runs_in_a_custom_gradient_is_told():
    names = []

    @tf.custom_gradient
    def mine(x):
        names.append(internals.custom_gradient_around())
        return tf.identity(x), lambda g: g

    mine(tf.ones(2))
    assert (names, internals.custom_gradient_around()) == (["mine"], "")
