"""Write the tables of the README and of docs/ from the committed records: `python results/refresh.py`.

A test holds them current.
"""

from __future__ import annotations

import re
from pathlib import Path

from advalign.report.tables import accuracy_table
from advalign.runs import read_records
from advalign.studies.methods import comparison

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md", ROOT / "docs" / "evaluation.md")
_KINDS = {"table": accuracy_table, "comparison": comparison}
_BLOCK = re.compile(r"(<!-- (table|comparison) of (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """Return the text with the table of each marked block made from its records."""

    def table(found: re.Match[str]) -> str:
        files = sorted((ROOT / found[3]).rglob("records.jsonl"))
        records = [record for file in files for record in read_records(file)]
        return f"{found[1]}{_KINDS[found[2]](records).markdown()}\n{found[4]}"

    return _BLOCK.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
