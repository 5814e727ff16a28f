"""Pictures and tables from arrays. Nothing here sees a model."""
