"""Keras 3 on TensorFlow. What several of its folders share stands here; `internals.py` names what both keep private."""
