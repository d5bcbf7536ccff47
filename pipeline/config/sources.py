"""Options of the sources of samples, and of stage=download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.options import NEVER, Options, option
from pipeline.config.run import StageConfig, seed_option
from pipeline.registry import Traits, sources

_SHAPES = "source=shapes"
SEEDED = "source!=" + "|".join(name for name in sources.builtin if name != "shapes")
"""The sources that draw at random: generated scenes, and those of installed packages that do."""
_URL_LIST = "source=url_list"
_ARCHIVES = "source=http_archive|huggingface|webdataset|parquet|mds|ipc|hdf5|npy"
_FETCHED = "source=url_list|http_archive|huggingface|webdataset|parquet|mds|ipc|hdf5|npy|torchvision"


@dataclass(frozen=True, kw_only=True)
class CommonSourceOptions(Options):
    """Where samples come from."""

    source: str = option(
        "",
        "where samples come from: shapes, digits, image_folder, url_list, http_archive, huggingface, webdataset, "
        "parquet, ipc, mds, hdf5, npy, torchvision",
        identity=True,
        names=sources,
    )
    partition_size: int = option(
        1000,
        "samples per partition (sources whose samples are known beforehand)",
        identity=True,
        ge=1,
        when="source=shapes|digits|image_folder|url_list",
    )
    max_member_bytes: int = option(
        2**30,
        "a member or file larger than this is failed:too_many_bytes",
        identity=True,
        ge=1,
        when="source!=shapes|digits",
    )


@dataclass(frozen=True, kw_only=True)
class ShapesOptions(Options):
    """Generated scenes."""

    count: int = option(1000, "number of scenes", identity=True, ge=1, when=_SHAPES)
    questions: bool = option(False, "add questions and answers, for prompt=question", identity=True, when=_SHAPES)
    image_size: int = option(64, "shorter edge of the images, in pixels", identity=True, ge=1, le=4096, when=_SHAPES)
    canvases: tuple[str, ...] = option(
        ("1:1",), "aspect ratios (width:height) of the images; each has one of them", identity=True, when=_SHAPES
    )
    objects: int = option(1, "objects in a scene, 1 or 2 (0: both kinds)", identity=True, ge=0, le=2, when=_SHAPES)
    holdout: bool = option(
        True,
        "leave out a fixed list of colour-shape pairs, to test new combinations",
        identity=True,
        when=_SHAPES,
    )


@dataclass(frozen=True, kw_only=True)
class ImageFolderOptions(Options):
    """Images in folders."""

    copy: bool = option(
        False, "copy the files into the output instead of referring to them", identity=True, when="source=image_folder"
    )
    captions: str = option(
        "auto",
        "auto, txt, folder, none, or a file with captions (json, jsonl, csv, tsv, txt, parquet, or the annotation file "
        "of COCO, TextCaps or Flickr30k)",
        identity=True,
        when="source=image_folder",
        path="file",
        words=("auto", "txt", "folder", "none"),
    )


@dataclass(frozen=True, kw_only=True)
class UrlListOptions(Options):
    """Lists of URLs: their columns, and how servers are treated."""

    url_column: str = option("", "name or number of the column with URLs (default: url)", identity=True, when=_URL_LIST)
    hash_column: str = option("", "column with an MD5, SHA-1 or SHA-256 to check", identity=True, when=_URL_LIST)
    split_column: str = option("", "column that names the split", identity=True, when=_URL_LIST)
    split_values: tuple[str, ...] = option(
        (), "values of that column that belong to this split", identity=True, when="source=url_list and split_column"
    )
    connections: int = option(512, "concurrent requests per rank", ge=1, le=65536, when=_URL_LIST)
    per_host: int = option(8, "concurrent requests per host and rank", ge=1, le=65536, when=_URL_LIST)
    per_second: float = option(0.0, "requests per second to one host, per rank (0: no limit)", ge=0, when=_URL_LIST)
    robots_txt: bool = option(False, "fetch the robots.txt of each host and follow it", identity=True, when=_URL_LIST)
    opt_outs: tuple[str, ...] = option(
        ("noai", "noimageai", "noindex", "noimageindex"),
        "drop images whose X-Robots-Tag says one of these",
        identity=True,
        when=_URL_LIST,
    )


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions(Options):
    """Archives and tables of images, and the files that describe them."""

    sha256: tuple[str, ...] = option(
        (), "expected hashes, in the order of urls (empty: not known)", identity=True, when="source=http_archive"
    )
    repo: str = option("", "the dataset's repository, as owner/name", identity=True, when="source=huggingface")
    revision: str = option(
        "main", "branch, tag or commit; recorded as a commit", identity=True, when="source=huggingface"
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
        "format of the metadata: jdb, diffusiondb, coco, textcaps, flickr30k, texts; or caltech256, folders",
        identity=True,
        when=_ARCHIVES,
    )
    metadata_member: str = option("", "which member of a metadata archive to read", identity=True, when="metadata")
    metadata_split: str = option(
        "", "which split to take from metadata that holds several", identity=True, when="metadata"
    )
    listed_only: bool = option(
        False, "leave out images that the metadata does not list", identity=True, when="annotations"
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
    caption_column: str = option(
        "",
        "column with one or several captions (default: caption, text, ...)",
        identity=True,
        when="source=url_list|http_archive|huggingface|webdataset|parquet|mds|ipc|hdf5|npy",
    )
    image_column: str = option(
        "",
        "column with the images (default: image, jpg, ...)",
        identity=True,
        when=_ARCHIVES,
    )
    columns: tuple[str, ...] = option(
        (),
        "url_list, parquet: further columns to keep in meta; archives: fields of .json files (none: all)",
        identity=True,
        when="source=url_list|http_archive|huggingface|webdataset|parquet|mds|ipc|hdf5|npy",
    )
    max_members: int = option(
        2_000_000,
        "an archive with more members is refused",
        ge=1,
        when="source=http_archive|huggingface|webdataset|parquet|mds|ipc|hdf5|npy|torchvision",
    )


@dataclass(frozen=True, kw_only=True)
class FetchOptions(Options):
    """Downloaded files: where from, how many, and when to give up."""

    urls: tuple[str, ...] = option(
        (),
        "http_archive, webdataset, parquet, ipc, mds, hdf5, npy: URLs of such files, {000..199} being a range; "
        "url_list: URLs of lists; in object stores and on the Hub (s3://, gs://, az://, hf://) also patterns with *",
        identity=True,
        when="source=url_list|http_archive|webdataset|parquet|mds|ipc|hdf5|npy|torchvision",
    )
    fraction: float = option(
        1.0,
        "take only this fraction of the files, or of the rows of a list, from the beginning",
        identity=True,
        gt=0,
        le=1,
        when=_FETCHED,
    )
    mirror: str = option(
        "", "folder with copies of the publisher's files, to read instead of the network", when=_FETCHED
    )
    expected_gb: float = option(
        0.0,
        "expected download size in GB, where servers do not announce it (0: unknown)",
        ge=0,
        when=_FETCHED,
    )
    check_space: bool = option(
        True,
        "stop before downloading if the data will not fit on the disk",
        when=_FETCHED,
    )
    max_archive_bytes: int = option(
        2**40,
        "larger files are refused",
        ge=1,
        when=_FETCHED,
    )
    timeout: float = option(
        0.0,
        "seconds with (almost) no data before a try is given up (0: 60 for archives, 10 for images)",
        ge=0,
        when=_FETCHED,
    )
    deadline: float = option(
        0.0,
        "seconds that one file may take, including all tries and redirects (0: a day for archives, 60 for images)",
        ge=0,
        when=_FETCHED,
    )
    retries: int = option(
        3,
        "number of retries after the first try, with exponential backoff",
        ge=0,
        le=1000,
        when=_FETCHED,
    )
    contact: str = option(
        "",
        "URL or e-mail address for the User-Agent header, so that server operators can contact you",
        when=_FETCHED,
    )
    allow_private_hosts: bool = option(
        False,
        "allow addresses that are not globally routable",
        when=_FETCHED,
    )


@dataclass(frozen=True, kw_only=True)
class SourceOptions(
    UrlListOptions, ArchiveOptions, FetchOptions, ImageFolderOptions, ShapesOptions, CommonSourceOptions
):
    """Every option of every source; the last base's options come first."""

    help_order: ClassVar = (
        CommonSourceOptions,
        ImageFolderOptions,
        FetchOptions,
        UrlListOptions,
        ArchiveOptions,
        ShapesOptions,
    )


@dataclass(frozen=True, kw_only=True)
class SourceConfig(SourceOptions, StageConfig):
    """A source, and the run that it is part of."""


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(SourceConfig):
    """stage=download: read the samples of a dataset and store them, each with its key, captions and content hash."""

    traits: ClassVar = Traits(partitioned=True)
    inherited: ClassVar = {"wait": NEVER}

    seed: int = seed_option(when=SEEDED)
