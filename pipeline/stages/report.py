"""stage=report: write a self-contained page about everything in a data directory, with sample images."""

from __future__ import annotations

import base64
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader
from PIL import Image

from pipeline.config.cli import config_for, errors_as_one_line
from pipeline.config.schema import ConfigError, ReportConfig, dataset_name
from pipeline.imaging import transform
from pipeline.imaging.buckets import buckets_in, kept_fraction
from pipeline.partitions.bucket_index import NAME as BUCKETS
from pipeline.partitions.bucket_index import BucketIndex
from pipeline.partitions.dataset import Dataset, Released, SlotReader, Stored, find_datasets
from pipeline.partitions.finalize import records
from pipeline.registry import stages
from pipeline.samples import SampleError
from pipeline.samples.captions import sources_of
from pipeline.stages import report_scores as scores
from pipeline.storage import Folder
from pipeline.telemetry.efficiency import Efficiency, efficiency
from pipeline.telemetry.events import EventReader
from pipeline.telemetry.host_stats import Hosts, HostStatus

_LEDGERS = 50  # evenly spread partitions whose ledgers the histograms are computed from
_HOSTS = 20  # maximum number listed
_THUMBNAIL = 160  # pixels
_STRIPS = 10  # evaluations whose images are shown
_REASONS = 4  # reasons shown for each stage in the funnel
_EXAMPLES = 3  # samples shown for each reason
_LEVELS = ("loss_t1", "loss_t2", "loss_t3", "loss_t4")
_MEASURED = ("valid_loss", "valid_accuracy", "cider", "bleu_4", "rouge_l", "exact")
_INK = "#3b6ea5"


@stages.register("report", ReportConfig)
def main(config: ReportConfig) -> None:
    with errors_as_one_line():
        folder = Path(config.data_dir).absolute()
        if config.dataset:
            folder /= dataset_name(config.dataset)
        if not folder.is_dir():
            raise ConfigError(
                f"data_dir={config.data_dir}: no such folder" + (f" as {folder}" if config.dataset else "")
            )
        output = Path(config.output) if config.output else folder / "report.html"
        links = dict(pages_below(folder, output))
        output.write_text(page(folder, config.samples, config.gpu_hour_price, links), encoding="utf-8")
    print(f"report: {output}")


def pages_below(folder: Path, output: Path) -> Iterator[tuple[str, str]]:
    """Other pages about the content of ``folder``: (title, path relative to ``output``)."""
    patterns = {
        "evaluation": "runs/*/evaluation/evaluation.html",
        "captions": "*/gallery.html",
        "status": "status.html",
    }
    for what, pattern in patterns.items():
        for path in sorted({*folder.glob(pattern), *folder.glob(f"*/{pattern}")}):
            about = "" if what == "status" else f" of {path.parents[what == 'evaluation'].name}"
            yield f"{what}{about}", os.path.relpath(path, output.absolute().parent)


def page(folder: Path, samples: int, price: float = 0.0, links: Mapping[str, str] | None = None) -> str:
    """The HTML page about all dataset directories and training runs below ``folder``; ``price``: of a GPU hour."""
    environment = Environment(loader=PackageLoader("pipeline.stages", "templates"), autoescape=True)
    found = find_datasets(folder)
    filtered = {dataset.root.path.parent for dataset in found if dataset.stage == "filter"}
    datasets = [describe(d, samples, sheet=shows_images(d, filtered)) for d in found]
    widest = {d["path"].parent: 0 for d in datasets}
    for facts in datasets:
        widest[facts["path"].parent] = max(widest[facts["path"].parent], facts.get("counts", {}).get("in", 0))
    for facts in datasets:
        facts |= {"name": name_of(facts["path"], folder), "widest": widest[facts["path"].parent]}
        facts["why"] = [f"{reason} {number}" for outcome, reason, number in facts.get("reasons", [])[:_REASONS]]
    runs = [{**describe_run(run, price), "name": name_of(run, folder)} for run in find_runs(folder)]
    return environment.get_template("report.html").render(
        folder=folder, datasets=datasets, runs=runs, links=(links or {}).items(), made=time.strftime("%Y-%m-%d %H:%M")
    )


