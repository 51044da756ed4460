"""Bytes that carry their own checksum: CRC-32C in the last four, as Zarr's codec `crc32c` has it.

It notices what a disk has changed, not what somebody has.
"""

from __future__ import annotations

import google_crc32c

SIZE = 4
"""Bytes of a checksum."""


def signed(content: bytes) -> bytes:
    """The content, and its checksum."""
    return content + int(google_crc32c.value(content)).to_bytes(SIZE, "little")


def verified(found: bytes) -> bytes:
    """The content that `signed` was given. Raises ValueError where it is not the one that was signed."""
    content, checksum = found[:-SIZE], found[-SIZE:]
    if int(google_crc32c.value(content)) != int.from_bytes(checksum, "little"):
        raise ValueError("the checksum is that of another content")
    return content
