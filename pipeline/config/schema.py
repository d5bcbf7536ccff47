"""Every option of every stage, in one place: one frozen dataclass per stage.

A field is declared with :func:`pipeline.config.options.option`: its default, one line of help, its range, when it has
an effect, and whether it is part of the *identity* of the result. Two runs whose identity fields, inputs and stage
versions agree write the same bytes; ranks, workers, time-outs and paths never belong to it. How
``key=value`` becomes one of these is in :mod:`pipeline.config.cli`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote_plus, urlsplit

from pipeline.config.options import NEVER, Options, default_value
from pipeline.config.options import ConfigError as ConfigError
from pipeline.config.options import option as option

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s,'\"\]]+", re.IGNORECASE)
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"sig|hmac|token|secret|pass|pwd|credential|expire|policy|auth|amz|goog|session|hdn|(access|pair)[_-]?(key[_-]?)?id"
    r"|^(_nc_|q-)|^(o[he]|s[eprstv]|srt|spr|sip|sk[estv]|sk[ot]id|exp|jwt)$",
    re.IGNORECASE,
)  # parameters of URLs that grant access, or change with every signature
_KEY = re.compile(r"key", re.IGNORECASE)  # of parameters that may be a secret, or the name of what is meant


_SHAPES = "source=shapes"
_URL_LIST = "source=url_list"
_ARCHIVES = "source=http_archive|huggingface|webdataset|parquet|mds|ipc"
_FETCHED = "source=url_list|http_archive|huggingface|webdataset|parquet|mds|ipc|torchvision"
_DIFFUSE, _CLASSIFY, _CAPTION = "task=diffuse", "task=classify", "task=caption"
_AUGMENTED = "task=classify or task=caption and encoder"  # training decodes the images
_SLURM = "cluster=slurm"

FORMATS = ("mds", "tar", "parquet", "ipc", "memmap", "hdf5")
"""Storage formats that stage=shard writes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """What every stage that is launched as ranks takes."""

    dataset: str = option("", "a name in pipeline/conf/dataset (shapes, image_folder, ...) or a path to your own YAML")
    data_dir: str = option("", "root of everything: <data_dir>/<dataset>/<split>/<stage>[-<variant>]")
    split: str = option("train", "part of the data set: train, valid, test, ...")
    subset: str = option(
        "", "small: about 1 % of a published data set, for a first try; lies in <dataset>-<subset>", when="dataset"
    )
    input: str = option("", "folder to read, instead of the upstream stage's place below data_dir")
    output: str = option("", "folder to write, instead of the stage's place below data_dir")
    variant: str = option("", "suffix of the stage's folder, to keep several results side by side")
    seed: int = option(0, "all randomness is keyed by this and the sample's key", identity=True, ge=0)
    expect_world_size: int = option(0, "stop unless this many ranks were really started (0: any)", ge=0)
    rank_offset: int = option(0, "array jobs: added to the rank of this job's first task", ge=0)
    world_size: int = option(0, "array jobs: ranks of all elements together", ge=0)
    hang_timeout: float = option(
        1800.0, "seconds without progress after which a rank says where it is stuck and ends (0: never)", ge=0
    )
    run_id: str = option(
        "", "one text per submission, the same on all its ranks and lives (default: the launcher's own)"
    )


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Options):
    """What every stage with networks takes besides."""

    device: str = option(
        "auto",
        "auto: this rank's GPU, or the CPU where there is none (an error where GPUs were given but cannot be used); "
        "cpu; cuda",
        choices=("auto", "cpu", "cuda"),
    )


@dataclass(frozen=True, kw_only=True)
class StageConfig(RunConfig):
    """What every stage with partitions takes."""

    overwrite: bool = option(False, "move an existing output of this stage aside and start again")
    retry_failed: bool = option(False, "append a generation that tries the retryable failures again")
    compact: bool = option(
        False, "when it is finished, pack ledgers and records into few files: half the inodes, see stage=compact"
    )
    restore: bool = option(False, "make data again that keep_raw=false or keep=latents have removed")
    max_failed_fraction: float = option(
        0.1, "the stage fails if more than this fraction of its samples failed", ge=0, le=1
    )
    lease: float = option(60.0, "seconds after which a partition whose worker shows no life is taken over", gt=0)
    wait: float = option(0.0, "seconds to wait for an unfinished upstream before giving up", ge=0)


