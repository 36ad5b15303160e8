"""No Parquet file is read by Arrow's threads: one that is not done at the interpreter's end aborts the process."""

import ast
from pathlib import Path

import skipvar


def test_every_reading_is_by_the_thread_that_asks() -> None:
    found = 0
    for path in Path(skipvar.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            assert ast.unparse(node.func) not in ("pq.read_table", "pyarrow.parquet.read_table"), path
            words = {word.arg: word.value for word in node.keywords}
            is_read = node.func.attr == "read" and "columns" in words
            if is_read or node.func.attr in ("iter_batches", "read_row_group"):
                threads = words.get("use_threads")
                assert isinstance(threads, ast.Constant) and threads.value is False, f"{path}:{node.lineno}"
                found += 1
    assert found >= 5
