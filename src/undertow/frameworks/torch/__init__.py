"""PyTorch. What several of its folders share stands here; `internals.py` names what torch keeps private."""
