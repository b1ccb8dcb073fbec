"""What a recipe may say: one dataclass per group of keys, a help text and the allowed range on every field."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Dataset = Literal["digits", "mnist", "fashionmnist", "svhn", "cifar10", "cifar100", "imagefolder", "none"]
Task = Literal["generator", "distill", "qat", "ptq", "prune", "udfc"]
Source = Literal["generator", "noise", "real"]
INPUT = "what is compressed: main (zoo.main, else the first teacher), student, an earlier task, or a folder of a model"
SELECTED = "teacher"  # student.weights: a selection of the teacher's
SOURCE = "images: generator, or as a control noise or real (training images where there are some)"


def key(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its help text and its allowed range (both ends included)."""
    metadata = {"help": help, "low": low, "high": high}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Data:
    """Real images: only to train teachers that have no checkpoint, and to evaluate."""

    dataset: Dataset = key("none", "the data set of the teachers' task; none where there is no real image")
    root: str = key("data", "folder of the data set; for imagefolder the folder of test images, one folder per class")
    train_root: str | None = key(None, "imagefolder: folder of training images, for teachers without checkpoint")


@dataclass
class Image:
    """The canonical image of the generator: float [channels, size, size] in [0, 1]."""

    channels: int = key(3, "image channels", 1, 4)
    size: int = key(32, "image height and width, pixels", 4, 1024)


@dataclass
class TeacherTraining:
    """How a teacher without a checkpoint is trained on real images (cached for the next run)."""

    epochs: int = key(60, "passes over the training images", 1)
    batch_size: int = key(128, "images per step", 2)
    lr: float = key(0.1, "peak learning rate of SGD with a one-cycle schedule", 0)
    weight_decay: float = key(5e-4, "weight decay", 0)
    shift: float = key(
        0.125, "random shift, as a share of the image size, edges repeated; ignored for a teacher with a pad", 0, 0.5
    )
    flip: bool = key(False, "random horizontal flip")
    cache: str = key(
        "runs/teachers",
        "folder of the teachers trained here, found again by the keys they were trained by; not by the images: put "
        "other ones into a folder of another name",
    )


@dataclass
class TeacherSpec:
    """One teacher of the zoo."""

    model: str = key("", "model string: timm:NAME, torchvision:NAME, dfkd:NAME, hub:..., python:...")
    weights: str = key("", "checkpoint path or URL, `pretrained`, or empty: trained from data.dataset")
    mean: list[float] = key([], "per-channel mean the teacher was trained with; empty: zeros, or its folder's")
    std: list[float] = key([], "per-channel standard deviation it was trained with; empty: ones, or its folder's")
    input_size: int | None = key(
        None, "height and width the teacher takes, pixels; null: image.size, or its folder's", 4, 1024
    )
    pad: int | None = key(
        None,
        "black pixels (of image.size) put around an image before a random crop in its training: 4 for most CIFAR "
        "checkpoints; null: none, where it is trained here training.shift, and of a folder as its model.json says",
        0,
        64,
    )
    flip: bool | None = key(None, "its training mirrored images at random; null: as for pad, with training.flip")
    weight: float = key(
        1.0, "share of this teacher in what a student learns of several (the generator learns of all alike)", 0
    )
    enabled: bool = key(True, "false leaves an inherited teacher out of the zoo")
    kwargs: dict[str, Any] = key({}, "further arguments of the model, e.g. {width: 16}")


@dataclass
class Zoo:
    """How the teachers are used together."""

    sample: int = key(2, "m': teachers sampled for each generator step (MixMix section 4.1)", 1)
    memory_gb: float = key(
        0.0, "GB of the device for teachers, the others wait on the host (the figures do not change); 0: all stay", 0
    )
    main: str | None = key(None, "teacher that the student learns; null: the zoo's weighted mean")


