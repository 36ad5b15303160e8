"""The dataset card: what opens the dataset by name, and what a reader of it needs to know."""

from typing import Any

from skipvar.shards.record import RunRecord


def dataset_card(record: RunRecord) -> str:
    """The card's Markdown, with the header by which `datasets.load_dataset(<output>)` finds the data files."""
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        '    path: "data/*.parquet"',
        "task_categories:",
        "- text-to-image",
        "tags:",
        "- synthetic",
        "---",
        "",
        "# Images made with skipvar",
        "",
        "One row an image; every row says what it was made from (`prompt`, `seed`, `cfg`, `tau`, `strategy`, `model`).",
        "Requests that failed stand under `errors/`; files there that no data file names in its footer do not count.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset("parquet", data_files="data/*.parquet", split="train")  # in this folder',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| fingerprint | `{record.fingerprint}` |",
        f"| input rows | {record.input.num_rows} |",
        *(
            f"| {_cell(name)} | {_cell(value)} |"
            for name, value in record.counts.items()
            if not isinstance(value, dict | list)
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """Text that cannot leave its cell of the table."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