@dataclass(frozen=True, kw_only=True)
class SourceConfig(StageConfig):
    """Where samples come from."""

    source: str = option(
        "",
        "where samples come from: shapes, digits, image_folder, url_list, http_archive, huggingface, webdataset, "
        "parquet, ipc, mds, torchvision",
        identity=True,
    )
    partition_size: int = option(
        1000,
        "samples per partition (sources whose samples are known beforehand)",
        identity=True,
        ge=1,
        when="source=shapes|digits|image_folder|url_list",
    )
    copy: bool = option(
        False, "copy the files into the output instead of referring to them", identity=True, when="source=image_folder"
    )
    captions: str = option(
        "auto",
        "auto, txt, folder, none, or a file with captions (json, jsonl, csv, tsv, parquet)",
        identity=True,
        when="source=image_folder",
    )
    count: int = option(1000, "number of scenes", identity=True, ge=1, when=_SHAPES)
    questions: bool = option(False, "with questions and answers, for prompt=question", identity=True, when=_SHAPES)
    image_size: int = option(64, "edge of the square images, in pixels", identity=True, ge=1, le=4096, when=_SHAPES)
    objects: int = option(1, "objects in a scene, 1 or 2 (0: both kinds)", identity=True, ge=0, le=2, when=_SHAPES)
    holdout: bool = option(
        True,
        "leave out a fixed list of colour-shape pairs, to test new combinations",
        identity=True,
        when=_SHAPES,
    )
    urls: tuple[str, ...] = option(
        (),
        "http_archive, webdataset, parquet, ipc, mds: URLs of such files, {000..199} being a range; "
        "url_list: URLs of lists",
        identity=True,
        when="source=url_list|http_archive|webdataset|parquet|mds|ipc|torchvision",
    )
    sha256: tuple[str, ...] = option(
        (), "expected hashes, in the order of urls (empty: not known)", identity=True, when="source=http_archive"
    )
    fraction: float = option(
        1.0,
        "take only the first files, or rows of a list, as this fraction of them",
        identity=True,
        gt=0,
        le=1,
        when=_FETCHED,
    )
    repo: str = option("", "the data set's repository, as owner/name", identity=True, when="source=huggingface")
    revision: str = option(
        "main", "branch, tag or commit; recorded as a commit", identity=True, when="source=huggingface"
    )
    mirror: str = option(
        "", "folder with the publisher's files, which are taken from there and not from the network", when=_FETCHED
    )
    files: tuple[str, ...] = option(
        (),
        "files to take, as paths with * and ranges like {000..199}",
        identity=True,
        when="source=huggingface|torchvision",
    )
    metadata: tuple[str, ...] = option(
        (),
        "files that hold captions and fields: URLs, paths, or paths in the repository",
        identity=True,
        when=_ARCHIVES,
    )
    annotations: str = option(
        "",
        "how they are laid out: jdb, diffusiondb, coco, textcaps, flickr30k, texts; or caltech256, folders",
        identity=True,
        when=_ARCHIVES,
    )
    metadata_member: str = option("", "which member of a metadata archive to read", identity=True, when="metadata")
    metadata_split: str = option(
        "", "which split to take of metadata that hold several", identity=True, when="metadata"
    )
    listed_only: bool = option(
        False, "leave out images that the metadata do not list", identity=True, when="annotations"
    )
    labels: bool = option(
        False,
        "take the label from .cls files, or from the label column",
        identity=True,
        when=_ARCHIVES,
    )
    max_nsfw: float = option(
        0.2,
        "drop images with a higher score for image or prompt",
        identity=True,
        ge=0,
        le=2,
        when="annotations=diffusiondb",
    )
    url_column: str = option("", "name or number of the column with URLs (default: url)", identity=True, when=_URL_LIST)
    caption_column: str = option(
        "",
        "column with one or several captions (default: caption, text, ...)",
        identity=True,
        when="source=url_list|http_archive|huggingface|webdataset|parquet|mds|ipc",
    )
    image_column: str = option(
        "",
        "column with the images (default: image, jpg, ...)",
        identity=True,
        when=_ARCHIVES,
    )
    hash_column: str = option("", "column with an MD5, SHA-1 or SHA-256 to check", identity=True, when=_URL_LIST)
    columns: tuple[str, ...] = option(
        (),
        "url_list, parquet: further columns to keep in meta; archives: fields of .json files (none: all)",
        identity=True,
        when="source=url_list|http_archive|huggingface|webdataset|parquet|mds|ipc",
    )
    split_column: str = option("", "column that tells the split", identity=True, when=_URL_LIST)
    split_values: tuple[str, ...] = option(
        (), "its values in this split", identity=True, when="source=url_list and split_column"
    )
    expected_gb: float = option(
        0.0,
        "about so much is to come, where no server says it before (0: not known)",
        ge=0,
        when=_FETCHED,
    )
    check_space: bool = option(
        True,
        "stop before what is to come does not fit on the disk",
        when=_FETCHED,
    )
    max_archive_bytes: int = option(
        2**40,
        "larger files are refused",
        ge=1,
        when=_FETCHED,
    )
    max_members: int = option(
        2_000_000,
        "an archive with more members is refused",
        ge=1,
        when="source=http_archive|huggingface|webdataset|parquet|mds|ipc|torchvision",
    )
    max_member_bytes: int = option(
        2**30,
        "a member or file larger than this is failed:too_many_bytes",
        identity=True,
        ge=1,
        when="source!=shapes|digits",
    )
    timeout: float = option(
        0.0,
        "seconds with (almost) no byte (0: 60 for archives, 10 for images)",
        ge=0,
        when=_FETCHED,
    )
    deadline: float = option(
        0.0,
        "seconds that one file may take, all tries and redirects together (0: a day; images: 60)",
        ge=0,
        when=_FETCHED,
    )
    retries: int = option(
        3,
        "tries after the first, with exponential backoff",
        ge=0,
        le=1000,
        when=_FETCHED,
    )
    connections: int = option(512, "requests at a time, of each rank", ge=1, le=65536, when=_URL_LIST)
    per_host: int = option(8, "requests at a time at one host, of each rank", ge=1, le=65536, when=_URL_LIST)
    per_second: float = option(0.0, "requests a second at one host, of each rank (0: any number)", ge=0, when=_URL_LIST)
    contact: str = option(
        "",
        "a URL or e-mail address for the User-Agent, so that servers know whom to tell",
        when=_FETCHED,
    )
    robots_txt: bool = option(False, "ask hosts for their robots.txt, and heed it", identity=True, when=_URL_LIST)
    opt_outs: tuple[str, ...] = option(
        ("noai", "noimageai", "noindex", "noimageindex"),
        "drop images whose X-Robots-Tag says one of these",
        identity=True,
        when=_URL_LIST,
    )
    allow_private_hosts: bool = option(
        False,
        "allow addresses that are not globally routable",
        when=_FETCHED,
    )


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(SourceConfig):
    """stage=download: bring a data set's samples under data_dir, each with its key, captions and content hash."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig(SourceConfig):
    """stage=filter: every image becomes an upright RGB image of a bounded size, or a ledger row that says why not."""

    inherited: ClassVar = {"SourceConfig": "fuse=true"}

    fuse: bool = option(
        False, "take the samples from their source as they arrive; no stage=download, no raw data", identity=True
    )

    keep_raw: bool = option(
        True,
        "false: when the result is verified, remove what stage=download has stored, but for its ledgers",
        when="fuse=false",
    )
    min_image_size: int = option(256, "drop images whose smaller edge is below this", identity=True, ge=0)
    max_image_size: int = option(
        512,
        "bring larger images down to this, in the way of resize_mode (0: keep sizes)",
        identity=True,
        ge=0,
        le=65535,
    )
    resize_mode: str = option(
        "keep_ratio",
        "keep_ratio: the smaller edge counts; keep_ratio_largest: the larger; center_crop, border: squares; no",
        identity=True,
        choices=("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"),
    )
    max_image_area: int = option(0, "drop images of more pixels than this (0: any)", identity=True, ge=0)
    max_aspect_ratio: float = option(
        0.0, "drop images whose edges differ by more than this (0: any)", identity=True, ge=1, also=(0,)
    )
    encode_format: str = option(
        "jpg",
        "of images that had to change; auto: png if the original is lossless, else jpg",
        identity=True,
        choices=("jpg", "png", "webp", "auto"),
    )
    encode_quality: int = option(
        95,
        "JPEG and WebP quality of images that had to change",
        identity=True,
        ge=1,
        le=100,
        when="encode_format=jpg|webp|auto",
    )
    skip_reencode: bool = option(True, "images that need no change keep their bytes", identity=True)
    validate: str = option(
        "full",
        "images that keep their bytes are decoded once (full) or not",
        identity=True,
        choices=("full", "header"),
        when="skip_reencode=true",
    )
    background: str = option("white", "colour under transparent pixels and of borders: name or #rrggbb", identity=True)
    icc: str = option(
        "srgb", "convert colours by the embedded profile, or ignore it", identity=True, choices=("srgb", "ignore")
    )
    upscale: bool = option(
        False,
        "enlarge smaller images to max_image_size, too (min_image_size drops them before)",
        identity=True,
        when="resize_mode!=no and max_image_size",
    )
    interpolation: str = option(
        "bicubic",
        "how pixels are computed when sizes change; area: means of boxes",
        identity=True,
        choices=("bicubic", "lanczos", "bilinear", "area"),
        when="resize_mode!=no and max_image_size",
    )
    resize: str = option(
        "fast",
        "which implementation; simd: pillow-simd, where it replaces Pillow",
        identity=True,
        choices=("fast", "pillow", "simd"),
    )
    max_pixels: int = option(
        100_000_000, "refuse images that claim more pixels than this, before decoding", identity=True, ge=1
    )
    max_frames: int = option(10_000, "refuse animations that claim more frames than this", identity=True, ge=1)
    max_caption_length: int = option(4096, "captions are cut to this many characters", identity=True, ge=1)
    min_caption_length: int = option(0, "captions of fewer characters are left out", identity=True, ge=0)
    caption_checks: tuple[str, ...] = option(
        (),
        "captions to leave out: [empty,url,repetitive]; a sample without any other is dropped",
        identity=True,
        choices=("empty", "url", "repetitive"),
    )
    scores: tuple[str, ...] = option(
        (), "drop samples whose columns do not meet these, as [nsfw<0.5,aesthetic>=5]", identity=True
    )
    keep_keys: str = option("", "file of keys (text, table, parquet or .npy): drop all other samples", identity=True)
    deny_keys: str = option("", "file of keys (text, table, parquet or .npy): drop these samples", identity=True)
    key_column: str = option(
        "",
        "the column or field that these files list, as uid or url (default: key)",
        identity=True,
        when="keep_keys or deny_keys",
    )
    workers: str = option(
        "auto",
        "processes of each rank for images (auto: its CPUs; 0: the rank itself, unprotected)",
        choices=("auto",),
        ge=0,
        le=1024,
    )
    decode_timeout: float = option(
        60.0, "seconds that one image may take; then it is failed:decoder_timeout", gt=0, when="workers!=0"
    )
    worker_memory: int = option(
        2048,
        "MiB that a worker may take for an image; more is failed:out_of_memory (0: any)",
        ge=256,
        also=(0,),
        when="workers!=0",
    )


@dataclass(frozen=True, kw_only=True)
class DedupConfig(StageConfig):
    """stage=dedup: of images that are the same, or nearly so, one stays; optional, between filter and shard."""

    hamming: int = option(
        20,
        "images are near duplicates if at most this many of their 128 bits differ (-1: only exact)",
        identity=True,
        ge=-1,
        le=128,
    )
    memory: int = option(1024, "MiB that a rank may take for the hashes of samples", ge=1)


@dataclass(frozen=True, kw_only=True)
class ShardConfig(StageConfig):
    """stage=shard: cut the kept samples, or a folder of images, into even partitions of a storage format."""

    format: str = option("mds", "storage format", identity=True, choices=FORMATS)
    shuffle: bool = option(False, "shuffle the whole data set by a permutation keyed by the seed", identity=True)
    partition_size: int = option(0, "samples per partition (0: a 32nd of the data, 32 to 256 MiB)", identity=True, ge=0)
    shard_bytes: int = option(
        2**26,
        "largest size of one data file (tar: one file for each partition)",
        identity=True,
        ge=1,
        le=2**32 - 1,
        when="format!=tar",
    )
    shape: tuple[int, ...] = option(
        (),
        "bring images to [height,width]; masks by their nearest pixel",
        identity=True,
        ge=1,
        le=65535,
        lengths=(0, 2),
    )
    im_mode: str = option(
        "",
        "bring images to this mode: RGB, L, RGBA, LA or I;16",
        identity=True,
        choices=("", "RGB", "L", "RGBA", "LA", "I;16"),
    )
    encode: str = option(
        "", "encode images anew (empty: their bytes as they are)", identity=True, choices=("", "png", "jpeg", "webp")
    )
    quality: int = option(
        95, "quality of the images that are encoded", identity=True, ge=1, le=100, when="encode=jpeg|webp"
    )
    compression: str = option("", "compress each image", identity=True, choices=("", "gzip"), when="format=hdf5")
    captions: str = option(
        "none", "folders of images: auto, txt, folder, none, or a captions .json/.jsonl/.csv file", identity=True
    )
    labels: str = option("", "folders of images: file of image names and classes, where no folder tells", identity=True)
    classes: str = option(
        "", "folders of images: class names in order: a converted dataset, a folder, a .json or .txt", identity=True
    )


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(DeviceConfig, StageConfig):
    """stage=precompute: image latents at each resolution and text-encoder states, as MDS."""

    vae: str = option(
        "embedded",
        "embedded, embedded16, or an AutoencoderKL or AutoencoderDC of diffusers: owner/name[@revision] or a folder",
        identity=True,
    )
    text_encoder: tuple[str, ...] = option(
        ("embedded",),
        "embedded, openclip:<model>[:<pretrained>], clip:<repo or folder>, t5:<repo or folder>[#length=256,mask=true]; "
        "the first one's states are caption_latents, of further ones caption_latents_2, ...; CLIPs take "
        "#layer=penultimate; <pipeline>/text_encoder_2 is a pipeline's second one",
        identity=True,
    )
    pooled: bool = option(
        False, "store pooled text embeddings, too, as caption_pooled, caption_pooled_2, ... (CLIPs)", identity=True
    )
    image_encoder: str = option(
        "",
        "store an image_embedding too: embedded, openclip:<model>[:<pretrained>] or clip:<repo or folder>",
        identity=True,
    )
    image_resolutions: tuple[int, ...] = option(
        (256, 512), "edges of the square crops to encode", identity=True, ge=1, le=65536
    )
    batch_size: str = option(
        "32", "images per forward pass; auto: as many as make a GPU fastest", identity=True, choices=("auto",), ge=1
    )
    latent: str = option(
        "sample",
        "take the posterior's sample, its mode, or its moments (mean and deviation: training draws samples of them)",
        identity=True,
        choices=("sample", "mode", "moments"),
    )
    text_storage: str = option(
        "dense",
        "text states as they are, one copy per distinct caption of a partition, or in 8 bits with a scale per token",
        identity=True,
        choices=("dense", "dedup", "int8", "fp8", "int8+dedup", "fp8+dedup"),
    )
    model_dtype: str = option(
        "bfloat16",
        "precision of the text and image encoders on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
    )
    vae_dtype: str = option(
        "float32",
        "precision of the autoencoder on a GPU (float32: with TF32; bfloat16 is faster and costs 1 to 3 % of a latent)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
        when="vae!=embedded|embedded16",
    )
    save_dtype: str = option(
        "float16", "precision of the stored latents", identity=True, choices=("float16", "float32")
    )
    save_images: bool = option(False, "store the image bytes beside the latents", identity=True)
    shard_bytes: int = option(2**26, "largest size of one data file", identity=True, ge=1, le=2**32 - 1)
    threads: int = option(
        1, "CPU threads per rank (results depend on it in the last bit)", identity=True, ge=1, le=1024
    )
    workers: int = option(
        -1, "decoding processes per rank (-1: none on a CPU, else its CPUs without one)", ge=-1, le=1024
    )
    keep: str = option(
        "all",
        "latents: when they are verified, remove the data of the stages before, but for their ledgers",
        choices=("all", "latents"),
    )
    compile: bool = option(False, "compile the networks with torch.compile", identity=True)
    gpu_hour_price: float = option(
        0.0, "what a GPU hour costs: the events then tell the cost of a million images", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(DeviceConfig, StageConfig):
    """stage=features: a frozen encoder's features of each image, for task=caption, as MDS."""

    encoder: str = option(
        "embedded",
        "embedded, vit:<repo or folder>, clip:<repo or folder>, or openclip:<model>[:<pretrained>]",
        identity=True,
    )
    features: str = option(
        "patch", "all tokens of its last layer, or the one for the image", identity=True, choices=("patch", "pooled")
    )
    batch_size: int = option(32, "images per forward pass", identity=True, ge=1)
    model_dtype: str = option(
        "bfloat16",
        "precision of the encoder on a GPU (CPUs use float32)",
        identity=True,
        choices=("float32", "float16", "bfloat16"),
    )
    save_dtype: str = option("float16", "precision of what is stored", identity=True, choices=("float16", "float32"))
    shard_bytes: int = option(2**26, "largest size of one data file", identity=True, ge=1, le=2**32 - 1)
    threads: int = option(
        1, "CPU threads per rank (results depend on it in the last bit)", identity=True, ge=1, le=1024
    )
    workers: int = option(
        -1, "decoding processes per rank (-1: none on a CPU, else its CPUs without one)", ge=-1, le=1024
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DeviceConfig, RunConfig):
    """stage=train: fit a model to a data set; goes on from the last checkpoint of its run folder."""

    inherited: ClassVar = {"variant": NEVER}

    task: str = option("diffuse", "what to learn", identity=True, choices=("diffuse", "classify", "caption"))
    name: str = option("", "name of the run folder (default: <task>)")
    model: str = option("nano", "size of the network", identity=True)
    steps: int = option(1000, "optimizer steps", identity=True, ge=1)
    epochs: float = option(0.0, "passes over the data, in place of steps= (0: steps counts)", identity=True, ge=0)
    batch_size: int = option(32, "samples per step, over all ranks", identity=True, ge=1)
    micro_batch: int = option(
        0,
        "samples per forward pass of a rank, to save memory (0: all at once; on a CPU as many as fit its caches)",
        ge=0,
    )
    workers: int = option(
        -1,
        "processes per rank that prepare batches ahead (-1: none on a CPU; for a GPU its CPUs but one, 8 at most)",
        ge=-1,
        le=1024,
    )
    lr: float = option(3e-3, "peak learning rate", identity=True, gt=0)
    warmup_steps: int = option(100, "steps of linear warm-up", identity=True, ge=0)
    schedule: str = option(
        "cosine",
        "learning rate after the warm-up",
        identity=True,
        choices=("cosine", "constant", "step", "plateau", "wsd"),
    )
    min_lr: float = option(
        0.0, "the learning rate never falls below this", identity=True, ge=0, when="schedule!=constant"
    )
    lr_factor: float = option(
        0.1,
        "each reduction multiplies the learning rate by this",
        identity=True,
        gt=0,
        le=1,
        when="schedule=step|plateau",
    )
    lr_step: float = option(
        0.3,
        "step: a reduction after every such fraction of the way; wsd: the decay's fraction",
        identity=True,
        gt=0,
        le=1,
        when="schedule=step|wsd",
    )
    lr_patience: int = option(
        5, "evaluations without gain before a reduction", identity=True, ge=1, when="schedule=plateau"
    )
    beta2: float = option(0.99, "AdamW: decay of the squared gradients' average", identity=True, ge=0, lt=1)
    weight_decay: float = option(0.01, "AdamW weight decay", identity=True, ge=0)
    clip_norm: float = option(1.0, "gradient norm is clipped to this", identity=True, gt=0)
    max_skipped: int = option(
        10, "steps in a row whose loss may be NaN or infinite (they are left out)", identity=True, ge=0
    )
    ema_decay: float = option(
        0.995, "decay of the averaged weights used for sampling and evaluation", identity=True, ge=0, lt=1
    )
    precision: str = option(
        "auto",
        "of activations; parameters are float32; auto: bfloat16 on a GPU, with TF32 for what stays in float32; float32 "
        "on a CPU",
        identity=True,
        choices=("auto", "float32", "tf32", "bfloat16"),
    )
    parallel: str = option(
        "ddp",
        "ddp: every rank has the whole model; fsdp: it is spread over the ranks; hsdp: over those of a node",
        choices=("ddp", "fsdp", "hsdp"),
    )
    reshard_after_forward: bool = option(
        True,
        "false keeps gathered parameters until the backward pass: faster, and more memory",
        when="parallel=fsdp|hsdp",
    )
    checkpoint_activations: bool = option(
        False, "compute activations again in the backward pass: a third more work, and far less memory"
    )
    deterministic: bool = option(False, "only operations that give the same bits each time; slower, on a GPU")
    profile: int = option(0, "steps that torch's profiler records on rank 0, into profile/ of the run (0: none)", ge=0)
    compile: bool = option(False, "compile the model block by block (torch.compile)")
    valid_fraction: float = option(
        0.0,
        "fraction of the training set that is kept out, to tell which checkpoint is best",
        identity=True,
        ge=0,
        lt=1,
    )
    valid_input: str = option("", "dataset directory that is kept for this, in place of valid_fraction=", when=_CAPTION)
    split_file: str = option(
        "",
        "JSON, CSV or TSV that says which images are train, valid and test, by file name",
        identity=True,
        when=_CAPTION,
    )
    evaluate_every: int = option(0, "steps between evaluations on it (0: at the end only)", identity=True, ge=0)
    early_stop: int = option(0, "stop after so many evaluations without gain (0: never)", identity=True, ge=0)
    show: int = option(0, "so many images are drawn at each evaluation, for the report", ge=0, le=1000, when=_DIFFUSE)
    caption_drop: float = option(
        0.1, "fraction of captions hidden, for classifier-free guidance", identity=True, ge=0, le=1, when=_DIFFUSE
    )
    process: str = option(
        "flow", "rectified flow, or EDM preconditioning", identity=True, choices=("flow", "edm"), when=_DIFFUSE
    )
    noise_mean: float = option(
        0.7,
        "mean of the noise level's logit (flow) or logarithm (edm: -0.6 is usual)",
        identity=True,
        ge=-20,
        le=20,
        when=_DIFFUSE,
    )
    noise_std: float = option(1.0, "its deviation (edm: 1.2 is usual)", identity=True, gt=0, when=_DIFFUSE)
    sigma_data: float = option(0.9, "deviation of the data", identity=True, gt=0, when="task=diffuse and process=edm")
    mask_ratio: float = option(
        0.0, "fraction of tokens that the backbone does not see", identity=True, ge=0, lt=1, when=_DIFFUSE
    )
    start_from: str = option(
        "",
        "run folder, checkpoint, or name of the data set's run whose averaged weights come first",
        when="task=diffuse|caption",
    )
    vae: str = option(
        "", "latents without a manifest: what made them, as stage=precompute takes it", identity=True, when=_DIFFUSE
    )
    text_encoder: str = option(
        "", "latents without a manifest: what made their text states", identity=True, when=_DIFFUSE
    )
    caption_shape: tuple[int, ...] = option(
        (),
        "latents without a manifest: length and width of their text states (default: 77 tokens)",
        identity=True,
        ge=1,
        lengths=(0, 2),
        when=_DIFFUSE,
    )
    latent_shape: tuple[int, ...] = option(
        (),
        "latents without a manifest: channels, height and width (default: an eighth of the resolution)",
        identity=True,
        ge=1,
        lengths=(0, 3),
        when=_DIFFUSE,
    )
    latent_dtype: str = option(
        "",
        "latents without a manifest: as what they are stored (default: float16)",
        identity=True,
        choices=("", "float16", "float32"),
        when=_DIFFUSE,
    )
    mix: tuple[str, ...] = option(
        (),
        "more latents to train on, as <folder>*<weight>; those of input= have weight 1",
        identity=True,
        when=_DIFFUSE,
    )
    recipe: str = option("", "settings by a name in pipeline/conf/recipe, or by your own YAML")
    phase: str = option("", "which phase of the recipe to train; it starts from the one before", when="recipe")
    resolution: int = option(
        0,
        "diffuse: which latents_<resolution> to learn (0: the smallest); classify: edge of the model's input",
        identity=True,
        ge=0,
        le=65536,
        when="task=diffuse|classify",
    )
    classes: int = option(0, "number of classes (0: as the labels tell)", identity=True, ge=0, when=_CLASSIFY)
    blocks: str = option(
        "", "kinds of blocks, repeated: ssm, attention, hybrid, or a list", identity=True, when=_CLASSIFY
    )
    mixer: str = option("", "mamba2 (default) or mamba1", identity=True, when=_CLASSIFY)
    scan_backend: str = option(
        "auto", "kernels of the scan; auto: mamba_ssm where it really works", choices=("auto", "torch", "mamba_ssm")
    )
    patch: int = option(
        0, "edge of a patch (0: as the model has it; so in what follows)", identity=True, ge=0, when=_CLASSIFY
    )
    stem: str = option("", "patch, or conv for small images", identity=True, when=_CLASSIFY)
    pool: str = option("", "mean, or a class token", identity=True, when=_CLASSIFY)
    depth: int = option(0, "number of blocks", identity=True, ge=0, le=10000, when=_CLASSIFY)
    heads: int = option(0, "of attention", identity=True, ge=0, when=_CLASSIFY)
    d_state: int = option(0, "states of a channel", identity=True, ge=0, when=_CLASSIFY)
    d_conv: int = option(0, "taps of the convolution before the scan", identity=True, ge=0, when=_CLASSIFY)
    expand: int = option(0, "inner width of the scan, in widths of the model", identity=True, ge=0, when=_CLASSIFY)
    mlp_ratio: float = option(0.0, "width of the MLP after each mixer (0: none)", identity=True, ge=0, when=_CLASSIFY)
    dropout: float = option(0.0, "dropout", identity=True, ge=0, lt=1, when="task=classify|caption")
    drop_path: float = option(
        0.0, "drop-path of the last block; it rises from 0", identity=True, ge=0, lt=1, when=_CLASSIFY
    )
    enlarge: float = option(
        1.0,
        "images are read at so many times the resolution, and cropped from that",
        identity=True,
        ge=1,
        le=16,
        when=_CLASSIFY,
    )
    crop_scale: float = option(
        1.0,
        "random crops take this fraction of the area at least",
        identity=True,
        gt=0,
        le=1,
        when=_AUGMENTED,
    )
    shift: float = option(
        0.0,
        "images are shifted by up to so many pixels",
        identity=True,
        ge=0,
        when=_AUGMENTED,
    )
    flip: float = option(
        0.0,
        "probability of mirroring left and right",
        identity=True,
        ge=0,
        le=1,
        when=_AUGMENTED,
    )
    rotate: float = option(
        0.0,
        "images are turned by up to so many degrees",
        identity=True,
        ge=0,
        le=180,
        when=_AUGMENTED,
    )
    shear: float = option(0.0, "images are sheared by up to this", identity=True, ge=0, when=_AUGMENTED)
    randaugment: int = option(
        0,
        "operations of RandAugment on each image",
        identity=True,
        ge=0,
        le=100,
        when=_AUGMENTED,
    )
    randaugment_magnitude: float = option(
        9.0,
        "their strength, 0 to 10",
        identity=True,
        ge=0,
        le=10,
        when="task=classify and randaugment or task=caption and encoder and randaugment",
    )
    mixup: float = option(0.0, "alpha of mixup (0: none)", identity=True, ge=0, when=_CLASSIFY)
    cutmix: float = option(
        0.0, "alpha of cutmix (0: none); with mixup, one of both", identity=True, ge=0, when=_CLASSIFY
    )
    mix_probability: float = option(
        1.0,
        "fraction of samples that are mixed, if any",
        identity=True,
        ge=0,
        le=1,
        when="task=classify and mixup or task=classify and cutmix",
    )
    erase: float = option(
        0.0,
        "probability of random erasing",
        identity=True,
        ge=0,
        le=1,
        when=_AUGMENTED,
    )
    label_smoothing: float = option(
        0.0,
        "share of the target spread over all classes or tokens",
        identity=True,
        ge=0,
        lt=1,
        when="task=classify|caption",
    )
    decoder: str = option(
        "transformer", "what writes the texts", identity=True, choices=("transformer", "mamba"), when=_CAPTION
    )
    objective: str = option(
        "likelihood",
        "what is raised: likelihood of the texts; cider: CIDEr-D of texts that are drawn (self-critical)",
        identity=True,
        choices=("likelihood", "cider"),
        when=_CAPTION,
    )
    draws: int = option(
        5, "captions drawn for each image", identity=True, ge=2, when="task=caption and objective=cider"
    )
    positions: str = option(
        "learned",
        "positions of the transformer",
        identity=True,
        choices=("learned", "rotary"),
        when="task=caption and decoder=transformer",
    )
    prompt: str = option(
        "none",
        "question: answer the samples' questions",
        identity=True,
        choices=("none", "question"),
        when=_CAPTION,
    )
    encoder: str = option(
        "",
        "encode images while training with this encoder, not from stage=features",
        identity=True,
        when=_CAPTION,
    )
    features: str = option("patch", "as in stage=features", identity=True, when="task=caption and encoder")
    tokenizer: str = option(
        "bpe",
        "bpe (learned from the captions), or a pretrained one: repo or folder",
        identity=True,
        when=_CAPTION,
    )
    vocab_size: int = option(
        8000, "tokens of a learned tokenizer, at most", identity=True, ge=1, when="task=caption and tokenizer=bpe"
    )
    max_length: int = option(
        64, "tokens of a text, with its begin, end and question", identity=True, ge=4, when=_CAPTION
    )
    checkpoint_every: int = option(500, "steps between checkpoints", ge=1)
    keep_checkpoints: int = option(2, "older checkpoints are deleted, but for the best one (0: keep all)", ge=0)
    export_every: int = option(
        0, "epochs after which the model is validated and exported by epoch and loss (0: never)", identity=True, ge=0
    )
    keep_exports: int = option(
        3, "older ones are deleted, but for the best one (0: keep all)", ge=0, when="export_every"
    )
    save_in_background: bool = option(True, "write checkpoints while training goes on")
    log_every: int = option(20, "steps between log lines", ge=1)
    loggers: tuple[str, ...] = option(
        (), "besides the JSON lines: tensorboard, wandb", choices=("tensorboard", "wandb")
    )
    wandb_project: str = option("latentmill", "project", when="loggers=wandb")
    hub_repo: str = option("", "Hugging Face Hub: upload each export to this repository")
    threads: int = option(0, "CPU threads per rank (0: all cores shared by the ranks of a node)", ge=0, le=1024)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DeviceConfig, StageConfig):
    """stage=generate: draw images for prompts with a trained run; with output=, any number of them by any ranks."""

    inherited: ClassVar = {"StageConfig": "output", "variant": NEVER}

    checkpoint: str = option("", "run folder, or one checkpoint in it (default: the data set's run)")
    name: str = option("", "name of the run folder, as in stage=train", when="!checkpoint")
    prompts: tuple[str, ...] = option(
        (), "captions to draw, or one path of a text file with a prompt a line", identity=True
    )
    images_per_prompt: int = option(1, "images of each prompt, from different noise", identity=True, ge=1)
    seeds: tuple[int, ...] = option(
        (),
        "one picture of each prompt from each of these, the same whatever else is drawn; in place of seed= and "
        "images_per_prompt=",
        identity=True,
        ge=0,
    )
    vae: str = option(
        "", "decode with this autoencoder, whose latents are alike, in place of the one trained with", identity=True
    )
    sampler: str = option("euler", "how noise becomes an image", identity=True, choices=("euler", "heun", "dpm++"))
    steps: int = option(20, "steps of the sampler", identity=True, ge=1)
    guidance: float = option(1.5, "classifier-free guidance scale (1: none)", identity=True, ge=0)
    precision: str = option(
        "bfloat16", "of the network on a GPU (CPUs use float32)", identity=True, choices=("float32", "bfloat16")
    )
    batch_size: int = option(32, "images drawn at a time", identity=True, ge=1, when="output")
    partition_size: int = option(256, "images in a partition", identity=True, ge=1, when="output")
    threads: int = option(
        0, "CPU threads (0: all cores; with output= results depend on it in the last bit)", ge=0, le=1024
    )