def name_of(path: Path, folder: Path) -> str:
    """``<dataset>/<split>/<stage>`` or ``<dataset>/runs/<name>``, with all folders between it and ``folder``, which may
    be the data directory or the dataset's own folder."""
    below = path.relative_to(folder)
    return str(below if len(below.parts) > 2 else path.relative_to(folder.parent))


# ---- training runs


def find_runs(folder: Path) -> list[Path]:
    """Folders of training runs below ``folder``."""
    return sorted(
        path.parent for pattern in ("runs/*", "*/runs/*", "*") for path in folder.glob(f"{pattern}/checkpoints")
    )


# ---- one dataset directory


def shows_images(dataset: Dataset, filtered: set[Path]) -> bool:
    """Whether the page has a contact sheet of this dataset: filtered samples, or shards if there are none."""
    return dataset.stage == "filter" or (dataset.stage == "shard" and dataset.root.path.parent not in filtered)


def describe(dataset: Dataset, samples: int, sheet: bool) -> dict[str, Any]:
    """What the page shows of a dataset directory."""
    facts: dict[str, Any] = {"path": dataset.root.path, "stage": dataset.stage, "partitions": dataset.partitions}
    facts["efficiency"] = _efficiency(dataset.root)
    success = dataset.success
    if success is None:
        committed = sum(dataset.root.exists(dataset.path_of(index)) for index in range(dataset.partitions))
        return {**facts, "state": f"unfinished: {committed} of {dataset.partitions} partitions committed"}
    counts = success["counts"]
    reasons = sorted(success["reasons"].items(), key=lambda item: -item[1])
    facts |= {
        "state": "finished; data removed, ledgers kept" if dataset.released else "finished",
        "counts": counts,
        "megabytes": counts["bytes"] / 1e6,
        "reasons": [(*name.split(":", 1), number) for name, number in reasons],
        "left_out": left_out(dataset),
        "digest": success["content_digest"],
        "settings": dataset.header["identity"],
    }
    if counts["dropped"] or counts["failed"]:
        facts["examples"] = list(not_kept(dataset))
    if dataset.header["upstream"] is None:
        facts["hosts"] = hosts(dataset)
    if dataset.stage == "filter":
        facts["histograms"] = size_histograms(dataset)
    if sheet and not dataset.released:
        facts["sheet"] = list(contact_sheet(dataset, samples))
    if dataset.stage == "score":
        facts |= score_facts(dataset)
    if dataset.stage == "select":
        facts["thresholds"] = dataset.header["extra"]["selection"]["thresholds"]
    if dataset.stage == "recaption":
        facts["captioning"] = captioning(dataset)
        facts["recaptioned"] = list(recaptioned(dataset, min(samples, 12)))
    if dataset.stage == "precompute":
        facts["latents"] = list(decoded_latents(dataset, min(samples, 12)))
        facts["buckets"] = list(bucket_facts(dataset))
    return facts


def score_facts(dataset: Dataset) -> dict[str, Any]:
    """What the page shows of scores: quantiles, histograms, correlations, and images along each score."""
    found = scores.read_scores(dataset, spread(dataset.partitions, _LEDGERS))
    place = Path(dataset.header["upstream"]["path"])
    images = Dataset.open(place) if (place / "plan").is_dir() else None
    strips = []
    for name, chosen in scores.examples(found):
        shown = []
        for quantile, position, value in chosen:
            partition = f"/{found.partitions[position]}"
            image = thumbnail(images, partition, found.keys[position]) if images else ""
            shown.append(
                {"at": f"{100 * quantile:g} %", "value": f"{value:.4g}", "image": image, "key": found.keys[position]}
            )
        strips.append((name, shown))
    return {
        "quantiles": list(scores.quantile_rows(found)),
        "common": list(scores.common_values(found)),
        "histograms": [
            _histogram(values[~np.isnan(values)], name)
            for name, values in found.numbers.items()
            if not np.isnan(values).all()
        ],
        "correlations": _heat_map(*scores.correlations(found)),
        "strips": strips,
        "shares": [f"{100 * quantile:g} %" for quantile in scores.QUANTILES],
    }


