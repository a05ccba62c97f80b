"""Draw what was measured: tables between two markers in README.md and bench/notes/limits.md, page and charts of a machine in bench/results.

    python -m bench.plot [--machine NAME]       the machine measured last, or the one named

Always the latest record of each case. Rows that this library loses are drawn like all others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.charts import draw
from bench.goals import MACHINE, goals
from bench.records import RESULTS, ROOT, latest, load
from bench.tables import main_table, page

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Tables and charts from bench/results.")
    parser.add_argument("--machine", help="folder under bench/results (default: the one with the latest record)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default bench/results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the two markers (default README.md)")
    parser.add_argument(
        "--limits", type=Path, default=ROOT / "bench" / "notes" / "limits.md", help="page of what was asked, with markers too"
    )
    args = parser.parse_args(argv)
    records = load(args.results)
    if args.machine:
        records = [r for r in records if r["machine"]["name"] == args.machine]
    if not records:
        print(f"bench.plot: expected results under {args.results}, found none; run 'make bench' first.", file=sys.stderr)
        return 2
    machine = max(records, key=lambda r: r["date"])["machine"]["name"]
    chosen = latest([r for r in records if r["machine"]["name"] == machine])
    contents = {args.readme: main_table(chosen)} | ({args.limits: goals(chosen)} if machine == MACHINE else {})
    texts = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in contents}
    for path, text in texts.items():
        if BEGIN not in text or END not in text:
            print(f"bench.plot: expected the markers {BEGIN} and {END} in {path}, found none; add them.", file=sys.stderr)
            return 2
    for path, text in texts.items():
        path.write_text(between_markers(text, contents[path]), encoding="utf-8")
    folder = args.results / machine
    (folder / "README.md").write_text(page(chosen, draw(chosen, folder)), encoding="utf-8")
    print(f"{args.readme.name} and {folder} from {len(chosen)} cases")
    return 0


def between_markers(text: str, table_text: str) -> str:
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{BEGIN}\n{table_text}\n{END}{tail}"


if __name__ == "__main__":
    raise SystemExit(main())
