"""A table of results: read by reports, and by people as CSV or as a data frame."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Table:
    """Rows with named columns; each row has a value for every column."""

    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]

    def csv(self) -> str:
        """With a header; floats in the shortest form that reads back the same, NaN as `nan`."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([row[name] for name in self.columns] for row in self.rows)
        return text.getvalue()

    def frame(self) -> pd.DataFrame:
        """As pandas has it."""
        import pandas as pd  # half a second

        return pd.DataFrame([*self.rows], columns=[*self.columns])