@dataclass
class GeneratorSpec:
    """The network from latents and labels to images."""

    arch: str = key("conv", "conv: a network; pixels: no network, the pixels themselves are optimised (or stay noise)")
    latent: int = key(128, "length of the latent vector", 1)
    width: int = key(32, "channels of the last stage; earlier stages have twice as many", 1)
    conditional: bool = key(True, "draw an image of a given class (labels are exact and balanced)")
    prototypes: int = key(8, "codes of a class, of which the first latent chooses one: as many structures", 1)
    norms: Literal["class", "code"] = key(
        "code", "what has scales and shifts of its own in every norm: a class, or each of its codes"
    )
    checkpoint: str | None = key(None, "folder of a trained generator: it is frozen and nothing trains a generator")


@dataclass
class Mix:
    """Data Mixing (MixMix section 4.2)."""

    kind: Literal["resize", "cutmix", "mixup"] = key("resize", "resize: MixMix eq. 7-9; cutmix and mixup are Kornia's")
    probability: float = key(0.0, "share of generator steps with mixed images; 0: no Data Mixing", 0, 1)
    antialias: bool = key(False, "low-pass the image before shrinking it into its box, so every pixel gets gradient")


@dataclass
class Losses:
    """Loss weights of the generator by name; weight 0 is not computed."""

    ce: float = key(1.0, "cross-entropy to the (mixed) labels, MixMix eq. 9", 0)
    bn: float = key(40.0, "batch-norm statistics, MixMix eq. 2 and 6; in units of their value at the start", 0)
    adversary: float = key(3.0, "student-teacher divergence, masked where they disagree already", 0)
    diversity: float = key(1.0, "mode-seeking term over same-class pairs, in pixels (MSGAN eq. 3)", 0)
    likeness: float = key(0.0, "squared correlation of same-class feature maps; for classes without a pose", 0)
    spread: float = key(0.0, "RDSKD: change of the prediction per change of the image, over random pairs", 0)
    contrastive: float = key(0.0, "CMI eq. 5: views of one image alike, unlike those of a memory bank", 0)
    tv: float = key(0.0, "total variation of the images (DeepInversion eq. 3)", 0)
    l2: float = key(0.0, "mean square of the normalised images (DeepInversion eq. 3)", 0)
    smooth: float = key(0.0, "distance of the images to themselves blurred (The Knowledge Within)", 0)
    one_hot: float = key(0.0, "DAFL eq. 2: cross-entropy to the teacher's own argmax", 0)
    activation: float = key(0.0, "DAFL eq. 3: large features", 0)
    information: float = key(0.0, "DAFL eq. 4: entropy of the mean prediction", 0)


@dataclass
class Synthesis:
    """Training of the generator."""

    steps: int = key(600, "generator updates, or with inner above 1 rounds of them", 0)
    student_steps: int = key(4, "student updates after each of the steps, where a student trains alongside", 0)
    batch_size: int = key(128, "images per process and generator update", 4)
    lr: float = key(3e-3, "learning rate of Adam", 0)
    betas: list[float] = key([0.5, 0.999], "Adam's decay rates")
    clip: float = key(5.0, "largest gradient norm of the generator; 0: no clipping", 0)
    losses: Losses = key(Losses, "loss weights by name")
    mix: Mix = key(Mix, "Data Mixing")
    bn_distance: Literal["l2", "kl", "square", "mse"] = key(
        "l2", "distance of batch-norm statistics; kl: The Knowledge Within; square: ZeroQ; mse: GDFQ"
    )
    equalise: bool = key(True, "divide each teacher's batch-norm loss by its value at the start")
    learn_weights: bool = key(
        False,
        "learn the weights of ce and bn; the keys' own then only begin (uncertainty weights, Kendall et al. 2018)",
    )
    penalise: bool = key(False, "take exp(ce - ce before) for ce, likewise one_hot and information (RDSKD)")
    adversary_loss: Literal["kl", "l1", "mae", "js"] = key("kl", "divergence of the adversary; mae: DFAD; js: ADI")
    adversary_mask: bool = key(True, "count it only where student and teacher name the same class (CMI)")
    warmup: float = key(0.1, "share of the steps before the adversary starts; it ramps up over as many again", 0, 0.5)
    fade: float = key(0.2, "share of the steps after the adversary's end; it ramps down over as many before", 0, 0.5)
    redraw: int = key(0, "times the generator's first layers are drawn anew, evenly over the first 80 % of steps", 0)
    inner: int = key(1, "updates on the same labels and latents; above 1 a step is a round, and its images are kept", 1)
    pool: int = key(51200, "inner above 1: images kept, in uint8; the stream draws from them alone", 16)
    renew: Literal["none", "first", "all"] = key("none", "inner above 1: layers drawn anew before each round")
    latent_lr: float = key(0.0, "inner above 1: learning rate of Adam on the latents (arch=pixels: the pixels)", 0)
    cosine: bool = key(False, "learning rates go to 0 as a cosine over a round, or without rounds over all steps")
    as_trained: bool = key(
        True, "teachers see the images moved at random as their training's were, whose statistics batch norms hold"
    )
    jitter: int = key(0, "pixels by which the images are shifted at random before the teachers see them", 0, 64)
    flip: bool = key(False, "flip all images at random before the teachers see them")
    coarse: float = key(0.0, "share of a round in which the teachers see the images at half their size", 0, 1)
    bank: int = key(0, "features kept for the contrastive loss", 0)