def captioning(dataset: Dataset) -> dict[str, float]:
    """Tokens, seconds and cost of writing captions, summed over all partitions, and the mean rate."""
    total: Counter[str] = Counter()
    for record in records(dataset):
        told = record["notes"].get("captioning", {})
        total.update({name: value for name, value in told.items() if name != "captions_per_second"})
    rate = {"captions_per_second_and_rank": total["captions"] / total["seconds"]} if total["seconds"] else {}
    return dict(total) | rate


def recaptioned(dataset: Dataset, most: int) -> Iterator[dict[str, Any]]:
    """Some images with all their captions and the captions' sources."""
    for _, stored in spread_samples(dataset, most):
        try:
            row = stored.read()
            image = transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits()))
        except (SampleError, transform.ImageError, ValueError, Released):
            continue  # listed among the failed samples, or removed on purpose
        captions = list(zip(sources_of(row), row["captions"], strict=True))
        yield {"key": stored.key, "captions": captions, "image": embed(image)}


def left_out(dataset: Dataset) -> list[tuple[str, int, str]]:
    """Files that look like data but are not samples: (reason, count, examples), most frequent first."""
    planned = dataset.header.get("left_out") or {}
    rows = [(reason, found["count"], ", ".join(found["examples"])) for reason, found in planned.items()]
    manifest = dataset.root.read_json("manifest.json") or {}
    for name in ("noted", "metadata_left_out"):
        rows += [(reason, count, "") for reason, count in manifest.get(name, {}).items()]
    return sorted(rows, key=lambda row: -row[1])


