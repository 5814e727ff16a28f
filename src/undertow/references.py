"""How a model is named: the sources that a reference begins with, and all its forms in one line."""

SOURCES = {
    "demo": "torch",
    "torchvision": "torch",
    "timm": "torch",
    "hf": "torch",
    "open_clip": "torch",
    "keras": "keras",
}
"""The framework that loads each source, the part of a reference before the colon."""

FORMS = (
    "demo, torchvision:NAME, timm:NAME, hf:NAME_OR_FOLDER, open_clip:NAME@WEIGHTS, keras:NAME, FILE.keras, "
    "[jax:]FILE.py:FUNCTION"
)
"""Every form of a reference, for errors and for the help of `--model`."""

OTHER_NAMES = {"huggingface": "hf", "transformers": "hf", "clip": "open_clip", "openclip": "open_clip"}
"""What else a source may be called by a person, for suggestions."""
