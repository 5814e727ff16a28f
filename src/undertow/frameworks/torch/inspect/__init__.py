"""One pass from the inside: its layers, module calls and blocks, and gradients that are changed on their way."""
