"""``README.md`` of a finished dataset, with which the Hugging Face library can load it: ``load_dataset(<folder>)``.

Without it, that library would take ledgers, plans and the manifest for samples. What it needs is a block of YAML
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
_SPLIT = re.compile(r"\w+(\.\w+)*")  # what may be the name of a split there
_LARGEST = 1 << 20  # bytes of a file that may be looked at for our mark


def card(dataset: Dataset, kept: int, files: Iterator[str]) -> str:
    """The text; empty for storage formats that the library does not read, and where all data were released.

    Args:
        kept: samples.
        files: paths of all data files below the root; asked for where a pattern would find replaced ones too.
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
    """Whether the ``README.md`` in ``root`` may be replaced: there is none, or it is as we have written it."""
    if not root.exists(NAME):
        return True
    return _MARK.encode() in root.read(NAME)[:_LARGEST]
