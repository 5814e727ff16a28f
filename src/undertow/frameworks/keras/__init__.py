"""Keras 3 on TensorFlow. What several of its folders share stands here."""