@dataclass(frozen=True, kw_only=True)
class CostConfig(Options):
    """stage=cost: what training by a recipe takes: steps, tokens, memory, GPU hours, money. Trains nothing."""

    recipe: str = option("microdit", "a name in pipeline/conf/recipe, or your own YAML")
    phase: str = option("", "only this phase")
    channels: int = option(4, "of the image latents", ge=1)
    downsample: int = option(8, "pixels per latent", ge=1)
    caption_shape: tuple[int, ...] = option((77, 1024), "length and width of the text states", ge=1, lengths=(2,))
    gpu: str = option("h100", "kind of GPU, for its peak", choices=("a100", "h100", "h200", "b200"))
    gpus: int = option(8, "how many", ge=1)
    mfu: float = option(
        0.2,
        "part of the GPUs' peak in bfloat16 that training reaches, where nothing was measured",
        gt=0,
        le=1,
        when="!images_per_second",
    )
    images_per_second: tuple[float, ...] = option(
        (), "measured training speed of one GPU in each phase, in place of mfu", gt=0
    )
    gpu_hour_price: float = option(3.79, "money for an hour of one GPU", gt=0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DeviceConfig, RunConfig):
    """stage=evaluate: judge a trained run; writes evaluation.json into its folder."""

    inherited: ClassVar = {"variant": NEVER}

    checkpoint: str = option("", "run folder, or one checkpoint in it (default: the data set's run)")
    name: str = option("", "name of the run folder, as in stage=train", when="!checkpoint")
    metric: str = option(
        "",
        "what to measure; shapes: whether images show what the prompt says; fidelity: FID, KID, CLIP score; "
        "classes: of task=classify",
        choices=("", "shapes", "fidelity", "classes"),
    )
    split: str = option("test", "part of the data set that metric=classes judges on")
    generated: str = option(
        "", "dataset directory with the images to judge (stage=generate output=...)", when="metric=fidelity"
    )
    reference: str = option("", "dataset directory with real images, for FID and KID", when="metric=fidelity")
    features: str = option(
        "",
        "TorchScript file of the features, such as inception-2015-12-05.pt; pixels: average colours",
        when="metric=fidelity and reference",
    )
    clip: str = option("", "<model>:<weights> of open_clip, for the CLIP score", when="metric=fidelity")
    objects: int = option(1, "objects in the prompts, 1 or 2", ge=1, le=2, when="metric=shapes")
    sampler: str = option(
        "euler", "how noise becomes an image", choices=("euler", "heun", "dpm++"), when="metric=shapes"
    )
    steps: int = option(20, "steps of the sampler", ge=1, when="metric=shapes")
    guidance: float = option(1.5, "classifier-free guidance scale (1: none)", ge=0, when="metric=shapes")
    precision: str = option("bfloat16", "of the network on a GPU (CPUs use float32)", choices=("float32", "bfloat16"))
    threads: int = option(0, "CPU threads (0: all cores)", ge=0, le=1024)


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(DeviceConfig, StageConfig):
    """stage=caption: texts about images by a trained run: at image_path=, else a data set's, as a column."""

    inherited: ClassVar = {"StageConfig": "!image_path"}

    checkpoint: str = option(
        "", "run folder, checkpoint, or export folder (default: the data set's run)", identity=True
    )
    name: str = option("", "name of the run folder, as in stage=train", when="!checkpoint")
    image_path: str = option("", "picture, folder of images, URL of an image, or dataset directory")
    split_file: str = option("", "only those images that this file puts into split=", when="image_path")
    question: str = option(
        "",
        "what to answer, for runs with prompt=question (default: the questions that the data set has)",
        identity=True,
    )
    beams: int = option(1, "texts that are followed at once; 1 is greedy", identity=True, ge=1)
    length_penalty: float = option(
        1.0, "rank beams by log probability / length ** length_penalty", identity=True, ge=0, when="beams!=1"
    )
    top_p: float = option(
        0.0, "draw from the likeliest tokens with this share of probability (0: no)", identity=True, ge=0, le=1
    )
    temperature: float = option(1.0, "of drawing", identity=True, gt=0, when="top_p")
    min_length: int = option(1, "tokens of a text at least", identity=True, ge=0)
    max_length: int = option(0, "tokens of a text at most (0: what the model was trained for)", identity=True, ge=0)
    precision: str = option(
        "bfloat16", "of the network on a GPU (CPUs use float32)", identity=True, choices=("float32", "bfloat16")
    )
    batch_size: int = option(32, "images at a time", identity=True, ge=1)
    tokenization: str = option(
        "words",
        "how captions are split for their scores; words: any language; ptb: English, as published scores (needs Java)",
        choices=("words", "ptb"),
        when="image_path",
    )
    workers: int = option(
        -1,
        "decoding processes per rank (-1: none on a CPU, else its CPUs without one)",
        ge=-1,
        le=1024,
        when="!image_path",
    )
    column: str = option("generated", "column that the new captions go into", identity=True, when="!image_path")
    shard_bytes: int = option(
        2**26, "largest size of one data file", identity=True, ge=1, le=2**32 - 1, when="!image_path"
    )
    threads: int = option(1, "CPU threads per rank", ge=1, le=1024)


