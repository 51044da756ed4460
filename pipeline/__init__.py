"""Fullfield's nouns: slides, tiles, networks, canvases. A module imports only from lower floors (see CONTRIBUTING.md)."""

__version__ = "0.1.0"
