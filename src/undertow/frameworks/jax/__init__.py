"""Networks in JAX: functions, Flax (nnx and linen) and Equinox modules, and Keras models on JAX, read as jaxprs."""