@dataclass(frozen=True, kw_only=True)
class FeideggerConfig(Options):
    """stage=feidegger: FEIDEGGER's images and German captions in one file, for a sequence model."""

    data_path: str = option(
        "https://raw.githubusercontent.com/zalandoresearch/feidegger/master/data/FEIDEGGER_release_1.1.json",
        "the release's JSON: URL or file",
    )
    output_dir: str = option(help="folder for the result, and for what is fetched")
    image_size: tuple[int, ...] = option((224, 224), "height and width", ge=1, le=65535, lengths=(2,))
    max_length: int = option(128, "tokens of a caption", ge=4)
    batch_size: int = option(64, "images in memory at a time", ge=1)
    num_workers: int = option(2, "processes that decode images", ge=0, le=1024)
    language_model: str = option("bpe", "tokenizer: bpe (learned from the captions), or a pretrained one")
    seed: int = option(0, "of the split", ge=0)
    valid_fraction: float = option(0.1, "share of the images that are the val split", ge=0, lt=1)
    test_fraction: float = option(0.1, "share of the images that are the test split", ge=0, lt=1)
    max_failed_fraction: float = option(0.1, "stop if more than this share of the images cannot be loaded", ge=0, le=1)
    allow_private_hosts: bool = option(False, "allow addresses that are not globally routable")


