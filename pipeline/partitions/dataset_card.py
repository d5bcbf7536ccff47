"""``README.md`` of a finished dataset, which lets Hugging Face's ``load_dataset(<folder>)`` load it.

Without it, ``load_dataset`` would take ledgers, plans and the manifest for samples. It reads only the YAML block
(https://huggingface.co/docs/datasets/repository_structure); the rest is for people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from pipeline.partitions.dataset import Dataset
from pipeline.storage import Folder

NAME = "README.md"
_MARK = "<!-- Written by Latentmill. Without this line the file is yours: it will not be replaced. -->"
_SPLIT = re.compile(r"\w+(\.\w+)*")  # split names that the library accepts
_LARGEST = 1 << 20  # leading bytes of a file in which the mark is searched for


def card(dataset: Dataset, kept: int, files: Iterator[str]) -> str:
    """The text of ``README.md``; empty if the library does not read the storage format or all data were released.

    Args:
        kept: number of samples.
        files: relative paths of all data files; used if a pattern would also match files that were replaced.
    """
    pattern = dataset.format.pattern
    if not pattern or len(dataset.released) == dataset.partitions:
        return ""
    redone = any(plan.redo for plan in dataset.plans)
    split = str(dataset.header["config"].get("split") or "train")
    classes = [str(name) for name in dataset.header["extra"].get("classes", [])]
    head = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {
                        "split": split if _SPLIT.fullmatch(split) else "train",
                        "path": sorted(files) if redone else f"data/*/*/{pattern}",
                    }
                ],
            }
        ],
        "dataset_info": {"features": dataset.format.features(dataset.schema, classes)},
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{front}---\n\n{_MARK}\n\n{_body(dataset, kept)}"


def _body(dataset: Dataset, kept: int) -> str:
    config = dataset.header["config"]
    name = " ".join(str(part) for part in (config.get("dataset"), config.get("split")) if part) or "Dataset"
    columns = "\n".join(f"| `{column}` | {kind} |" for column, kind in dataset.schema.items())
    return f"""# {name}

{kept:,} samples, made by `stage={dataset.stage}` of Latentmill in the storage format `{dataset.format.name}`.
`manifest.json` has the settings and the counts, `ledger.parquet` in each partition says what became of every input.

```python
from datasets import load_dataset

samples = load_dataset("path/of/this/folder")
```

| column | type |
|---|---|
{columns}
"""


def is_ours(root: Folder) -> bool:
    """Whether the ``README.md`` in ``root`` may be replaced: it does not exist, or still has our mark."""
    if not root.exists(NAME):
        return True
    return _MARK.encode() in root.read(NAME)[:_LARGEST]