@dataclass
class StudentSpec:
    """The small network that is distilled."""

    model: str = key("", "model string")
    weights: str = key(
        "",
        "checkpoint to start from (./teacher for a file of that name); teacher: the layers and channels of its teacher "
        "that it has itself (weight selection, Xu et al. 2024); empty: random",
    )
    kwargs: dict[str, Any] = key({}, "further arguments of the model")


@dataclass
class Distill:
    """Training of the student on streamed images."""

    steps: int = key(0, "student updates on the frozen generator, after the alternating phase", 0)
    batch_size: int = key(128, "images per process and student update", 2)
    lr: float = key(0.1, "peak learning rate of SGD (momentum 0.9, cosine)", 0)
    weight_decay: float = key(5e-4, "weight decay", 0)
    warmup: int = key(100, "updates of linear learning-rate warm-up, at most a tenth of all", 0)
    loss: Literal["kl", "l1", "mae"] = key(
        "kl", "kl: Hinton et al. 2015 at `temperature`; l1: on standardised logits; mae: on logits as they are"
    )
    temperature: float = key(20.0, "temperature of kl", 0.1)
    features: float = key(
        3.0,
        "weight of the teachers' features, what their last linear layers are given (0, or where one has none: logits)",
        0,
    )
    hints: float = key(
        100.0,
        "weight of what the last block of every stage of the teacher gives, where the student began with its weights "
        "(student.weights=teacher) and has as many channels there; not used with attention",
        0,
    )
    maps: float = key(
        3.0,
        "weight of what the stages of a main teacher (of the largest weight) give, predicted from the student's "
        "through 1x1 convolutions; fades over the last quarter of the updates; of no effect where hints or attention "
        "apply, or no stage has one size in both",
        0,
    )
    attention: float = key(
        0.0, "weight of attention transfer from a main teacher, of the largest weight (ZSKT eq. 2)", 0
    )
    clip: float = key(0.0, "largest gradient norm of the student; 0: no clipping", 0)
    replay: int = key(200, "batches kept of what the generator drew, with their targets; 0: fresh images only", 0)
    fresh: float = key(0.5, "replay above 0: share of a batch that is drawn anew", 0.05, 1)
    shift: float = key(0.125, "augmentation (of qat and prune too): random shift as a share of the image size", 0, 0.5)
    flip: bool = key(False, "augmentation (of qat and prune too): random horizontal flip")
    mix: float = key(
        0.5,
        "augmentation (of qat and prune too): share of batches whose fresh images are mixed before the teacher answers",
        0,
        1,
    )
    input: str | None = key(None, "an earlier task (prune) or a folder whose model is trained on; null: student.model")
    source: Source = key("generator", SOURCE)


@dataclass
class FewBits:
    """What qat and ptq have in common: what is quantised, and to how many bits."""

    input: str = key("main", INPUT)
    source: Source = key("generator", SOURCE)
    weights: int = key(4, "bits of the weights", 2, 8)
    activations: int = key(4, "bits of the activations", 2, 8)
    ends: list[int] = key([8, 8], "bits of weights and input of the first and the last layer", 2, 8)
    overrides: dict[str, list[int]] = key({}, "bits by layer name pattern, e.g. {'layer1.*': [8, 4]}")
    ignore: list[str] = key([], "name patterns of layers that stay float")


