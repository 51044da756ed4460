"""One array of bytes on disk, cut into square shards: one file a shard, each holding many compressed chunks.

The files are those of a Zarr v3 array with the `sharding_indexed` codec, which any Zarr reader opens. They are written
and read here, chunk by chunk, and not through zarr-python: that takes twice the time and holds whole shards in memory.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np

from pipeline import checksum
from pipeline.errors import CanvasError
from pipeline.files import name_file, write_json
from pipeline.geometry import Roi

_ZSTD_LEVEL = 1  # higher ones save some 3 % of bytes and cost twice the time
_ABSENT = np.uint64(2**64 - 1)  # offset and length, in a shard's index, of a chunk that holds nothing but the fill value

Place = tuple[int, int]
"""(row, column) of a shard in its array, or of a chunk in its shard."""


@dataclass(frozen=True)
class ShardedArray:
    """A uint8 array of shape (rows, columns) or (channels, rows, columns); the channels are never cut.

    `shard` and `chunk` are in pixels, and chunk divides shard. What was never written reads as `fill`.
    """

    folder: Path
    shape: tuple[int, ...]
    shard: int
    chunk: int
    fill: int

    def path(self, place: Place) -> Path:
        """The file of one shard."""
        leading = ["0"] * (len(self.shape) - 2)
        return self.folder.joinpath("c", *leading, str(place[0]), str(place[1]))

    def places(self) -> list[Place]:
        """(row, column) of every shard that is on disk, row by row."""
        rows = self.path((0, 0)).parent.parent
        found = rows.glob("*/*") if rows.is_dir() else ()
        return sorted((int(file.parent.name), int(file.name)) for file in found if file.name.isdigit())

    def columns(self, row: int) -> list[int]:
        """The columns of the shards of one row that are on disk, from the left; no other row is looked at."""
        folder = self.path((row, 0)).parent
        return sorted(int(file.name) for file in folder.glob("*") if file.name.isdigit())

    def is_whole(self, place: Place) -> bool:
        """Whether a shard is on disk with as many bytes as its index says, which is what its checksum was made of.

        A machine that loses power may leave a file under its own name that is empty, or short.
        """
        path, across = self.path(place), self.shard // self.chunk
        try:
            with path.open("rb") as file:
                index = self._read_index(file, path)
                size = file.seek(0, os.SEEK_END)
        except (FileNotFoundError, CanvasError):
            return False
        payload = index[index[..., 0] != _ABSENT][:, 1].sum()
        return size == int(payload) + across * across * 16 + checksum.SIZE

    def create(self, axes: Sequence[str]) -> None:
        """Make the folder and the description that Zarr readers look for; `axes` names the dimensions.

        Each row has its folder from the first moment on: one that a network file system did not find, it does not look for
        again for a while, though another machine has made it.
        """
        channels = self.shape[:-2]
        zstd, crc32c = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}, {"name": "crc32c"}
        codecs = [{"name": "bytes"}, zstd, crc32c]
        index_codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, crc32c]
        sharding = {
            "chunk_shape": [*channels, self.chunk, self.chunk],
            "codecs": codecs,
            "index_codecs": index_codecs,
            "index_location": "end",
        }
        grid = {"chunk_shape": [*channels, self.shard, self.shard]}
        description = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": "uint8",
            "fill_value": self.fill,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(axes),
            "attributes": {},
        }
        write_json(self.folder / "zarr.json", description)
        for row in range(-(-self.shape[-2] // self.shard)):
            self.path((row, 0)).parent.mkdir(parents=True)

    def encode(self, pixels: np.ndarray) -> bytes:
        """One compressed chunk and its checksum; pixels that `pixels` lacks, past the edge of the array, become `fill`."""
        rows, columns = pixels.shape[-2:]
        if (rows, columns) != (self.chunk, self.chunk):
            whole = np.full((*self.shape[:-2], self.chunk, self.chunk), self.fill, np.uint8)
            whole[..., :rows, :columns] = pixels
            pixels = whole
        return checksum.signed(bytes(imagecodecs.zstd_encode(pixels.tobytes(), level=_ZSTD_LEVEL)))

    def store(self, place: Place, chunks: Mapping[Place, bytes]) -> None:
        """Write one shard, whole or not at all: its chunks, an index of where each is, a checksum of the index."""
        across = self.shard // self.chunk
        index = np.full((across, across, 2), _ABSENT, "<u8")
        end = 0
        for chunk, payload in chunks.items():
            index[chunk] = end, len(payload)
            end += len(payload)
        path = self.path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.writelines(chunks.values())
                file.write(checksum.signed(index.tobytes()))
        except OSError as error:  # such as a disk that is full
            partial.unlink(missing_ok=True)
            name_file(error, path)
            raise
        partial.replace(path)

    def read(self, roi: Roi) -> np.ndarray:
        """The pixels of a rectangle, (..., rows, columns) uint8; outside the array they are `fill`.

        Raises CanvasError where a shard is torn.
        """
        pixels = np.full((*self.shape[:-2], *roi.shape), self.fill, np.uint8)
        area = roi.intersect(Roi(0, 0, self.shape[-1], self.shape[-2]))
        for place in _cells(area, self.shard):
            self._read_shard(place, area, roi, pixels)
        return pixels

    def remove_partial_files(self) -> None:
        """Remove what killed writers left behind; to be called when nobody writes."""
        for file in self.folder.glob("c/**/*.partial"):
            file.unlink(missing_ok=True)

    def _read_shard(self, place: Place, area: Roi, roi: Roi, pixels: np.ndarray) -> None:
        """Fill in, of `pixels` (those of `roi`), what one shard holds of `area`."""
        path = self.path(place)
        shard = Roi(place[1] * self.shard, place[0] * self.shard, self.shard, self.shard)
        if not path.exists():
            return
        with path.open("rb") as file:
            index = self._read_index(file, path)
            for row, column in _cells(area.intersect(shard).within(shard), self.chunk):
                offset, length = index[row, column]
                if offset == _ABSENT:
                    continue
                file.seek(int(offset))
                chunk = Roi(shard.x + column * self.chunk, shard.y + row * self.chunk, self.chunk, self.chunk)
                common = chunk.intersect(area)
                decoded = self._decode(file.read(int(length)), path)
                pixels[..., *common.within(roi).slices()] = decoded[..., *common.within(chunk).slices()]

    def _decode(self, payload: bytes, path: Path) -> np.ndarray:
        try:
            flat = np.frombuffer(imagecodecs.zstd_decode(checksum.verified(payload)), np.uint8)
            return flat.reshape(*self.shape[:-2], self.chunk, self.chunk)
        except (RuntimeError, ValueError) as error:
            raise _torn(path) from error

    def _read_index(self, file: BinaryIO, path: Path) -> np.ndarray:
        """(rows, columns, 2) uint64: offset and length of each chunk of a shard."""
        across = self.shard // self.chunk
        size = across * across * 16
        file.seek(max(file.seek(0, os.SEEK_END) - size - checksum.SIZE, 0))
        try:
            return np.frombuffer(checksum.verified(file.read()), "<u8").reshape(across, across, 2)
        except ValueError as error:
            raise _torn(path) from error


def _torn(path: Path) -> CanvasError:
    remedy = "Delete this file and segment the slide again, into the same folder: only what is missing is made anew."
    return CanvasError(str(path), "a damaged shard", "a whole one", remedy)


def _cells(roi: Roi, size: int) -> Iterator[Place]:
    """(row, column) of the squares of `size` pixels that a rectangle touches."""
    if roi.area == 0:
        return
    for row in range(roi.y // size, (roi.bottom - 1) // size + 1):
        for column in range(roi.x // size, (roi.right - 1) // size + 1):
            yield row, column
