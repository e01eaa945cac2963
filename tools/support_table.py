#!/usr/bin/env python3
"""Write the README's support table from what the tests run (tests/support/testkit/support_matrix.py, gone through by
tests/project/test_support.py).

    python3 tools/support_table.py            # writes it; --check only says whether it is up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from testkit import support_matrix  # noqa: E402

BEGIN, END = "<!-- support table -->", "<!-- end of support table -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the table is another")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.stderr.write(f"{options.readme} lacks the marks {BEGIN} and {END}. Put them where the table belongs.\n")
        return 2
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = f"{before}{BEGIN}\n{support_matrix.table()}\n{END}{after}"
    if options.check:
        if written != text:
            sys.stderr.write(f"The support table in {options.readme} is out of date. Run tools/support_table.py.\n")
        return int(written != text)
    options.readme.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