@dataclass
class Qat(FewBits):
    """Quantisation-aware training with learned steps (LSQ, Esser et al. 2020), as in MixMix section 5.2."""

    images: int = key(512, "images for the first ranges and the warm start", 2)
    warm_start: int = key(150, "updates per block of reconstruction (as ptq does) to start from; 0: from nearest", 0)
    steps: int = key(1000, "updates, images moved and mixed by distill.shift, .flip and .mix", 1)
    batch_size: int = key(128, "images per process and update", 2)
    lr: float | None = key(
        None, "peak learning rate of SGD (momentum 0.9, cosine); null: 0.01, with more than 4 bits 0.001 (LSQ)", 0
    )
    weight_decay: float = key(1e-4, "weight decay", 0)
    temperature: float = key(3.0, "temperature of KL to the float model", 0.1)
    hints: float = key(1.0, "weight of the intermediate-feature loss (The Knowledge Within)", 0)
    replay: int = key(0, "batches kept of what the generator drew, half of each batch; 0: fresh images only", 0)


@dataclass
class Ptq(FewBits):
    """Quantisation after training: nearest, AdaRound (Nagel et al. 2020) or BRECQ (Li et al. 2021)."""

    method: Literal["nearest", "layer", "block"] = key("block", "nearest; layer: AdaRound; block: BRECQ")
    images: int = key(512, "images drawn once", 32)
    steps: int = key(1000, "updates per layer or block", 1)
    drop: float = key(0.5, "share of activations left float at random while learning (QDrop, Wei et al. 2022)", 0, 1)
    fisher: bool = key(False, "weigh a block's error by the squared gradient of KL at its output (BRECQ eq. 10)")


@dataclass
class Prune:
    """Pruning, repaired and fine-tuned on streamed images."""

    input: str = key("main", INPUT)
    source: Source = key("generator", SOURCE)
    kind: Literal["channels", "weights"] = key("channels", "channels: a smaller network (L1); weights: zeros (global)")
    ratio: float = key(0.5, "share of the channels of each layer, or of all weights, that goes", 0.01, 0.99)
    repair: Literal["least_squares", "batch_norm", "none"] = key(
        "least_squares", "least_squares: He et al. 2017; batch_norm: paired re-estimation"
    )
    inner_only: bool | None = key(
        None, "channels: true leaves residual streams whole; false insists on them; null: whatever can go"
    )
    ignore: list[str] = key([], "name patterns of layers that are not pruned")
    images: int = key(1024, "images for the repair", 16)
    steps: int = key(
        1000,
        "updates of fine-tuning by distillation from the model before, images moved and mixed as distill's; 0: none",
        0,
    )
    batch_size: int = key(128, "images per process and update of fine-tuning", 2)
    lr: float = key(0.03, "peak learning rate of fine-tuning (SGD, momentum 0.9, cosine)", 0)
    temperature: float = key(3.0, "temperature of KL to the model before, in fine-tuning", 0.1)
    features: float = key(
        10.0,
        "weight in fine-tuning of what the last linear layer was given before (0, or without one: not learned)",
        0,
    )
    hints: float = key(
        100.0,
        "weight in fine-tuning of what the last block of each row of blocks gave before, where it keeps its channels",
        0,
    )


@dataclass
class Udfc:
    """Pruning and weight quantisation in closed form, without data (docs/closed_form.md)."""

    input: str = key("main", INPUT)
    method: Literal["rectified", "udfc"] = key(
        "rectified", "udfc: our derivation of Bai et al. 2023; rectified: regression of rectified units"
    )
    ratio: float = key(0.2, "share of the channels that goes; 0: none", 0, 0.99)
    bits: int | None = key(None, "bits of the weights' grid (they are stored as float); null: no rounding", 2, 8)
    alpha1: float = key(0.01, "udfc: weight of the shift", 0)
    alpha2: float = key(0.008, "udfc: ridge", 1e-6)
    ignore: list[str] = key([], "name patterns of layers that are left alone")


