"""Channels of an OME-TIFF that lie on pages of their own: OpenSlide takes such a file for a grey scan of the first."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from xml.etree.ElementTree import ParseError

import defusedxml.ElementTree
import tifffile
from defusedxml.common import DefusedXmlException


def pages_of_channels(path: Path, description: str) -> int:
    """How many channels a TIFF of that description has, where its first page holds but one of them; else 0.

    OME-XML may leave out how many samples a channel has: the page itself says so.
    """
    channels = _channels(description)
    if channels < 2:
        return 0
    with suppress(Exception), tifffile.TiffFile(path) as file:  # which raises whatever it likes: OpenSlide knows better
        return channels if file.pages.first.samplesperpixel == 1 else 0
    return 0


def _channels(description: str) -> int:
    """`SizeC` of the first image of OME-XML; 0 for any other text."""
    with suppress(ParseError, DefusedXmlException, ValueError, LookupError):
        pixels = defusedxml.ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
        return 0 if pixels is None else int(pixels.get("SizeC", "1"))
    return 0
