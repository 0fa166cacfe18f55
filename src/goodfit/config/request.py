"""`TrainRequest`: everything a person may ask of a run; the one schema of command line, Python and YAML.

Every field defaults to None, "decide for me". The defaults themselves live in `resolve.py` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Kind = Literal["int", "float", "bool", "text", "choice", "pretrained", "split", "milliseconds", "length", "lengths",
               "seconds"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """How one field is written, checked and explained."""

    kind: Kind
    help: str
    group: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


TASKS = ("classify", "detect", "segment", "text", "language")
OPTIMIZERS = ("adamw", "adam", "nadam", "radam", "rmsprop", "sgd", "muon")
SCHEDULES = ("wsd", "cosine", "linear", "constant", "step", "multistep", "exponential", "plateau", "onecycle",
             "triangular", "triangular2", "exp-range", "restarts")  # fmt: skip
FORMATS = ("folders", "table", "coco", "yolo", "voc", "masks", "text", "text-table", "text-lines",
           "text-folders", "plain-text")  # fmt: skip


def _ask(kind: Kind, group: str, help: str, **more: Any) -> Any:
    return field(default=None, metadata={"option": Option(kind, help, group, **more)})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What a person asks of a run; None means "decide for me". Values are checked by `parse.parse_request`."""

    data: str | None = _ask("text", "Basic", "folder or file of labelled images or texts")
    model: str | None = _ask(
        "text",
        "Basic",
        "any timm model name, also with -stem1 or -stem2 for small pictures; a detector as FAMILY or FAMILY/BACKBONE, as "
        "fcos/resnet18, fasterrcnn, detr/ORG/NAME; auto decides",
        aliases=("arch",),
    )
    pretrained: str | None = _ask(
        "pretrained",
        "Basic",
        "true, false, a timm weight name, a .safetensors file, or the folder of a bundle or run",
        aliases=("weights",),
    )
    epochs: int | None = _ask("int", "Basic", "passes over the training split; auto stops or extends as validation says",
                              aliases=("num_epochs",), low=1)  # fmt: skip
    time: float | None = _ask("seconds", "Basic", "time for the whole run, as 2h or 90m: the learning rate falls in time",
                              aliases=("time_limit",))  # fmt: skip
    batch: int | None = _ask(
        "int", "Basic", "samples per update; auto or -1 decides", aliases=("batch_size", "bs"), low=1
    )
    imgsz: int | None = _ask(
        "int",
        "Basic",
        "side of the square model input, of a detector its longer side, pixels",
        aliases=("img_size", "image_size"),
        low=8,
        high=4096,
    )
    device: str | None = _ask("text", "Basic", "cpu, cuda, cuda:1, mps", aliases=("gpu",))
    seed: int | None = _ask("int", "Basic", "seed of initialisation, order and augmentation", low=0, high=2**31 - 1)
    project: str | None = _ask("text", "Basic", "folder that holds the runs")
    name: str | None = _ask("text", "Basic", "name of the run's folder", aliases=("run_name",))
    exist_ok: bool | None = _ask("bool", "Basic", "reuse the name of a run that exists: it is replaced")
    latency: float | None = _ask("milliseconds", "Basic", "most time for one image in production, as 10ms: chooses model and imgsz of a classifier",
                                 low=0.001, high=100_000.0)  # fmt: skip
    latency_threads: int | None = _ask("int", "Basic", "processor threads that production has for it", low=1, high=1024)
    plan: str | None = _ask("text", "Basic", "plan.json of an earlier run: decide as it did")

    task: str | None = _ask("choice", "Data", "what is learned", choices=TASKS)
    format: str | None = _ask("choice", "Data", "how the data is laid out", choices=FORMATS)
    image_column: str | None = _ask("text", "Data", "column of a list with the image paths, by name or number")
    text_column: str | None = _ask("text", "Data", "column or columns of a list with the texts, joined by commas")
    label_column: str | None = _ask("text", "Data", "column of a list with the class names")
    split_column: str | None = _ask("text", "Data", "column of a list with train, val or test")
    group: str | None = _ask("text", "Data", "what never straddles splits: a column, a key of COCO's images, folder, or a pattern of paths "
                             "as '(.*)_[0-9]+'")  # fmt: skip
    twins: str | None = _ask("choice", "Data", "nearly equal samples: in one split and out of training where they leak, or kept as others are",
                             choices=("group", "keep"))  # fmt: skip
    header: bool | None = _ask("bool", "Data", "whether a list's first line holds column names")
    encoding: str | None = _ask("text", "Data", "encoding of text files")
    images: str | None = _ask("text", "Data", "folder that image names in annotations start from")
    annotations: str | None = _ask("text", "Data", "which annotation files, where there are several sets")
    crowds: str | None = _ask("choice", "Data", "what is marked as a crowd or as difficult: ignored, or learned as objects",
                              choices=("ignore", "learn"))  # fmt: skip
    labels: str | None = _ask("text", "Data", "fixes.csv of corrected labels, as the audit page saves it")
    like: str | None = _ask("text", "Data", "folder of production samples to compare the data with")
    resplit: bool | None = _ask("bool", "Data", "ignore the splits that the data names, and make new ones")
    split: str | None = _ask("split", "Data", "shares of train/val/test where none are given, as 70/15/15")
    split_seed: int | None = _ask("int", "Data", "seed of the split alone", low=0, high=2**31 - 1)
    fraction: float | None = _ask("float", "Data", "share of the training split to use", low=0.0001, high=1.0)
    max_bad: float | None = _ask("float", "Data", "share of unusable images that stops the run", low=0.0, high=1.0)
    suspects: bool | None = _ask("bool", "Data", "look for likely wrong labels")
    cache: str | None = _ask("choice", "Data", "keep decoded training images",
                             choices=("ram", "disk", "off"))  # fmt: skip
    workers: int | None = _ask("int", "Data", "loader processes; 0 loads in the main process",
                               aliases=("num_workers",), low=0, high=256)  # fmt: skip
    prefetch: int | None = _ask("int", "Data", "batches that each loader process prepares ahead",
                                aliases=("prefetch_factor",), low=1, high=64)  # fmt: skip

    max_det: int | None = _ask("int", "Data", "objects that a detector reports of a picture, at most", aliases=("detections_per_img",), low=1,
                               high=10_000)  # fmt: skip

    augment: str | None = _ask("choice", "Augmentation", "strength of the preset",
                               choices=("off", "light", "standard", "strong"))  # fmt: skip
    policy: str | None = _ask("choice", "Augmentation", "random operations: TrivialAugment or RandAugment",
                              choices=("off", "trivial", "rand"))  # fmt: skip
    erase: float | None = _ask("float", "Augmentation", "probability that a rectangle is erased",
                               aliases=("erasing", "random_erasing"), low=0.0, high=1.0)  # fmt: skip
    close_augment: float | None = _ask("float", "Augmentation", "share of the epochs at the end without strong augmentation",
                                       low=0.0, high=1.0)  # fmt: skip
    flip: float | None = _ask("float", "Augmentation", "probability of a mirrored image", aliases=("fliplr",), low=0.0,
                              high=1.0)  # fmt: skip
    mixup: float | None = _ask("float", "Augmentation", "alpha of mixup; 0 is off", low=0.0, high=10.0)
    cutmix: float | None = _ask("float", "Augmentation", "alpha of cutmix; 0 is off", low=0.0, high=10.0)
    mosaic: float | None = _ask("float", "Augmentation", "probability that four pictures with objects share an input", low=0.0,
                                high=1.0)  # fmt: skip
    copy_paste: float | None = _ask("float", "Augmentation", "probability that objects with masks of another picture lie upon it",
                                    low=0.0, high=1.0)  # fmt: skip
    scale: float | None = _ask("float", "Augmentation", "zoom of the augmentation, ± this share", low=0.0, high=0.9)
    multi_scale: float | None = _ask("float", "Augmentation", "input size of each batch, ± this share of imgsz", low=0.0,
                                     high=0.9)  # fmt: skip
    progressive: float | None = _ask("float", "Augmentation",
                                     "share of imgsz that training starts at, growing to imgsz; 1 is off",
                                     aliases=("progressive_resizing",), low=0.1, high=1.0)  # fmt: skip

    balance: str | None = _ask("choice", "Optimisation", "against class imbalance: sampling, loss weights, logit adjustment",
                               choices=("off", "sample", "loss", "logit"))  # fmt: skip
    optimizer: str | None = _ask("choice", "Optimisation", "how gradients become updates; muon is for matrices, adamw for the rest",
                                 aliases=("opt",), choices=OPTIMIZERS)  # fmt: skip
    lr: float | None = _ask(
        "float", "Optimisation", "peak learning rate of the backbone", aliases=("lr0", "learning_rate"), low=0.0,
        high=100.0)  # fmt: skip
    lr_find: bool | None = _ask("bool", "Optimisation", "find the learning rate by a range test; also lr=find")
    head_lr: float | None = _ask("float", "Optimisation", "peak learning rate of the new head", low=0.0, high=100.0)
    layer_decay: float | None = _ask("float", "Optimisation", "learning rate of each layer, a share of the next nearer to the head; 1 is off",
                                     aliases=("layerwise_decay",), low=0.01, high=1.0)  # fmt: skip
    freeze: str | None = _ask("text", "Optimisation", "what does not train at first: a number of layers from the input, all-but-head, "
                              "or a pattern of parameter names; off")  # fmt: skip
    unfreeze: str | None = _ask(
        "text", "Optimisation", "when it does: never, gradual (a layer an epoch), or after how many epochs"
    )
    weight_decay: float | None = _ask(
        "float", "Optimisation", "weight decay (decoupled for adamw, nadam, radam, muon)", low=0.0, high=10.0
    )
    momentum: float | None = _ask(
        "float", "Optimisation", "momentum of sgd, rmsprop, muon, or beta 1", low=0.0, high=0.9999
    )
    schedule: str | None = _ask("choice", "Optimisation", "learning rate over the run; wsd: warm-up, stable, decay",
                                aliases=("scheduler", "lr_scheduler"), choices=SCHEDULES)  # fmt: skip
    warmup: str | None = _ask("length", "Optimisation", "warm-up of the learning rate: epochs, 500steps or 5%",
                              aliases=("warmup_epochs",))  # fmt: skip
    decay: str | None = _ask("length", "Optimisation", "last part of the run, in which wsd falls: epochs, steps or %")
    milestones: str | None = _ask("lengths", "Optimisation", "where multistep falls, as 30,60,90 or 50%,75%")
    period: str | None = _ask("length", "Optimisation", "between steps or restarts, half a cycle, or plateau's patience",
                              aliases=("step_size",))  # fmt: skip
    gamma: float | None = _ask(
        "float", "Optimisation", "factor of each fall; of each epoch for exponential and exp-range", low=0.0, high=1.0
    )
    lrf: float | None = _ask(
        "float", "Optimisation", "last (or lowest) learning rate as a share of the peak", low=0.0, high=1.0
    )
    accumulate: int | None = _ask(
        "int", "Optimisation", "micro-batches per update",
        aliases=("accumulate_grad_batches", "gradient_accumulation_steps"), low=1, high=1024)  # fmt: skip
    batch_study: bool | None = _ask(
        "bool",
        "Optimisation",
        "train every batch size for a while, and drop those that validate worse; also batch=study",
    )
    clip: float | None = _ask("float", "Optimisation", "largest gradient norm; 0 is off",
                              aliases=("gradient_clip_val", "max_grad_norm"), low=0.0)  # fmt: skip
    clip_value: float | None = _ask("float", "Optimisation", "largest element of the gradient; 0 is off", low=0.0)
    label_smoothing: float | None = _ask("float", "Optimisation", "label smoothing", low=0.0, high=0.9)
    dropout: float | None = _ask("float", "Optimisation", "dropout before the head", low=0.0, high=0.95)
    drop_path: float | None = _ask("float", "Optimisation", "stochastic depth", low=0.0, high=0.95)
    ema: bool | None = _ask("bool", "Optimisation", "average the weights over the last steps")
    swa: float | None = _ask("float", "Optimisation", "share of the run at its end over which weights are averaged equally; 0 is off",
                             low=0.0, high=0.9)  # fmt: skip
    patience: int | None = _ask("int", "Optimisation", "epochs without improvement before cooling down; 0 is off",
                                low=0)  # fmt: skip
    min_delta: float | None = _ask("float", "Optimisation", "relative gain that counts as improvement", low=0.0,
                                   high=1.0)  # fmt: skip
    monitor: str | None = _ask("text", "Optimisation", "validation figure to watch: accuracy, macro_f1 or loss; ap, ap50, ap75, mask_ap of "
                               "detectors; or one of an own module's; -name where less is better")  # fmt: skip

    measure: bool | None = _ask(
        "bool", "Hardware", "measure precision, memory format and batch here, for a minute at most"
    )
    memory: float | None = _ask("float", "Hardware", "share of the free memory that a batch may take; also batch=0.7",
                                low=0.01, high=0.99)  # fmt: skip
    precision: str | None = _ask("choice", "Hardware", "arithmetic of the forward pass; also amp=true|false",
                                 choices=("fp32", "tf32", "bf16", "fp16"))  # fmt: skip
    channels_last: bool | None = _ask("bool", "Hardware", "memory format of images and convolutions")
    compile: str | None = _ask("choice", "Hardware", "torch.compile of the network",
                               choices=("off", "default", "reduce-overhead"))  # fmt: skip
    threads: int | None = _ask("int", "Hardware", "processor threads of the model", low=1, high=1024)
    deterministic: bool | None = _ask("bool", "Hardware", "only deterministic algorithms, also on a GPU")
    rehearse: bool | None = _ask("bool", "Hardware", "check that the model learns before the long run")


def options() -> dict[str, Option]:
    """Every field's name and how it is written, in the order of the schema."""
    return {f.name: f.metadata["option"] for f in fields(TrainRequest)}


def spellings() -> dict[str, str]:
    """Every accepted spelling of every field, mapped to the field's name."""
    table = {}
    for name, option in options().items():
        for spelling in (name, *option.aliases):
            table[spelling] = name
    return table
