"""Reading latents for training, shuffled, from a local disk: ours against StreamingDataset on the same folder.

    python benchmarks/latents.py [samples=3000] [batch=64] [rounds=3] [folder=...]

Samples are as stored by micro_diffusion: text states (77, 1024) and latents (4, 32, 32), float16. Ours reads ahead in
one thread; StreamingDataset uses a DataLoader with two workers. Both return batches of tensors; the page cache is warm.
Then, for text states like those of ViT-H-14-378 (random weights), the size and error of each text_storage, with ragged
ones for captions as long as those of COCO; `storage=false` skips this.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.loading.latents import build_streaming_latents_dataloader
from pipeline.loading.text_storage import cosine_error, is_ragged, size_of, token_bytes

TEXT, IMAGE = (77, 1024), (4, 32, 32)


class Theirs(StreamingDataset):
    """As in micro_diffusion's latents_loader.py."""

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = super().__getitem__(at)
        return {
            "drop_caption_mask": 1.0,
            "caption_latents": torch.from_numpy(np.frombuffer(row["caption_latents"], np.float16).copy()).reshape(
                1, *TEXT
            ),
            "image_latents": torch.from_numpy(np.frombuffer(row["latents_256"], np.float16).copy()).reshape(IMAGE),
        }


def write(folder: Path, samples: int) -> None:
    random = np.random.default_rng(0)
    text, image = random.bytes(2 * int(np.prod(TEXT))), random.bytes(2 * int(np.prod(IMAGE)))
    columns = {"key": "str", "caption": "str", "caption_latents": "bytes", "latents_256": "bytes"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=2**26) as writer:
        for number in range(samples):
            row = {"key": f"{number:08}", "caption": "a caption", "caption_latents": text, "latents_256": image}
            writer.write(row)


def rate(loader: Any) -> float:
    """Samples per second of one epoch, from the second batch on, when processes have started."""
    count, begin = 0, 0.0
    for number, batch in enumerate(loader):
        if number:
            count += len(batch["image_latents"])
        else:
            begin = perf_counter()
    return count / (perf_counter() - begin)


def ours(folder: Path, batch: int) -> Any:
    return build_streaming_latents_dataloader(folder, batch, 256)


def theirs(folder: Path, batch: int) -> Any:
    clean_stale_shared_memory()
    dataset = Theirs(local=str(folder), shuffle=True, batch_size=batch)
    return torch.utils.data.DataLoader(dataset, batch, num_workers=2, drop_last=True)


def storage() -> None:
    """Size and error of each storage, with the text tower of DFN5B-CLIP-ViT-H-14-378 (random weights) on captions of 8
    to 46 tokens; ragged sizes are for captions of 8 to 13 words, 10.5 on average, as in COCO."""
    from pipeline.encoders.base import text_encoder

    captions = [f"a photo of {number} {'very ' * (2 * number)}red things on a table" for number in range(20)]
    sentence = "a man riding his brown horse across some green field today near town"
    words = sentence.split()
    encoder = text_encoder("openclip:ViT-H-14-378-quickgelu:random")
    tokens = sum(encoder.tokens([" ".join(words[:count]) for count in range(8, 14)])) / 6
    with torch.inference_mode():
        states = encoder.encode(captions)
    images = 2 * sum(4 * (edge // 8) ** 2 for edge in (256, 512))
    full = size_of(TEXT, "dense", "float16")
    print(
        "\ntext_storage   bytes of text   of dense   bytes with latents of 256 and 512  1 - cosine, mean      largest"
    )
    for kind in ("dense", "int8", "fp8", "dedup", "int8+dedup", "ragged", "int8+ragged"):
        size = size_of(TEXT, kind, "float16") // (2 if kind.endswith("dedup") else 1)
        size = round(tokens * token_bytes(TEXT[1], kind, "float16")) if is_ragged(kind) else size
        error = cosine_error(states, kind, "float16")
        whole = f"{size + images}"
        print(f"{kind:15}{size:13}{size / full:11.2f}{whole:>36}{error['mean']:19.6f}{error['max']:14.6f}")
    print(f"dedup: where each caption is that of two samples; ragged: {tokens:.1f} of 77 tokens")


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    batch = int(options.get("batch", 64))
    root = Path(tempfile.mkdtemp(dir=options.get("folder")))
    rates: dict[str, list[float]] = {"ours": [], "StreamingDataset": []}
    try:
        write(root, int(options.get("samples", 3000)))
        for _ in range(int(options.get("rounds", 3))):
            rates["ours"].append(rate(ours(root, batch)))
            rates["StreamingDataset"].append(rate(theirs(root, batch)))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, values in rates.items():
        print(f"{name:18}{median(values):10.0f} samples/s")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"ours / StreamingDataset: {median(ratios):.1f}")
    if options.get("storage", "true") == "true":
        storage()


if __name__ == "__main__":
    main()