@dataclass(frozen=True, kw_only=True)
class ToolConfig(Options):
    """What tools that look at one dataset directory take: verify, repair, gc."""

    input: str = option(help="dataset directory (it holds plan/ and data/)")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """stage=verify: check counts, files and hashes; names what is wrong, exit code 1 if anything is."""

    input: str = option("", "dataset directory (it holds plan/ and data/)")
    data_dir: str = option("", "in place of input: check everything below this folder")
    dataset: str = option("", "only <data_dir>/<dataset>", when="data_dir")
    deep: bool = option(
        False,
        "also read every row, decode every image, compare with what the stage before kept, decode some latents",
        when="!trace",
    )
    workers: int = option(
        0,
        "processes that look at partitions (0: one for each CPU that this process may use)",
        ge=0,
        le=1024,
        when="!trace",
    )
    json: bool = option(False, "print the findings as JSON")
    trace: str = option("", "check nothing, but tell the way of the sample with this key through data_dir")
    show: str = option("", "write an image of the sample at each stage to this .png", when="trace")


@dataclass(frozen=True, kw_only=True)
class RepairConfig(ToolConfig):
    """stage=repair: verify, then redo just the partitions that are wrong."""

    deep: bool = option(False, "look for what verify finds with deep=true, too")
    workers: int = option(
        0, "processes that look at partitions (0: one for each CPU that this process may use)", ge=0, le=1024
    )


