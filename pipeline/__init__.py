"""Fullfield's nouns: slides, tiles, networks, canvases. A module imports only from lower floors (see README)."""

__version__ = "0.1.0"
