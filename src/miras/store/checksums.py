"""Checksums of the plain files of a folder, in one more file beside them, to detect changed
bytes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
"""The file that holds {name: SHA-256} for files of its folder. A folder without it is read
unchecked."""


def with_checksums(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a folder, by name, plus the file of their checksums."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**files, CHECKSUMS: (json.dumps(sums, indent=2) + "\n").encode()}


def read_checked(path: Path) -> bytes:
    """A file's bytes. Raises ValueError if its checksum differs, and OSError like reading."""
    data = path.read_bytes()
    beside = path.parent / CHECKSUMS
    try:
        sums: Any = json.loads(beside.read_bytes())
    except FileNotFoundError:
        return data
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{beside} is damaged ({error}), so {path.name} cannot be checked; if you trust the folder, delete "
            f"{CHECKSUMS} in it"
        ) from error
    wanted = sums.get(path.name) if isinstance(sums, dict) else None
    if wanted is not None and wanted != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{path} has changed since it was saved (its checksum differs); use an intact copy or, if you "
            f"changed it on purpose, delete {CHECKSUMS} in {path.parent}"
        )
    return data


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for a JSON file, with their checksum added."""
    return {**values, "sha256": _digest(values)}


def check_sealed(values: Mapping[str, Any]) -> None:
    """Raise ValueError if values differ from their checksum; values without a checksum pass."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    if "sha256" in values and values["sha256"] != _digest(rest):
        raise ValueError("its checksum differs: a byte has changed since it was written")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