@dataclass(frozen=True, kw_only=True)
class CompactConfig(ToolConfig):
    """stage=compact: pack ledgers and records of finished partitions into few files, where inodes are scarce."""

    input: str = option(help="dataset directory, or a folder above several; unfinished ones are left as they are")
    rank_offset: int = option(0, "array jobs: added to the rank of this job's first task", ge=0)
    world_size: int = option(0, "array jobs: ranks of all elements together", ge=0)


@dataclass(frozen=True, kw_only=True)
class TakedownConfig(Options):
    """stage=takedown: remove samples for good from all finished dataset directories below a folder."""

    takedown: str = option(help="text file: a key, or the hash (32 hexadecimal digits) of a source file, on each line")
    data_dir: str = option(help="data_dir, or any folder below it")
    dataset: str = option("", "only <data_dir>/<dataset>")
    count_only: bool = option(False, "only say how much would be removed from where")


@dataclass(frozen=True, kw_only=True)
class GcConfig(ToolConfig):
    """stage=gc: delete what crashed attempts and replaced partitions left behind."""

    older_than: float = option(86400.0, "leave attempts alone that changed within this many seconds", ge=0)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """stage=report: one self-contained page about everything below a data directory."""

    data_dir: str = option(help="folder to describe: data_dir, or any folder below it")
    dataset: str = option("", "describe only <data_dir>/<dataset>")
    output: str = option("", "file to write (default: report.html in the described folder)")
    samples: int = option(24, "images on each contact sheet", ge=0, le=1000)
    gpu_hour_price: float = option(0.0, "what an hour of one GPU costs: training runs then tell their cost", ge=0)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Options):
    """launch/submit.py: from a command to running ranks. All other keys go to the stages.

    What a SLURM job asks for can be given to one stage alone (precompute.gpus_per_node=8), and any option of sbatch
    that is not named here as slurm_<option>=<value> (slurm_mail_type=END).
    """

    stage: str = option(help="a stage, several (filter,shard), or all")
    cluster: str = option(
        "local",
        "local: ranks are processes here; inline: this process, for debugging; slurm; or a preset: a name in "
        "pipeline/conf/cluster or a path to your own YAML",
    )
    ranks: int = option(1, "processes to start for each stage", ge=1, le=4096, when="cluster=local")
    dry_run: bool = option(
        False, "print what would be done and stop; slurm: the job scripts, and what sbatch says of them"
    )
    pack: str = option(
        "false",
        "run the stages of a command one after another in one job; true: those without GPUs and those with GPUs "
        "apart, so that no GPU waits for a CPU stage; all: in a single job",
        choices=("false", "true", "all"),
        when=_SLURM,
    )
    nodes: int = option(1, "nodes of a job, or of each element of an array", ge=1, when=_SLURM)
    tasks_per_node: int = option(0, "ranks on each node (0: one for each GPU, else one)", ge=0, when=_SLURM)
    cpus_per_task: int = option(1, "CPUs of each rank", ge=1, when=_SLURM)
    gpus_per_node: int = option(
        0, "GPUs of each node, with their type as h100:8 (or gpus=h100:16, of all nodes together)", ge=0, when=_SLURM
    )
    gpu_type: str = option("", "type of the GPUs, as h100", when="cluster=slurm and gpus_per_node")
    gres: str = option(
        "", "other generic resources of each node, as nvme:1 (gpu:h100:8 is gpus_per_node=h100:8)", when=_SLURM
    )
    gpu_bind: str = option(
        "",
        "which of its node's GPUs a rank sees, as closest or single:1 (default: all)",
        when="cluster=slurm and gpus_per_node",
    )
    cpu_bind: str = option(
        "",
        "bind each rank to cores, to a socket (sockets) or to the CPUs of a NUMA domain (ldoms)",
        choices=("", "none", "threads", "cores", "sockets", "ldoms"),
        when=_SLURM,
    )
    mem_bind: str = option(
        "", "local: memory of a rank from its own NUMA domain alone", choices=("", "none", "local"), when=_SLURM
    )
    mem: str = option("", "memory of each node, as 64G (default: the partition's)", when=_SLURM)
    time: str = option(
        "",
        "time limit, as 24:00:00; a job that reaches it is requeued (default: the partition's)",
        when=_SLURM,
    )
    partition: str = option(
        "",
        "partition, or several in order of preference (a,b): the first that has room now, else any of them",
        when=_SLURM,
    )
    account: str = option("", "account to charge", when=_SLURM)
    qos: str = option("", "quality of service", when=_SLURM)
    constraint: str = option("", "features that nodes must have", when=_SLURM)
    reservation: str = option("", "reservation to run in", when=_SLURM)
    exclude: str = option("", "nodes to avoid, as node[3-4]", when=_SLURM)
    licenses: str = option("", "licenses that must be free, as name:2", when=_SLURM)
    nice: int = option(0, "let others go first by this much", ge=-2147483645, le=2147483645, when=_SLURM)
    begin: str = option("", "not before this time, as 20:00, 2027-01-31T08:00 or now+2hours", when=_SLURM)
    after: str = option(
        "", "not before these jobs have succeeded, as 1234 or 1234,1240 (afterany:1234: have ended)", when=_SLURM
    )
    comment: str = option("", "a text for sacct and squeue, behind the place of the output", when=_SLURM)
    mail_user: str = option("", "address for mails of SLURM", when=_SLURM)
    mail_type: str = option(
        "", "when to send them: END, FAIL, BEGIN, REQUEUE, ALL (default with mail_user=: END,FAIL)", when=_SLURM
    )
    notify: str = option("", "URL that gets a small JSON message when a stage has finished, or failed for good")
    array: int = option(0, "start each stage (but train) as so many independent jobs instead of one", ge=0, when=_SLURM)
    array_parallelism: int = option(
        0, "how many elements of the array may run at a time (0: any number)", ge=0, when="cluster=slurm and array"
    )
    lives: int = option(
        5, "give up when a job ended this often in a row without having got anything done", ge=1, when=_SLURM
    )
    bad_nodes: int = option(
        2,
        "nodes that may be left out of a job's next lives for doing badly while others did well",
        ge=0,
        le=1000,
        when=_SLURM,
    )
    stagger: int = option(
        -1,
        "seconds over which the starts of ranks are spread (-1: 1 per 50 ranks, up to 60)",
        ge=-1,
        le=3600,
        when=_SLURM,
    )
    signal_seconds: int = option(
        120, "how long before the time limit ranks are told to stop", ge=1, le=65535, when=_SLURM
    )
    setup: str = option("", "shell lines to run before the ranks start, as 'module load cuda; export A=b'", when=_SLURM)
    container: str = option("", "image to run the ranks in", when=_SLURM)
    container_runtime: str = option(
        "apptainer",
        "what runs the image",
        choices=("apptainer", "singularity", "pyxis"),
        when="cluster=slurm and container",
    )
    container_args: str = option("", "its options, as '--nv --bind /data'", when="cluster=slurm and container")
    srun_args: str = option("", "more options for srun", when=_SLURM)


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Options):
    """launch/status.py: how everything below a folder stands."""

    path: str = option(help="data_dir, or any folder below it: a dataset directory, a run; needs no key")
    stage: str = option("", "only this stage (filter), or the folder of this name (shard-mds)")
    ranks: int = option(20, "ranks to show of each stage, those in trouble first (0: none)", ge=0)
    every: float = option(2.0, "seconds between two looks (SLURM is asked every 10 s at most)", gt=0)
    follow: str = option(
        "auto",
        "look again and again until all is done; auto: on a terminal, and for html= and port=",
        choices=("auto", "true", "false"),
    )
    logs: str = option("", "show the end of logs instead: rank3, failed (all ranks that did), or job")
    lines: int = option(40, "lines of each log to show", ge=1, when="logs")
    json: bool = option(False, "print JSON, one object for each look")
    html: str = option("", "write a page with plots to this file instead")
    port: int = option(0, "serve metrics for Prometheus on this port", ge=0, le=65535)
    host: str = option("127.0.0.1", "address to serve them at; 0.0.0.0: reachable from other machines", when="port")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """launch/doctor.py: what is wrong with this machine, or with a cluster, before a job finds out.

    Keys of launch/submit.py say what to check: cluster=, nodes=, tasks_per_node=, gpus_per_node=, partition=, …
    """

    stage: str = option("precompute", "whose section of a preset counts (cluster=mysite)")
    data_dir: str = option("", "folder for data, to check what its file system promises")
    vae: str = option("", "autoencoder to measure, as for stage=precompute")
    text_encoder: str = option("", "text encoder to measure, as for stage=precompute")
    image_resolutions: tuple[int, ...] = option((256,), "resolutions to encode at", ge=8, le=8192)
    batch_size: int = option(32, "images of a batch", ge=1, le=65536)
    gpus: int = option(0, "GPUs that a node must show (0: gpus_per_node)", ge=0, le=1024)
    cpus: int = option(0, "CPUs that a rank must have (0: cpus_per_task)", ge=0, le=65536)
    seconds: float = option(1.0, "how long each speed is measured", gt=0, le=3600)
    patience: float = option(30.0, "seconds that ranks wait for each other, and for each other's files", gt=0, le=3600)
    queue: float = option(600.0, "seconds to wait until SLURM has room for the job", gt=0, le=604_800)
    mebibytes: int = option(64, "size of the all-reduce in MiB", ge=1, le=16384)
    json: bool = option(False, "print the findings as JSON")
    run_id: str = option("", "one text for all ranks of a check (the launcher sets it)")


