"""ImageNet-1k, train and val with one class mapping, and a training loop that can be stopped at any time.

    python examples/imagenet.py /data/ILSVRC/Data/CLS-LOC /data/imagenet ipc [labels of val]

`train` has class folders; `val` has class folders or, with a file of labels (LOC_val_solution.csv, or
ILSVRC2012_validation_ground_truth.txt with meta.mat next to it), all images in one folder. Run it directly, or under
torchrun or srun, so that ranks share the work. On a cluster, slurm/convert_imagenet.sbatch does the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.formats import IpcConverter, MDSConverter, ParquetConverter, Reader, TarConverter
from pipeline.loading import Loader, Sampler

CONVERTERS = {"ipc": IpcConverter, "parquet": ParquetConverter, "tar": TarConverter, "mds": MDSConverter}


def main(source: str, output: str, format: str = "ipc", labels: str = "") -> None:
    convert, root, target = CONVERTERS[format], Path(source), Path(output)
    convert(root / "train", target / "train", num_workers=2, dist=True).convert()
    # Classes are in the order of the folders of train, which is that of WordNet IDs; val uses the same order.
    convert(
        root / "val", target / "val", num_workers=2, dist=True, labels=labels, classes=str(target / "train")
    ).convert()

    train, val = Reader(target / "train", mode="RGB"), Reader(target / "val", mode="RGB")
    assert train.classes == val.classes
    print(f"{train}\nval: {len(val)} samples")

    # An epoch that is stopped after some batches, and resumed with another number of workers and another batch size.
    first = Loader(train, Sampler(len(train), 64, seed=0, epochs=1), num_workers=2, collate_fn=list)
    seen = 0
    for batch in first:
        seen += len(batch)
        break  # a time limit, a crash, ...
    second = Loader(train, Sampler(len(train), 48, seed=0, epochs=1), num_workers=0, collate_fn=list)
    second.load_state_dict(first.state_dict())
    seen += sum(len(batch) for batch in second)
    print(f"{seen} of {len(train)} samples seen, each once")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
