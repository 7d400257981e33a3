"""Folders of many runs become one, the same bytes whatever their order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from parity.cells.plan import write_plan
from parity.errors import UsageError
from parity.files import file_digest, write_atomically
from parity.results import expected, store
from parity.results.folder import MANIFEST, STORE, Folders, Manifest, Run, copies_text


def merge(folders: Sequence[Path], out: Path) -> Run:
    """Writes `out` with the records, plans and known divergences of the folders; returns their run.

    Records of one cell that differ are all kept: a report counts the worst of them and says so.

    Raises:
        UsageError: `out` holds something, or a folder holds no run or that of a newer version.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out}: it is not empty: give a new folder")
    found = Folders(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        rows = _Rows(part / "rows.arrow", found.tables())
        count = store.write(rows.sorted(), part / STORE)
        rows.close()
        run = found.run
        run.problems += copies_text(rows.copies)
        if run.plan:
            write_plan(run.plan, part)
        for name, content in run.files.items():
            write_atomically(part / expected.FOLDER / name, content)
        manifest = Manifest(
            records=count,
            sha256=file_digest(part / STORE),
            damaged=sorted(run.damaged),
            problems=sorted(run.problems),
        )
        write_atomically(part / MANIFEST, manifest.model_dump_json(indent=1).encode())
        part.chmod(0o755)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return run


class _Rows:
    """Records put aside by row of the grid, so that no more than those of one row are in memory."""

    def __init__(self, file: Path, tables: Iterator[pa.Table]) -> None:
        self.copies = 0
        self._at: dict[tuple[object, ...], list[int]] = {}
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        count = 0
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, store.SCHEMA, options=options) as writer:  # fmt: skip
            for table in tables:
                for key, part in _by_row(table):
                    for batch in part.combine_chunks().to_batches():
                        writer.write_batch(batch)
                        self._at.setdefault(key, []).append(count)
                        count += 1
        self._file, self._source = file, pa.OSFile(str(file))
        self._reader = pa.ipc.open_file(self._source)

    def sorted(self) -> Iterator[pa.Table]:
        """The records of each row in order, those found again left out."""
        for _, batches in sorted(self._at.items()):
            table = pa.Table.from_batches([self._reader.get_batch(i) for i in batches])
            table, copies = store.without_copies(store.in_order(table))
            self.copies += copies
            yield table

    def close(self) -> None:
        """Removes what was put aside."""
        self._source.close()
        self._file.unlink()


def _by_row(table: pa.Table) -> Iterator[tuple[tuple[object, ...], pa.Table]]:
    keys = table.select([*store.KEY]).group_by([*store.KEY]).aggregate([])
    for key in keys.to_pylist():
        here = None
        for name, value in key.items():
            equal = pc.equal(table.column(name), value)
            here = equal if here is None else pc.and_(here, equal)
        yield tuple(key.values()), table.filter(here)
