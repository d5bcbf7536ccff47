"""Options of the programs in launch/: submit, status and doctor."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import Options, option

_SLURM = "cluster=slurm"


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Options):
    """launch/submit.py: run stages on this machine or on SLURM. All other keys are passed to the stages.

    What a SLURM job asks for can be given to one stage alone (precompute.gpus_per_node=8), and any option of sbatch
    that is not named here as slurm_<option>=<value> (slurm_mail_type=END).
    """

    stage: str = option(help="a stage, several (filter,shard), or all")
    cluster: str = option(
        "local",
        "local: ranks are processes on this machine; inline: in this process, to debug; slurm; or a preset: a name in "
        "pipeline/conf/cluster or a path to your own YAML",
    )
    ranks: int = option(1, "processes to start for each stage", ge=1, le=4096, when="cluster=local")
    dry_run: bool = option(
        False, "print what would be done and stop; on slurm: the job scripts, and what sbatch says about them"
    )
    pack: str = option(
        "false",
        "run the stages of a command one after another in one job; true: those without GPUs and those with GPUs "
        "apart, so that no GPU waits for a CPU stage; all: in a single job",
        choices=("false", "true", "all"),
        when=_SLURM,
    )
    nodes: int = option(1, "nodes of a job, or of each element of an array", ge=1, when=_SLURM)
    tasks_per_node: int = option(0, "ranks on each node (0: one for each GPU, or one without GPUs)", ge=0, when=_SLURM)
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
        "", "local: ranks use memory of their own NUMA domain only", choices=("", "none", "local"), when=_SLURM
    )
    mem: str = option("", "memory of each node, as 64G (default: the partition's)", when=_SLURM)
    time: str = option(
        "",
        "time limit, as 24:00:00; a job that reaches it is requeued (default: the partition's)",
        when=_SLURM,
    )
    partition: str = option(
        "",
        "partition, or several in order of preference (a,b): the first one with free nodes, otherwise any of them",
        when=_SLURM,
    )
    account: str = option("", "account to charge", when=_SLURM)
    qos: str = option("", "quality of service", when=_SLURM)
    constraint: str = option("", "features that nodes must have", when=_SLURM)
    reservation: str = option("", "reservation to run in", when=_SLURM)
    exclude: str = option("", "nodes to avoid, as node[3-4]", when=_SLURM)
    licenses: str = option("", "licenses that must be free, as name:2", when=_SLURM)
    nice: int = option(0, "lower the job's priority by this much", ge=-2147483645, le=2147483645, when=_SLURM)
    begin: str = option("", "start after this time, as 20:00, 2027-01-31T08:00 or now+2hours", when=_SLURM)
    after: str = option(
        "", "start after these jobs have succeeded, as 1234 or 1234,1240 (afterany:1234: have ended)", when=_SLURM
    )
    comment: str = option("", "text for sacct and squeue, added after the path of the output", when=_SLURM)
    mail_user: str = option("", "address for SLURM's mails", when=_SLURM)
    mail_type: str = option(
        "", "when to send them: END, FAIL, BEGIN, REQUEUE, ALL (default with mail_user=: END,FAIL)", when=_SLURM
    )
    notify: str = option(
        "", "URL to which a small JSON message is posted when a stage has finished, or failed permanently"
    )
    array: int = option(
        0, "start each stage (except train) as this many independent jobs instead of one", ge=0, when=_SLURM
    )
    array_parallelism: int = option(
        0, "how many elements of the array may run at the same time (0: no limit)", ge=0, when="cluster=slurm and array"
    )
    lives: int = option(5, "give up when a job has ended this many times in a row without progress", ge=1, when=_SLURM)
    bad_nodes: int = option(
        2,
        "maximum number of nodes excluded from a job's next lives because they failed while others did well",
        ge=0,
        le=1000,
        when=_SLURM,
    )
    stagger: int = option(
        -1,
        "seconds over which ranks start one after another (-1: 1 per 50 ranks, up to 60)",
        ge=-1,
        le=3600,
        when=_SLURM,
    )
    signal_seconds: int = option(
        120, "number of seconds before the time limit at which ranks are asked to stop", ge=1, le=65535, when=_SLURM
    )
    setup: str = option("", "shell lines to run before the ranks start, as 'module load cuda; export A=b'", when=_SLURM)
    container: str = option("", "container image to run the ranks in", when=_SLURM)
    container_runtime: str = option(
        "apptainer",
        "container runtime",
        choices=("apptainer", "singularity", "pyxis"),
        when="cluster=slurm and container",
    )
    container_args: str = option(
        "", "options for the container runtime, as '--nv --bind /data'", when="cluster=slurm and container"
    )
    srun_args: str = option("", "more options for srun", when=_SLURM)


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Options):
    """launch/status.py: show the state of all stages and ranks in a folder."""

    path: str = option(
        help="folder to look at: data_dir, or any dataset directory or run below it; can be given without path="
    )
    stage: str = option("", "only this stage (filter), or the folder of this name (shard-mds)")
    ranks: int = option(20, "number of ranks to show for each stage, those with problems first (0: none)", ge=0)
    every: float = option(2.0, "seconds between refreshes (SLURM is asked at most every 10 s)", gt=0)
    follow: str = option(
        "auto",
        "refresh until everything is finished; auto: on a terminal, and with html= or port=",
        choices=("auto", "true", "false"),
    )
    logs: str = option("", "show the end of logs instead: rank3, failed (all ranks that failed), or job")
    lines: int = option(40, "lines of each log to show", ge=1, when="logs")
    json: bool = option(False, "print JSON, one object per refresh")
    html: str = option("", "write a page with plots to this file instead")
    port: int = option(0, "serve metrics for Prometheus on this port", ge=0, le=65535)
    host: str = option("127.0.0.1", "address to serve them at; 0.0.0.0: reachable from other machines", when="port")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Options):
    """launch/doctor.py: check whether this machine or a cluster is ready for a job.

    Options of launch/submit.py select what is checked: cluster=, nodes=, tasks_per_node=, gpus_per_node=, partition=, …
    """

    stage: str = option("precompute", "stage whose section of the preset applies (cluster=mysite)")
    data_dir: str = option("", "folder for data, whose file system is checked")
    vae: str = option("", "autoencoder to measure, as for stage=precompute")
    text_encoder: str = option("", "text encoder to measure, as for stage=precompute")
    image_resolutions: tuple[int, ...] = option((256,), "resolutions to encode at", ge=8, le=8192)
    batch_size: int = option(32, "images per batch", ge=1, le=65536)
    gpus: int = option(0, "GPUs that a node must have (0: gpus_per_node)", ge=0, le=1024)
    cpus: int = option(0, "CPUs that a rank must have (0: cpus_per_task)", ge=0, le=65536)
    seconds: float = option(1.0, "seconds for which each speed is measured", gt=0, le=3600)
    patience: float = option(30.0, "seconds that ranks wait for each other, and for each other's files", gt=0, le=3600)
    queue: float = option(600.0, "seconds to wait until SLURM has room for the job", gt=0, le=604_800)
    mebibytes: int = option(64, "size of the all-reduce in MiB", ge=1, le=16384)
    json: bool = option(False, "print the findings as JSON")
    run_id: str = option("", "identifier shared by all ranks of a check (set by the launcher)")