STAGES: dict[str, type] = {
    "download": DownloadConfig,
    "filter": FilterConfig,
    "dedup": DedupConfig,
    "shard": ShardConfig,
    "precompute": PrecomputeConfig,
    "features": FeaturesConfig,
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "cost": CostConfig,
    "caption": CaptionConfig,
    "feidegger": FeideggerConfig,
    "verify": VerifyConfig,
    "repair": RepairConfig,
    "gc": GcConfig,
    "compact": CompactConfig,
    "takedown": TakedownConfig,
    "report": ReportConfig,
}
UPSTREAMS = {"dedup": ("filter",), "shard": ("dedup", "filter"), "features": ("shard",), "caption": ("shard",)}
"""What a stage reads by default, where that is not just the one before it on the main line: the first that is there."""
MAIN_LINE = ("download", "filter", "shard", "precompute", "train")


def identity(config: Any) -> dict[str, Any]:
    """The fields of ``config`` that the bytes of the result depend on, as JSON-able values."""
    unused: set[str] = set()
    if isinstance(config, FilterConfig) and not config.fuse:
        unused = set(SourceConfig.__annotations__)
    return {
        f.name: public(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if f.metadata.get("identity") and f.name not in unused
    }


def public(value: Any) -> Any:
    """A setting as it may be stored and shown: JSON-able, without passwords and signatures in URLs.

    Parameters that sign a URL do not count for the identity either: the file is the same when it is signed anew. What
    may be a secret as well as the name of the file is replaced by a digest, so that different files stay different.
    """
    if isinstance(value, (tuple, list)):
        return [public(part) for part in value]
    if not isinstance(value, str) or not (scheme := _SCHEME.match(value)):
        return value
    try:
        parts = urlsplit(value.strip())
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return f"{scheme[1]}://..."  # no URL: who knows which part of it is a password
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    query = "".join(_public_parameter(text) for text in re.split("([&;])", parts.query))
    return f"{parts.scheme}://{host}{port}{parts.path}{'?' if query else ''}{query}"


def public_text(text: str) -> str:
    """A text, such as a command, with all URLs in it as :func:`public` shows them."""
    return _URL.sub(lambda match: str(public(match[0])), text)


def _public_parameter(text: str) -> str:
    name, equals, value = text.partition("=")
    plain = unquote_plus(name)
    if equals and _SIGNATURE.search(plain):
        return f"{name}=..."
    if equals and _KEY.search(plain):
        return f"{name}={_digest(value)}"
    return text if equals or len(text) < 16 else _digest(text)  # a long word without a name may be a token


def _digest(secret: str) -> str:
    return "#" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def default_of(cls: type, name: str) -> Any:
    """Default of a field in JSON-able form, for settings that an older plan did not know yet."""
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    value = default_value(field)
    return list(value) if isinstance(value, tuple) else value


def stage_folder(config: RunConfig, stage: str, variant: str = "") -> Path:
    """Where ``stage`` of this data set lies: ``<data_dir>/<dataset>/<split>/<stage>[-<variant>]``."""
    if not config.data_dir or not config.dataset:
        raise ConfigError(f"give data_dir= and dataset=, or input= and output=, to place stage {stage!r}")
    name = f"{stage}-{variant}" if variant else stage
    return Path(config.data_dir) / dataset_name(config.dataset, config.subset) / config.split / name


def run_folder(config: RunConfig, name: str) -> Path:
    """Where a training run lies: ``<data_dir>/<dataset>/runs/<name>``."""
    if not config.data_dir or not config.dataset:
        raise ConfigError("give data_dir= and dataset=, or output=, to place the run")
    return Path(config.data_dir) / dataset_name(config.dataset, config.subset) / "runs" / name


def dataset_name(dataset: str, subset: str = "") -> str:
    """Folder name of a data set: its own name, or the stem of its YAML file, and the subset."""
    name = Path(dataset).stem if dataset.endswith((".yaml", ".yml")) else dataset
    return f"{name}-{subset}" if subset else name


def default_variant(config: RunConfig) -> str:
    """The suffix of a stage's folder: as given, else what tells results of this stage apart."""
    if config.variant:
        return config.variant
    if isinstance(config, ShardConfig):
        return config.format
    if isinstance(config, PrecomputeConfig):
        return Path(config.vae).name
    return ""
