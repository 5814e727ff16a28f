"""What goes on inside one pass: layers, module calls, blocks, and gradients changed on their way."""
