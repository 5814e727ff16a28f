"""Time explanations of networks in JAX beside their plain jitted gradients: the first call and later ones.

    python benchmarks/explain_jax.py [--rounds N] [--network residual|transformer]

A residual network of 17 ReLUs with group norms, in Flax nnx, 4 images of 64 by 64; a vision transformer of 6 blocks in
nnx, 4 images of 64 by 64 in patches of 8, width 128. Rounds are interleaved, and medians printed. A first call traces,
compiles and runs.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import undertow as ut


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = (nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(2))
        self.norm, self.last = (nnx.GroupNorm(width, num_groups=4, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.norm(self.first(x)))
        return jax.nn.relu(x + self.last(self.second(h)))


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 32, (7, 7), 2, rngs=rngs)
        self.blocks = nnx.List([Block(32, rngs) for _ in range(8)])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Layer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.before, self.between = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.before(x))
        return x + self.down(jax.nn.gelu(self.up(self.between(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, 128, (8, 8), 8, padding="VALID", rngs=rngs)
        self.layers = nnx.List([Layer(128, rngs) for _ in range(6)])
        self.norm, self.head = nnx.LayerNorm(128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x).reshape(len(x), -1, 128)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


NETWORKS = {
    "residual": (Residual, ("gradient", "deconvnet", "guided", "attnlrp", "lrp:epsilon-plus-flat")),
    "transformer": (Transformer, ("gradient", "attnlrp", "cp-lrp")),
}


def timed(call):
    started = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--network", choices=NETWORKS, default="residual")
    arguments = parser.parse_args()
    rounds, (make, rules) = arguments.rounds, NETWORKS[arguments.network]
    net = make(nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 64, 3)), jnp.float32)
    definition, state = nnx.split(net)

    @jax.jit
    def gradient(state: nnx.State, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: nnx.merge(definition, state)(x)[:, 1].sum())(x)

    calls = {"jitted gradient": lambda: gradient(state, x)}
    for rule in rules:
        calls[f"ut.explain, {rule}"] = lambda rule=rule: ut.explain(net, x, rule=rule, target=1).values
    first, maps = {}, {}
    for name, call in calls.items():
        first[name], maps[name] = timed(call)
    assert np.array_equal(maps["jitted gradient"], maps["ut.explain, gradient"])
    later: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            later[name].append(timed(call)[0])
    plain = statistics.median(later["jitted gradient"])
    print("| call | first, s | later, ms | of the plain gradient |\n|---|---:|---:|---:|")
    for name, times in later.items():
        median = statistics.median(times)
        print(f"| {name} | {first[name]:.1f} | {median * 1e3:.1f} | {median / plain:.2f} |")


if __name__ == "__main__":
    main()
