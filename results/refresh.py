"""Write the tables of README.md from the committed records: `python results/refresh.py`; a test holds them current."""

from __future__ import annotations

import re
from pathlib import Path

from advalign.report.tables import accuracy_table
from advalign.runs import read_records

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- table of (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def refreshed(text: str) -> str:
    """Return the text with the table of each marked block made from its records."""

    def table(found: re.Match[str]) -> str:
        files = sorted((ROOT / found[2]).rglob("records.jsonl"))
        records = [record for file in files for record in read_records(file)]
        return f"{found[1]}{accuracy_table(records).markdown()}\n{found[3]}"

    return _BLOCK.sub(table, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refreshed(readme.read_text()))
