"""
Outputs are complete or absent: everything is written beside its place and renamed, so a full disk or a kill leaves the old or nothing.

Reading   beside unicuco.py; can be skipped at first. Imports nothing from this folder.
"""
import contextlib
import json
import math
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Yields a hidden neighbour of `path` to write to, renamed at the end: a reader sees the old file or the new one, never half."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write the file `path` at once, folders included: see `replacing`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def strict(value):
    """`value` for json.dumps, numbers that JSON does not have, NaN and infinity, as null."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value, rows=False):
    """Write `value` to the file `path` at once, as JSON that every reader takes; rows: a list, one item a line."""
    value = strict(value)
    write_text(path, ("[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if rows else json.dumps(value, indent=1)) + "\n")


@contextlib.contextmanager
def new_folder(path, force=False):
    """A folder that appears under its name only when it is complete: yields a hidden neighbour, renamed at the end.

    What a killed run left beside `path` goes first; the folder that it was just replacing comes back. Of two runs that write one
    folder at the same time, one fails.
    """
    path = Path(path)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old.partial")

    def tidy():
        if old.exists() and not path.exists():              # between the two renames below
            os.replace(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    tidy()
    if path.exists() and not (force and path.is_dir()):
        raise ValueError(f"{path} exists already; --force replaces a folder")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        tidy()
