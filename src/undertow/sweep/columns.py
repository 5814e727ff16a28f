"""The columns of the index of each task's parts."""

EXPLAIN_COLUMNS = {"index": "int64", "name": "string", "rule": "string", "target": "int64", "class_name": "string"} | {
    "score": "float64",
    "rewired": "int32",
    "skipped": "string",
    "switches": "int32",
    "head": "string",
    "file": "string",
    "offset": "int64",
}
TRUST_COLUMNS = {"index": "int64", "name": "string", "rule": "string", "estimator": "string", "target": "int64"} | {
    "class_name": "string",
    "question": "string",
    "answer": "string",
    "value": "float64",
    "sentence": "string",
}
COLUMNS: dict[str, dict[str, str]] = {"explain": EXPLAIN_COLUMNS, "trust": TRUST_COLUMNS, "record": {}}
"""The columns of the index of each task's parts. `score` is the explained one, `skipped` a JSON object, `offset` a row
of the tensor `values` in `file`; of trust, `question` is "verdict" in the row whose `sentence` is the one to read."""
