"""A look into networks in JAX: their scores and their layers."""
