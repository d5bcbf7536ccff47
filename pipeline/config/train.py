"""Options of stage=train: those of all tasks, and a group for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.options import NEVER, Options, option
from pipeline.config.run import DeviceConfig, RunConfig
from pipeline.registry import Traits, tasks

_DIFFUSE, _CLASSIFY, _CAPTION = "task=diffuse", "task=classify", "task=caption"
_AUGMENTED = "task=classify or task=caption and encoder"  # training decodes images


@dataclass(frozen=True, kw_only=True)
class DiffuseOptions(Options):
    """Diffusion on latents."""

    show: int = option(
        0, "number of images to generate at each evaluation, for the report", ge=0, le=1000, when=_DIFFUSE
    )
    caption_drop: float = option(
        0.1, "fraction of captions to drop, for classifier-free guidance", identity=True, ge=0, le=1, when=_DIFFUSE
    )
    process: str = option(
        "flow", "flow: rectified flow; edm: EDM preconditioning", identity=True, choices=("flow", "edm"), when=_DIFFUSE
    )
    noise_mean: float = option(
        0.7,
        "mean of the noise level's logit (flow) or logarithm (edm: -0.6 is usual)",
        identity=True,
        ge=-20,
        le=20,
        when=_DIFFUSE,
    )
    noise_std: float = option(
        1.0,
        "standard deviation of the noise level's logit or logarithm (edm: 1.2 is usual)",
        identity=True,
        gt=0,
        when=_DIFFUSE,
    )
    sigma_data: float = option(
        0.9, "standard deviation of the data", identity=True, gt=0, when="task=diffuse and process=edm"
    )
    mask_ratio: float = option(
        0.0, "fraction of tokens that the backbone does not see", identity=True, ge=0, lt=1, when=_DIFFUSE
    )
    size_condition: bool = option(
        False,
        "condition the network on the original size of each image and the position of the crop, as SDXL does",
        identity=True,
        when=_DIFFUSE,
    )
    draw_captions: bool = option(
        True,
        "latents made with encode_captions=all: draw one of a sample's captions in each epoch; false: take the first",
        identity=True,
        when=_DIFFUSE,
    )
    caption_weights: tuple[str, ...] = option(
        (),
        "how often captions of each source are drawn, as [original*1,recaption*3] (default: each caption of a sample "
        "equally often)",
        identity=True,
        when="task=diffuse and draw_captions",
    )
    vae: str = option(
        "",
        "latents without a manifest: the autoencoder that made them, as for stage=precompute",
        identity=True,
        when=_DIFFUSE,
    )
    text_encoder: str = option(
        "", "latents without a manifest: the text encoder that made their text states", identity=True, when=_DIFFUSE
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
        "latents without a manifest: type in which they are stored (default: float16)",
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


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(Options):
    """Image classification."""

    classes: int = option(0, "number of classes (0: derived from the labels)", identity=True, ge=0, when=_CLASSIFY)
    blocks: str = option(
        "", "kinds of blocks, repeated: ssm, attention, hybrid, or a list", identity=True, when=_CLASSIFY
    )
    mixer: str = option("", "mamba2 (default) or mamba1", identity=True, when=_CLASSIFY)
    scan_backend: str = option(
        "auto",
        "implementation of the scan; auto: mamba_ssm if its kernels work",
        choices=("auto", "torch", "mamba_ssm"),
    )
    patch: int = option(
        0,
        "edge of a patch (0: the model's own value; likewise for the options below)",
        identity=True,
        ge=0,
        when=_CLASSIFY,
    )
    stem: str = option("", "first layer: patch, or conv for small images", identity=True, when=_CLASSIFY)
    pool: str = option("", "pooling: mean, or a class token", identity=True, when=_CLASSIFY)
    depth: int = option(0, "number of blocks", identity=True, ge=0, le=10000, when=_CLASSIFY)
    heads: int = option(0, "number of attention heads", identity=True, ge=0, when=_CLASSIFY)
    d_state: int = option(0, "state size of a channel", identity=True, ge=0, when=_CLASSIFY)
    d_conv: int = option(0, "kernel size of the convolution before the scan", identity=True, ge=0, when=_CLASSIFY)
    expand: int = option(
        0, "inner width of the scan, as a multiple of the model's width", identity=True, ge=0, when=_CLASSIFY
    )
    mlp_ratio: float = option(0.0, "width of the MLP after each mixer (0: none)", identity=True, ge=0, when=_CLASSIFY)
    drop_path: float = option(
        0.0, "drop-path rate of the last block; earlier blocks have less", identity=True, ge=0, lt=1, when=_CLASSIFY
    )
    enlarge: float = option(
        1.0,
        "read images at this multiple of the resolution, and crop from them",
        identity=True,
        ge=1,
        le=16,
        when=_CLASSIFY,
    )
    mixup: float = option(0.0, "alpha of mixup (0: none)", identity=True, ge=0, when=_CLASSIFY)
    cutmix: float = option(
        0.0, "alpha of cutmix (0: none); with mixup, one of the two is chosen", identity=True, ge=0, when=_CLASSIFY
    )
    mix_probability: float = option(
        1.0,
        "fraction of samples that are mixed",
        identity=True,
        ge=0,
        le=1,
        when="task=classify and mixup or task=classify and cutmix",
    )


@dataclass(frozen=True, kw_only=True)
class CaptionTaskOptions(Options):
    """Captions and answers about images."""

    decoder: str = option(
        "transformer",
        "network that generates the texts",
        identity=True,
        choices=("transformer", "mamba"),
        when=_CAPTION,
    )
    objective: str = option(
        "likelihood",
        "training objective; likelihood: of the captions; cider: CIDEr-D of sampled texts (self-critical training)",
        identity=True,
        choices=("likelihood", "cider"),
        when=_CAPTION,
    )
    draws: int = option(
        5, "number of captions sampled for each image", identity=True, ge=2, when="task=caption and objective=cider"
    )
    positions: str = option(
        "learned",
        "position encoding of the transformer",
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
        "encode images during training with this encoder, instead of reading stage=features",
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
        8000, "maximum size of a learned vocabulary", identity=True, ge=1, when="task=caption and tokenizer=bpe"
    )
    max_length: int = option(
        64,
        "maximum number of tokens of a text, including its begin, end and question",
        identity=True,
        ge=4,
        when=_CAPTION,
    )
    valid_input: str = option("", "dataset directory to validate on, instead of valid_fraction=", when=_CAPTION)
    split_file: str = option(
        "",
        "JSON, CSV or TSV file that assigns images to train, valid and test by file name",
        identity=True,
        when=_CAPTION,
        path="file",
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """Augmentation of the images that training decodes."""

    crop_scale: float = option(
        1.0,
        "minimum fraction of the area that random crops keep",
        identity=True,
        gt=0,
        le=1,
        when=_AUGMENTED,
    )
    shift: float = option(
        0.0,
        "shift images by up to this many pixels",
        identity=True,
        ge=0,
        when=_AUGMENTED,
    )
    flip: float = option(
        0.0,
        "probability of a horizontal flip",
        identity=True,
        ge=0,
        le=1,
        when=_AUGMENTED,
    )
    rotate: float = option(
        0.0,
        "rotate images by up to this many degrees",
        identity=True,
        ge=0,
        le=180,
        when=_AUGMENTED,
    )
    shear: float = option(0.0, "shear images by up to this", identity=True, ge=0, when=_AUGMENTED)
    randaugment: int = option(
        0,
        "number of RandAugment operations on each image",
        identity=True,
        ge=0,
        le=100,
        when=_AUGMENTED,
    )
    randaugment_magnitude: float = option(
        9.0,
        "strength of RandAugment's operations, 0 to 10",
        identity=True,
        ge=0,
        le=10,
        when="task=classify and randaugment or task=caption and encoder and randaugment",
    )
    erase: float = option(
        0.0,
        "probability of random erasing",
        identity=True,
        ge=0,
        le=1,
        when=_AUGMENTED,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AugmentationOptions, CaptionTaskOptions, ClassifyOptions, DiffuseOptions, DeviceConfig, RunConfig):
    """stage=train: train a model on a dataset; resumes from the last checkpoint in its run folder."""

    traits: ClassVar = Traits(upstream=("precompute",), lockstep=True, gpus=True)
    inherited: ClassVar = {"variant": NEVER}

    @property
    def upstreams(self) -> tuple[str, ...]:
        if self.task == "caption":
            return ("shard",) if self.encoder else ("features",)
        return ("shard",) if self.task == "classify" else self.traits.upstream

    task: str = option(
        "diffuse", "task to train for", identity=True, choices=("diffuse", "classify", "caption"), names=tasks
    )
    name: str = option("", "name of the run folder (default: <task>)")
    model: str = option("nano", "size of the network", identity=True)
    steps: int = option(1000, "optimizer steps", identity=True, ge=1)
    epochs: float = option(0.0, "passes over the data, instead of steps= (0: use steps)", identity=True, ge=0)
    batch_size: int = option(32, "samples per step, over all ranks", identity=True, ge=1)
    micro_batch: int = option(
        0,
        "samples per forward pass of a rank, to save memory (0: the whole batch; on a CPU as many as fit its caches)",
        ge=0,
    )
    workers: int = option(
        -1,
        "processes per rank that prepare batches (-1: none on a CPU; with a GPU one less than its CPUs, 8 at most)",
        ge=-1,
        le=1024,
    )
    cache: str = option(
        "",
        "input= in an object store: local folder for its files, which the ranks of a node share (default: "
        "LATENTMILL_CACHE, else below the system's temporary one)",
    )
    cache_limit: int = option(
        0, "input= in an object store: bytes that the cache may hold (0: LATENTMILL_CACHE_BYTES, else 64 GiB)", ge=0
    )
    lr: float = option(3e-3, "peak learning rate", identity=True, gt=0)
    warmup_steps: int = option(100, "steps of linear warm-up", identity=True, ge=0)
    schedule: str = option(
        "cosine",
        "schedule of the learning rate after the warm-up",
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
        "step: a reduction after each time this fraction of the steps is done; wsd: fraction of the steps that decay",
        identity=True,
        gt=0,
        le=1,
        when="schedule=step|wsd",
    )
    lr_patience: int = option(
        5, "evaluations without improvement before a reduction", identity=True, ge=1, when="schedule=plateau"
    )
    beta2: float = option(0.99, "AdamW: decay of the squared gradients' average", identity=True, ge=0, lt=1)
    weight_decay: float = option(0.01, "AdamW weight decay", identity=True, ge=0)
    clip_norm: float = option(1.0, "gradient norm is clipped to this", identity=True, gt=0)
    max_skipped: int = option(
        10, "number of consecutive steps whose loss may be NaN or infinite (they are skipped)", identity=True, ge=0
    )
    ema_decay: float = option(
        0.995, "decay of the averaged weights used for sampling and evaluation", identity=True, ge=0, lt=1
    )
    precision: str = option(
        "auto",
        "precision of activations; parameters are float32; auto: bfloat16 on a GPU, with TF32 for operations in "
        "float32; "
        "float32 on a CPU",
        identity=True,
        choices=("auto", "float32", "tf32", "bfloat16"),
    )
    parallel: str = option(
        "ddp",
        "ddp: every rank has the whole model; fsdp: it is sharded over all ranks; hsdp: over those of a node",
        choices=("ddp", "fsdp", "hsdp"),
    )
    reshard_after_forward: bool = option(
        True,
        "false keeps gathered parameters until the backward pass: faster, and more memory",
        when="parallel=fsdp|hsdp",
    )
    checkpoint_activations: bool = option(
        False, "recompute activations in the backward pass: a third more computation, far less memory"
    )
    deterministic: bool = option(False, "use only deterministic operations; slower on a GPU")
    profile: int = option(
        0,
        "number of steps that torch's profiler records on rank 0, into profile/ of the run (0: none)",
        ge=0,
    )
    compile: bool = option(False, "compile the model block by block (torch.compile)")
    valid_fraction: float = option(
        0.0,
        "fraction of the training set that is held out, to find the best checkpoint",
        identity=True,
        ge=0,
        lt=1,
    )
    evaluate_every: int = option(
        0, "steps between evaluations on the held-out fraction (0: only at the end)", identity=True, ge=0
    )
    early_stop: int = option(0, "stop after this many evaluations without improvement (0: never)", identity=True, ge=0)
    start_from: str = option(
        "",
        "run folder, checkpoint, or name of a run of this dataset whose averaged weights to start from",
        when="task=diffuse|caption",
    )
    recipe: str = option("", "settings from a name in pipeline/conf/recipe, or from your own YAML file")
    phase: str = option("", "phase of the recipe to train; it starts from the phase before it", when="recipe")
    resolution: int = option(
        0,
        "diffuse: which latents_<resolution> to learn (0: the smallest); classify: edge of the model's input",
        identity=True,
        ge=0,
        le=65536,
        when="task=diffuse|classify",
    )
    dropout: float = option(0.0, "dropout", identity=True, ge=0, lt=1, when="task=classify|caption")
    label_smoothing: float = option(
        0.0,
        "fraction of the target spread over all classes or tokens",
        identity=True,
        ge=0,
        lt=1,
        when="task=classify|caption",
    )
    checkpoint_every: int = option(500, "steps between checkpoints", ge=1)
    keep_checkpoints: int = option(
        2, "number of checkpoints to keep; older ones are deleted, except the best one (0: keep all)", ge=0
    )
    export_every: int = option(
        0, "validate and export the model after every this many epochs (0: never)", identity=True, ge=0
    )
    keep_exports: int = option(
        3,
        "number of exports to keep; older ones are deleted, except the best one (0: keep all)",
        ge=0,
        when="export_every",
    )
    save_in_background: bool = option(True, "write checkpoints while training continues")
    log_every: int = option(20, "steps between log lines", ge=1)
    loggers: tuple[str, ...] = option(
        (), "loggers in addition to the JSON lines: tensorboard, wandb", choices=("tensorboard", "wandb")
    )
    wandb_project: str = option("latentmill", "project", when="loggers=wandb")
    hub_repo: str = option("", "Hugging Face Hub: upload each export to this repository")
    threads: int = option(0, "CPU threads per rank (0: all cores shared by the ranks of a node)", ge=0, le=1024)
