"""Compiled templates, kept below the cache: compiling them takes longer than filling them in."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from jinja2 import BytecodeCache
from jinja2.bccache import Bucket

from parity import derived, resources
from parity.files import write_atomically

_DIGEST = hashlib.sha256().digest_size


class Compiled(BytecodeCache):
    """Found by the template's name and text; a cache that cannot be written makes it slower, not wrong."""

    def load_bytecode(self, bucket: Bucket) -> None:
        """Reads what was compiled before; what cannot be read is compiled again."""
        bucket.reset()
        with contextlib.suppress(OSError):
            content = _file(bucket).read_bytes()
            digest, code = content[:_DIGEST], content[_DIGEST:]
            if hashlib.sha256(code).digest() == digest:  # damaged bytecode must not be run
                bucket.bytecode_from_string(code)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keeps it for the next time."""
        with contextlib.suppress(OSError):
            code = bucket.bytecode_to_string()
            write_atomically(_file(bucket), hashlib.sha256(code).digest() + code)


def _file(bucket: Bucket) -> Path:
    # Bytecode is of one version of Python and Jinja, which the bucket itself checks.
    return resources.cache() / derived.FOLDER / "templates" / bucket.key