def spread(total: int, most: int) -> list[int]:
    """At most ``most`` evenly spread numbers of ``range(total)``."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(total, most))}) if total else []


def spread_samples(dataset: Dataset, most: int) -> Iterator[tuple[int, Stored]]:
    """Evenly spread kept samples with the indices of their partitions."""
    opened: dict[int, list[Stored]] = {}
    for position in spread(len(dataset), most):
        index = int(np.searchsorted(dataset.starts, position, "right")) - 1
        if index not in opened:
            opened = {index: SlotReader(dataset, index).stored()}
        yield index, opened[index][position - int(dataset.starts[index])]


def hosts(dataset: Dataset) -> list[HostStatus]:
    """Download statistics of the hosts with the most images, for samples fetched by URL."""
    found = Hosts()
    for index in spread(dataset.partitions, _LEDGERS):
        table = SlotReader(dataset, index).ledger(["outcome", "reason", "member"]).to_pydict()
        for outcome, reason, member in zip(table["outcome"], table["reason"], table["member"], strict=True):
            found.add(member or "", outcome, reason)
    return found.statuses(_HOSTS)


def not_kept(dataset: Dataset) -> Iterator[dict[str, str]]:
    """A few dropped or failed samples for each reason: their names, and the images that the stage received."""
    told: Counter[tuple[str, str]] = Counter()
    top = dataset.header["upstream"] is None
    before = (
        None
        if top or not Path(dataset.header["upstream"]["path"]).is_dir()
        else Dataset.open(dataset.header["upstream"]["path"])
    )
    for index in spread(dataset.partitions, _LEDGERS):
        columns = ["key", "container", "outcome", "reason", "detail", "source", "member"]
        for row in SlotReader(dataset, index).ledger(columns).to_pylist():
            reason = row["outcome"], row["reason"]
            if row["outcome"] == "kept" or told[reason] == _EXAMPLES:
                continue
            told[reason] += 1
            name = "/".join(filter(None, (row["source"], row["member"]))) if top else row["key"]
            why = ": ".join(filter(None, (row["reason"], row["detail"])))
            image = thumbnail(before, row["source"], row["key"]) if before and not row["container"] else ""
            yield {"name": name or row["key"], "outcome": row["outcome"], "why": why, "image": image}


def thumbnail(dataset: Dataset, partition: str, key: str) -> str:
    """The image of a sample of ``partition`` as a data URL; empty if it does not exist or cannot be decoded."""
    number = partition.rpartition("/")[2]
    if dataset.released or not number.isdigit() or int(number) >= dataset.partitions:
        return ""
    try:
        found = next((stored for stored in SlotReader(dataset, int(number)).stored() if stored.key == key), None)
        data = found.read().get("jpg") if found else None
        return embed(transform.decode(data, transform.probe(data, transform.Limits()))) if data else ""
    except (SampleError, transform.ImageError, ValueError, OSError):
        return ""  # may be the very reason why the sample failed


def size_histograms(dataset: Dataset) -> list[str]:
    """Distribution of the shorter edge and of the aspect ratio of kept samples, as images."""
    widths: list[int] = []
    heights: list[int] = []
    for index in spread(dataset.partitions, _LEDGERS):
        table = SlotReader(dataset, index).ledger(["outcome", "width", "height"]).to_pydict()
        for outcome, width, height in zip(table["outcome"], table["width"], table["height"], strict=True):
            if outcome == "kept" and width and height:
                widths.append(width)
                heights.append(height)
    if not widths:
        return []
    w, h = np.array(widths), np.array(heights)
    return [
        _histogram(np.minimum(w, h), "shorter edge (pixels)"),
        _histogram(w / h, "aspect ratio (width / height)"),
    ]


def bucket_facts(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """For each resolution with buckets: number of samples in each bucket, the fraction of image pixels cropped off
    (``cut``), and the fraction that square crops would have cut off (``square``)."""
    buckets = buckets_in(dataset.header["extra"])
    sources: list[tuple[int, int]] = []
    for index in spread(dataset.partitions, _LEDGERS) if buckets else ():
        table = SlotReader(dataset, index).ledger(["outcome", "height", "width"]).to_pydict()
        rows = zip(table["outcome"], table["height"], table["width"], strict=True)
        sources += [(height, width) for outcome, height, width in rows if outcome == "kept"]
    for column, each in buckets.items() if sources else ():
        there = BucketIndex.parse(dataset.root.read(BUCKETS), column)
        names = [f"{height} x {width}" for height, width in there.sizes]
        sizes = [each.size_of(*source) for source in sources]
        kept = [kept_fraction(source, size) for source, size in zip(sources, sizes, strict=True) if size]
        square = [kept_fraction(source, (1, 1)) for source in sources]
        yield {
            "column": column,
            "plot": _bars(names, there.counts()),
            "cut": 1 - float(np.mean(kept)),
            "square": 1 - float(np.mean(square)),
        }


def contact_sheet(dataset: Dataset, most: int) -> Iterator[dict[str, str]]:
    for _, stored in spread_samples(dataset, most):
        try:
            row = stored.read()
            image = transform.decode(row["jpg"], transform.probe(row["jpg"], transform.Limits()))
        except (SampleError, transform.ImageError, ValueError) as error:
            yield {"key": stored.key, "caption": f"cannot be shown: {error}", "image": ""}
            continue
        yield {"key": stored.key, "caption": row["caption"], "image": embed(image)}


def decoded_latents(dataset: Dataset, most: int) -> Iterator[dict[str, Any]]:
    """Decoded latents of the largest resolution, next to the images they were made from."""
    import torch

    from pipeline.encoders.base import autoencoder, to_pixels
    from pipeline.loading.latent_folder import Layout

    extra, seed = dataset.header["extra"], dataset.header["config"].get("seed", 0)
    name = max((n for n in extra["shapes"] if n.startswith("latents_")), key=lambda n: int(n.rpartition("_")[2]))
    vae = autoencoder(dataset.header["config"]["vae"])
    upstream = Dataset.open(dataset.header["upstream"]["path"])
    if upstream.released:
        return
    resolution, layout = int(name.rpartition("_")[2]), Layout.of(extra)
    sources: dict[int, dict[str, Stored]] = {}
    for index, stored in spread_samples(dataset, most):
        if index not in sources:
            sources = {index: {s.key: s for s in upstream.samples(dataset.partition(index).inputs[0].start)}}
        if stored.key not in sources[index]:  # its input has been rebuilt since
            continue
        row = stored.read()
        source = sources[index][stored.key].read()["jpg"]
        image = transform.decode(source, transform.probe(source, transform.Limits()))
        raw = torch.frombuffer(bytearray(row[name]), dtype=torch.uint8)[None]
        latent = layout.stored_image(raw, name, layout.size_in(row, name)).float()
        x = vae.preprocess_for(image, resolution, layout.buckets.get(name), seed, stored.key)
        with torch.inference_mode():
            original = to_pixels(x)[0]
            decoded = to_pixels(vae.decode(latent[:, : vae.channels]))[0]
        yield {
            "key": stored.key,
            "caption": row["caption"],
            "source": embed(original),
            "decoded": embed(decoded),
            "psnr": psnr(original, decoded),
        }


def psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; infinite if they are equal."""
    error = float(((a.astype(np.float64) - b) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


# ---- one training run


def describe_run(run: Path, price: float = 0.0) -> dict[str, Any]:
    """What the page shows of a training run: loss curve, cost, samples, evaluations."""
    facts: dict[str, Any] = {"path": run, "curve": "", "samples": [], "evaluation": None, "fidelity": None}
    facts["shown"] = list(shown_over_training(run))
    with Folder.open(run) as root:
        facts["efficiency"] = _efficiency(root)
    lines = list(training_log(run))
    if lines:
        facts["cost"] = cost(run, lines, price)
        facts["last"] = lines[-1]
        facts["curve"] = _curve(lines)
    facts["measured"] = [plot for name in _MEASURED if (plot := _measure(list(training_log(run, name)), name))]
    facts["levels"] = _levels(list(training_log(run, _LEVELS[0])))
    listing = run / "samples" / "samples.json"
    if listing.is_file():
        facts["samples"] = [
            {
                "caption": sample["prompt"],
                "image": embed(np.asarray(Image.open(listing.parent / sample["file"]).convert("RGB"))),
            }
            for sample in _varied(json.loads(listing.read_text())["samples"])[:48]
        ]
    for name in ("evaluation", "fidelity"):
        if (run / f"{name}.json").is_file():
            facts[name] = json.loads((run / f"{name}.json").read_text())
    return facts


def _efficiency(root: Folder) -> Efficiency | None:
    return efficiency(EventReader(root).refresh())


def _varied(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples reordered so that prompts alternate: the first of each prompt, then the second of each."""
    seen: Counter[str] = Counter()
    rounds = []
    for number, sample in enumerate(samples):
        rounds.append((seen[sample["prompt"]], number))
        seen[sample["prompt"]] += 1
    return [samples[number] for _, number in sorted(rounds)]


def cost(run: Path, lines: list[dict[str, Any]], price: float) -> dict[str, Any] | None:
    """Cost of all steps of a run at its measured speed: GPU hours over all ranks, and money."""
    checkpoints = sorted((run / "checkpoints").glob("step_*/checkpoint.json"))
    speeds = [line["samples_per_second"] for line in lines if line.get("samples_per_second")]
    if not checkpoints or not speeds:
        return None
    with Folder.open(checkpoints[-1].parent) as folder:
        facts = (folder.read_sealed(checkpoints[-1].name) or {})["facts"]
    samples = facts["config"]["steps"] * facts["config"]["batch_size"]
    speed = float(np.median(speeds))
    hours = facts["world_size"] * samples / speed / 3600
    return {"speed": speed, "ranks": facts["world_size"], "samples": samples, "hours": hours, "money": hours * price}


def shown_over_training(run: Path) -> Iterator[dict[str, str]]:
    """Images from evenly spread evaluations of a run, followed by the real ones."""
    strips = sorted((run / "shown").glob("step_*.png"))
    real = run / "shown" / "real.png"
    for path in [*(strips[i] for i in spread(len(strips), _STRIPS)), *([real] if real.is_file() else [])]:
        name = "as in the data" if path == real else f"step {int(path.stem.removeprefix('step_'))}"
        yield {"name": name, "image": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"}


def training_log(run: Path, number: str = "loss") -> Iterator[dict[str, Any]]:
    """Lines of a run's log that have the metric ``number``, by step; where lives overlap, the later one counts."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((run / "logs").glob("*.jsonl"), key=lambda p: p.stat().st_mtime):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line.get(number) is not None and "step" in line:
                steps[line["step"]] = line
    yield from (steps[step] for step in sorted(steps))


# ---- drawing


def embed(pixels: npt.NDArray[Any]) -> str:
    """A uint8 (h, w, 3) image as a data URL, downscaled to thumbnail size if it is larger."""
    image = Image.fromarray(pixels)
    if max(image.size) > _THUMBNAIL:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = BytesIO()
    small = max(image.size) < 100
    image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 2.4), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _histogram(values: npt.NDArray[Any], label: str) -> str:
    figure, axes = _figure()
    axes.hist(values, bins=30, color=_INK)
    axes.set_xlabel(label)
    axes.set_ylabel("samples")
    return _svg(figure)


def _bars(names: list[str], counts: npt.NDArray[Any]) -> str:
    figure, axes = _figure()
    axes.barh(names, counts, color=_INK)
    axes.set_xlabel("samples")
    axes.tick_params(axis="y", labelsize=7)
    return _svg(figure)


def _heat_map(names: list[str], matrix: npt.NDArray[np.float64]) -> str:
    """A correlation matrix as coloured squares with numbers; empty with fewer than two scores."""
    if len(names) < 2:
        return ""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    edge = 1.6 + 0.42 * len(names)
    figure, axes = pyplot.subplots(figsize=(edge, edge), layout="constrained")
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for row, column in np.argwhere(~np.isnan(matrix)).tolist():
        value = matrix[row, column]
        axes.text(column, row, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center", fontsize=7,
                  color="white" if abs(value) > 0.6 else "black")  # fmt: skip
    for side in axes.spines.values():
        side.set_visible(False)
    return _svg(figure)


def _curve(lines: list[dict[str, Any]]) -> str:
    figure, axes = _figure()
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color=_INK, linewidth=0.8, alpha=0.5)
    width = max(1, len(losses) // 25)
    if len(losses) > width:
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color=_INK, linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    return _svg(figure)


def _measure(lines: list[dict[str, Any]], name: str) -> str:
    """Plot of a validation metric over steps; empty if it was not measured."""
    if not lines:
        return ""
    figure, axes = _figure()
    axes.plot([line["step"] for line in lines], [line[name] for line in lines], color=_INK, marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    return _svg(figure)


def _levels(lines: list[dict[str, Any]]) -> str:
    """Plot of the loss at each quarter of the noise levels; empty if it was not measured."""
    if not lines:
        return ""
    figure, axes = _figure()
    for number, (name, label) in enumerate(zip(_LEVELS, ("least noise", "", "", "most noise"), strict=True)):
        steps, losses = [line["step"] for line in lines], [line[name] for line in lines]
        axes.plot(steps, losses, color=_INK, alpha=1 - number / 5, marker=".", linewidth=1.2)
        axes.annotate(label, (steps[-1], losses[-1]), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss by noise level")
    axes.set_ylim(bottom=0)
    return _svg(figure)


if __name__ == "__main__":
    main(config_for("report"))
