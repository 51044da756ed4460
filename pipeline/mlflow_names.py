"""Names and values as MLflow takes them, and the tags that say who made a run."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from pipeline.addresses import without_password
from pipeline.machine import user_name
from pipeline.origin import origin

LONGEST_TAG = 8000
"""Letters, at which MLflow cuts the tag of a run; that of a version it refuses, sooner or later by how old it is."""

_LONGEST_NAME, _LONGEST_PARAM = 250, 6000  # letters that MLflow takes
_FIRST_NAMES = 10  # of a list that is too long for a tag
_TOLD_APART = 6  # digits of a digest
_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in MLflow's names


def flat(values: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as (dotted name, text), as short as MLflow wants them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield allowed(f"{above}{key}"), without_password(text)[:_LONGEST_PARAM]


def allowed(name: str) -> str:
    """The name as MLflow allows it: few kinds of letters, and no path that leads elsewhere.

    One that has to change ends on a digest of what it was: `<1%` and `>1%` stay two.
    """
    key = _FORBIDDEN.sub("_", name)[:_LONGEST_NAME]
    if posixpath.normpath(key) != key or key.startswith((".", "/")):
        key = re.sub("[./]", "_", key)
    if key == name:
        return key
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:_TOLD_APART]
    return f"{key[: _LONGEST_NAME - _TOLD_APART - 1]}-{digest}"


def in_short(names: Collection[str], file: str) -> str:
    """What a tag says of names that together are too long for it: their number, the file that has all, and the first few."""
    return f"{len(names)}, all of them in {file}: {', '.join(islice(names, _FIRST_NAMES))}, ..."


def origin_tags() -> dict[str, str]:
    """Tags that tell by whom, where and with which code a run was made."""
    found = origin()
    tags = {
        "mlflow.user": user_name(),
        "mlflow.source.name": without_password(shlex.join(sys.argv)),
        "mlflow.source.type": "LOCAL",
        **{f"fullfield.{name}": value for name, value in found.items() if name != "commit"},
    }
    return tags | ({"mlflow.source.git.commit": found["commit"]} if "commit" in found else {})
