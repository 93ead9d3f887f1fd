"""The deployable folder NAME.trtb, format 1 (FORMAT.md beside this file describes it).

Does: writes a bundle whole or not at all, and reads one strictly.
Takes: Contents and files. Gives: a Bundle, whose files are handed out with their hashes checked.
May touch: the bundle's folder and hidden temporaries beside it. Knows no network, engine or image: nothing heavy.
"""

from trtbuild.bundle.checks import FORMAT, SHARED_BY_STAGES
from trtbuild.bundle.manifest import Contents, FileEntry, Golden, Manifest, Provenance, Stage
from trtbuild.bundle.reader import Bundle, open_bundle, verify_bundle
from trtbuild.bundle.writer import write_bundle

__all__ = [
    "FORMAT", "SHARED_BY_STAGES", "Bundle", "Contents", "FileEntry", "Golden", "Manifest", "Provenance", "Stage",
    "open_bundle", "verify_bundle", "write_bundle",
]  # fmt: skip
