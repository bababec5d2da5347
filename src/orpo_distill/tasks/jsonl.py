"""A user's own problems: one JSON object a line (or parquet), in fields named as they come (see `tasks.fields`).

task: {type: jsonl, path: my/folder, verifier: number}

{"id": "1", "question": "Ada has 3 apples and eats one. How many are left?", "answer": "2"}
{"problem": "Which is a fruit?", "options": ["oak", "plum"], "solution": "B"}          with `verifier: choice`
"""

from __future__ import annotations

from orpo_distill.tasks.question import QuestionTask


class Jsonl(QuestionTask):
    """Problems from `path` (a folder or file) or any data set of the hub (`hub_id`); `verifier` must be given."""