@dataclass
class Export:
    """Files to deploy."""

    input: str = key("tasks", "tasks: what every compression made; student, one task's name, or none")
    verify: bool = key(True, "run each file in ONNX Runtime: agreement, size, latency")
    images: int = key(1000, "images to verify on", 2)
    threads: int = key(1, "threads of ONNX Runtime", 1)


@dataclass
class Runtime:
    """How it runs. Results differ by rounding alone, but for sync_batchnorm: whose batch the student's norms see."""

    precision: Literal["auto", "fp32", "bf16"] = key("auto", "auto: bf16 where the device is fast at it")
    channels_last: bool = key(True, "memory format of images and convolutions")
    compile: bool = key(
        False,
        "torch.compile for the networks of the tasks generator and distill: minutes to begin with, pays in long runs "
        "in bf16; needs a C++ compiler (on a GPU Triton)",
    )
    cuda_graphs: bool = key(
        True,
        "on a GPU, with one process: the networks' work in the tasks generator and distill, and in the training of "
        "teachers, is recorded once, as CUDA graphs",
    )
    triton: bool = key(
        False,
        "on a GPU: batch norms of generator, teachers and student in a few Triton kernels instead of many of torch's; "
        "not yet timed there",
    )
    sync_batchnorm: bool = key(False, "student batch norm over all processes (the generator's always is)")
    checkpoint_every: float = key(60.0, "seconds between checkpoints for resume, looked at when a line is logged", 0)
    log_every: int = key(50, "student steps (without a student: generator steps) between logged lines", 1)
    grid_every: int = key(500, "student steps (without a student: generator steps) between image grids", 1)
    evaluations: int = key(
        20, "times the student is measured while it trains; their last quarter shows a collapse; 0: only at the end", 0
    )
    minutes: float = key(
        0.0,
        "stop after so long with a whole checkpoint, and go on in the next call; ptq, udfc, repairs and exports, which "
        "have none, run to their end; 0: no limit",
        0,
    )


@dataclass
class Recipe:
    """A whole run."""

    name: str = key("", "name of the run; the recipe's file name unless given")
    description: str = key("", "one line for --list")
    seed: int = key(0, "every random number follows from it", 0, 2**31 - 1)
    output: str | None = key(
        None, "folder of the run; null: runs/NAME, or runs/NAME-TASKS where generator.checkpoint is in runs/NAME"
    )
    overwrite: bool = key(False, "start over where a run exists")
    trust_code: bool = key(False, "run other people's model code (hub: and python:); command line only")
    tasks: list[Task] = key(["distill"], "what to do, in order")
    classes: int = key(10, "classes", 2)
    data: Data = key(Data, "real images")
    image: Image = key(Image, "canonical image")
    training: TeacherTraining = key(TeacherTraining, "training of teachers without checkpoint")
    teachers: dict[str, TeacherSpec] = key({}, "the zoo by name")
    zoo: Zoo = key(Zoo, "use of the zoo")
    generator: GeneratorSpec = key(GeneratorSpec, "generator")
    synthesis: Synthesis = key(Synthesis, "training of the generator")
    student: StudentSpec = key(StudentSpec, "student")
    distill: Distill = key(Distill, "training of the student")
    qat: Qat = key(Qat, "quantisation-aware training")
    ptq: Ptq = key(Ptq, "quantisation after training")
    prune: Prune = key(Prune, "pruning")
    udfc: Udfc = key(Udfc, "closed form")
    export: Export = key(Export, "files to deploy")
    runtime: Runtime = key(Runtime, "how it runs")

    @property
    def folder(self) -> str:
        """Where the run is written: unless it says so, runs/NAME, or beside it where its generator is that run's."""
        if self.output:
            return os.path.expanduser(self.output)
        own, given = f"runs/{self.name}", self.generator.checkpoint
        full = Path(os.path.abspath(os.path.expanduser(given or "")))
        theirs = given is not None and full.is_relative_to(os.path.abspath(own))
        return "-".join([own, *self.tasks]) if theirs else own

    @property
    def zoo_specs(self) -> Mapping[str, TeacherSpec]:
        """The enabled teachers by name."""
        return {name: spec for name, spec in self.teachers.items() if spec.enabled}
