"""Make traces for the sampler `recorded` of the worked solutions that come with a data set.

    python scripts/gold_traces.py ../shared/data/gsm8k/train.jsonl.gz gold/gsm8k.jsonl

Reads JSON Lines with `id`, `answer` and `rationale`; rows without a rationale are left out. Writes one trace a problem,
GSM8K's calculator marks (`<<48/2=24>>`) taken out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orpo_distill.errors import DataError, OrpoDistillError
from orpo_distill.progress import say
from orpo_distill.tasks.rows import read_rows

CALCULATOR = re.compile(r"<<.*?>>")


def gold_traces(source: Path) -> Iterator[dict[str, Any]]:
    """A line of `recorded` for each row that has a rationale. Raises DataError for a row without an id or an answer."""
    for row in read_rows(source):
        found = row.fields
        if not found.get("rationale"):
            continue
        if not found.get("id") or not found.get("answer"):
            raise DataError(f"{row.where}: expected id and answer beside a rationale, found {sorted(found)}; mend it")
        text = CALCULATOR.sub("", str(found["rationale"])).strip()
        yield {"id": found["id"], "traces": [{"text": text, "answer": str(found["answer"])}]}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and say how many traces it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="JSON Lines, plain or .gz")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    try:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in gold_traces(options.source)]
        if not lines:
            raise DataError(f"{options.source}: expected rows with a rationale, found none")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(lines), encoding="utf-8")
    except (OrpoDistillError, OSError) as error:
        say(f"error: {error}")
        return 1
    say(f"{options.out}: {len(lines)} traces")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
