"""What goes on inside a Keras network in one pass."""
