"""Distil a model you can only ask into a small one of any architecture."""

__version__ = "0.1.0"
