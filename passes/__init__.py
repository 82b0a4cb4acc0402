"""Graph passes: one pass, one file; `pipeline.py` is the order they run in."""
