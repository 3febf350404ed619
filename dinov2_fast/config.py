"""Every setting of a run, as frozen dataclasses in the order in which a run reads them.

A YAML file holds only differences from these defaults, which are official DINOv2's except for the
paper's Sinkhorn-Knopp; the command line overrides the file (`--optimizer.base-lr 2e-4`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml

from dinov2_fast.errors import ConfigError, nearest_name

PRESET_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Bounds:
    """What a value must satisfy, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


Ratio = Annotated[float, Bounds("in [0, 1]", lambda value: 0 <= value <= 1)]
RatioBelowOne = Annotated[float, Bounds("in [0, 1)", lambda value: 0 <= value < 1)]
Positive = Annotated[float, Bounds("greater than 0", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Bounds("at least 0", lambda value: 0 <= value < math.inf)]
Count = Annotated[int, Bounds("at least 1", lambda value: value >= 1)]
CountOrNone = Annotated[int | None, Bounds("at least 1", lambda value: value is None or value > 0)]
CountOrZero = Annotated[int, Bounds("at least 0", lambda value: value >= 0)]
AreaRange = Annotated[
    tuple[float, float], Bounds("two values, 0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1)
]


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and what happens to broken ones."""

    path: str = ""
    """Folder (searched recursively), text file listing images, tar file or folder of tar files."""
    num_workers: Annotated[int, Bounds("at least -1", lambda value: value >= -1)] = -1
    """Loader processes; 0 decodes in the main process, -1 takes one per free core."""
    prefetch_batches: Count = 2
    """Batches each worker keeps ready."""
    max_pixels: Count = 178_956_970
    """Images whose header announces more pixels are refused before they are decoded."""
    max_bad_ratio: Ratio = 0.001
    """The run stops with exit code 3 once more than this share of the images is unreadable."""


@dataclass(frozen=True)
class CropConfig:
    """Multi-crop augmentation. Source: DINOv2 (defaults of its training code)."""

    global_px: Count = 224
    """Side of the two global crops; a multiple of the patch size."""
    local_px: Count = 98
    """Side of the local crops; a multiple of the patch size."""
    num_local: CountOrZero = 8
    """Local crops per image."""
    global_scale: AreaRange = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_scale: AreaRange = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    horizontal_flip_probability: Ratio = 0.5
    """Probability of mirroring a crop."""
    color_jitter_probability: Ratio = 0.8
    """Probability of colour jitter."""
    brightness: NotNegative = 0.4
    """Colour jitter: brightness factor is drawn from 1 +- this."""
    contrast: NotNegative = 0.4
    """Colour jitter: contrast factor is drawn from 1 +- this."""
    saturation: NotNegative = 0.2
    """Colour jitter: saturation factor is drawn from 1 +- this."""
    hue: NotNegative = 0.1
    """Colour jitter: hue shift is drawn from +- this share of the colour circle."""
    grayscale_probability: Ratio = 0.2
    """Probability of dropping colour."""
    solarize_probability: Ratio = 0.2
    """Probability of solarizing the second global crop."""
    blur: Literal["recipe", "official", "paper"] = "recipe"
    """Blur probability of both globals and the locals: official 0, 0.9, 0.5; paper 1, 0.1, 0.5."""


@dataclass(frozen=True)
class MaskConfig:
    """Block masks of the iBOT term."""

    probability: Ratio = 0.5
    """Share of the global crops that are masked."""
    min_ratio: Ratio = 0.1
    """Smallest share of masked patches in a masked crop."""
    max_ratio: Ratio = 0.5
    """Largest share of masked patches in a masked crop."""


@dataclass(frozen=True)
class ModelConfig:
    """The backbone. Fields left at `None` come from the architecture's preset."""

    arch: str = "vits14"
    """Name of an architecture: vits14, vitb14, vitl14, vitg14, each also with `_reg4`; or debug."""
    patch_size: CountOrNone = None
    """Side of a patch in pixels."""
    embed_dim: CountOrNone = None
    """Width of the token vectors."""
    depth: CountOrNone = None
    """Number of blocks."""
    num_heads: CountOrNone = None
    """Attention heads."""
    ffn: Literal["mlp", "swiglu"] | None = None
    """Feed-forward layer: mlp (GELU) or swiglu."""
    num_registers: int | None = None
    """Register tokens."""
    drop_ratio: RatioBelowOne = 0.3
    """Stochastic depth: share of samples each residual branch skips; the same in every block."""
    layer_scale: NotNegative = 1e-5
    """Initial value of the LayerScale vectors; 0 leaves them out."""
    position_resize: Literal["preset", "official", "antialias"] = "preset"
    """Resizing of position embeddings; preset: official without, antialias with registers."""
    recompute: Literal["none", "mlp", "block"] = "none"
    """What a backward pass computes anew to save memory: the hidden layer; q, k, v too."""


@dataclass(frozen=True)
class HeadConfig:
    """A projection head with its prototypes."""

    num_prototypes: Count = 65536
    """K, rows of the last layer."""
    hidden_dim: Count = 2048
    """Width of the hidden layers."""
    bottleneck_dim: Count = 256
    """Width of the normalised vector that meets the prototypes."""
    num_layers: Count = 3
    """Linear layers before the prototypes."""


@dataclass(frozen=True)
class LossConfig:
    """The objective."""

    dino_weight: NotNegative = 1.0
    """Weight of the image-level cross-entropy."""
    ibot_weight: NotNegative = 1.0
    """Weight of the patch-level cross-entropy on masked patches."""
    koleo_weight: NotNegative = 0.1
    """Weight of the KoLeo term."""
    koleo_crops: Literal["recipe", "both", "first"] = "recipe"
    """Global crops that enter KoLeo: official both, paper the first."""
    centering: Literal["sinkhorn_knopp", "softmax_centering"] = "sinkhorn_knopp"
    """How teacher scores become targets."""
    sinkhorn_iterations: Count = 3
    """Rounds of Sinkhorn-Knopp."""
    center_momentum: Ratio = 0.9
    """Momentum of the centre under softmax_centering."""
    student_temperature: Positive = 0.1
    """Temperature of the student's softmax, both terms."""
    separate_ibot_head: bool = False
    """Untie the patch-level head from the image-level one."""
    dino_head: HeadConfig = field(default_factory=HeadConfig)
    """Image-level head; also the patch-level one unless separate_ibot_head is set."""
    ibot_head: HeadConfig = field(default_factory=HeadConfig)
    """Patch-level head when separate_ibot_head is set."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what multiplies its learning rate."""

    base_lr: Positive = 4e-3
    """Peak learning rate before scaling with the batch size."""
    lr_scaling: Literal["sqrt_wrt_1024", "linear_wrt_256", "none"] = "sqrt_wrt_1024"
    """How base_lr grows with the global batch size."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the end; not scaled."""
    beta1: RatioBelowOne = 0.9
    """Decay of the first moment."""
    beta2: RatioBelowOne = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_norm: NotNegative = 3.0
    """Gradient norm allowed in each of backbone, dino head and ibot head; 0 turns clipping off."""
    layer_decay: Ratio = 0.9
    """Learning-rate factor per block counted from the top."""
    patch_embed_lr_multiplier: NotNegative = 0.2
    """Further factor on the patch embedding."""


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes over a run. Ratios are shares of total_steps."""

    total_steps: Count = 125_000
    """Optimizer steps; official DINOv2 counts 1250 to an epoch whatever the data."""
    warmup_ratio: Ratio = 0.1
    """Share of the steps with linearly growing learning rate."""
    weight_decay_start: NotNegative = 0.04
    """Weight decay at the first step."""
    weight_decay_end: NotNegative = 0.4
    """Weight decay after the last step (cosine)."""
    momentum_start: Ratio = 0.992
    """EMA momentum of the teacher at the first step."""
    momentum_end: Ratio = 1.0
    """EMA momentum after the last step (cosine)."""
    teacher_temperature_start: Positive = 0.04
    """Teacher temperature at the first step."""
    teacher_temperature_end: Positive = 0.07
    """Teacher temperature after its warm-up."""
    teacher_temperature_warmup_ratio: Ratio = 0.3
    """Share of the steps over which the teacher temperature grows linearly."""
    freeze_last_layer_ratio: Ratio = 0.01
    """Share of the steps during which the prototypes' learning rate is 0."""


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out."""

    seed: CountOrZero = 0
    """Seed of weights, data order, crops, masks and dropped samples."""
    batch_size: Count = 64
    """Images per process and step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs backbone and heads under autocast; auto: bf16 where it is faster at the start."""
    deterministic: bool = True
    """The same bits in every run on a GPU too; sums in any order may be faster."""
    num_threads: CountOrZero = 0
    """CPU threads of the training process; 0 keeps torch's choice."""
    log_every_steps: Count = 10
    """Steps between lines on the screen and in metrics.jsonl."""
    checkpoint_every_steps: Count = 3750
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: Count = 3
    """Newest checkpoints that are kept."""
    max_nonfinite_steps: CountOrZero = 2
    """Skipped steps in a row after which the run gives up with exit code 4."""
    stop_step: CountOrNone = None
    """Save and stop after this many steps; no schedule changes, and the run can go on later."""


@dataclass(frozen=True)
class Config:
    """A whole pretraining run."""

    recipe: Literal["official", "paper"] = "official"
    """Blur and KoLeo crops: official as in the published training code, paper as in its text."""
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def updated(self, overrides: dict[str, Any]) -> Config:
        """A checked copy with dotted overrides applied, for instance `{"optimizer.base_lr": 2e-4}`.

        Raises:
            ConfigError: unknown key (with the nearest known one), wrong type or value.
        """
        config = self
        for key, value in overrides.items():
            nested = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            config = _updated(config, nested, "")
        validate(config)
        return config


def preset_names() -> list[str]:
    """Names that `load_config` takes instead of a path."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_config(name_or_path: str, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration of a preset or YAML file with dotted overrides applied.

    Args:
        name_or_path: a preset's name or the path of a YAML file of differences from the defaults.
        overrides: for instance `{"optimizer.base_lr": 2e-4}`; applied after the file.
    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, no such preset.
    """
    path = PRESET_FOLDER / f"{name_or_path}.yaml"
    known = preset_names()
    if name_or_path not in known:
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(
                f"config: no preset or file named {name_or_path!r}"
                f"{nearest_name(name_or_path, known)}; presets are {', '.join(known)}"
            )
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())  # the parser draws over several lines
        raise ConfigError(f"config: {path} is not valid YAML: {words}") from error
    return _updated(Config(), values or {}, "").updated(overrides or {})


def validate(config: Any, prefix: str = "") -> None:
    """Check what plain types cannot say, for every field whose annotation carries `Bounds`.

    Raises:
        ConfigError: a value outside its range; the message names the key and the range.
    """
    for key, kind in typing.get_type_hints(config.__class__, include_extras=True).items():
        value = getattr(config, key)
        if dataclasses.is_dataclass(value):
            validate(value, f"{prefix}{key}.")
        for bounds in getattr(kind, "__metadata__", ()):
            if isinstance(bounds, Bounds) and not bounds.holds(value):
                raise ConfigError(f"config: {prefix}{key} must be {bounds.text}, got {value}")
    if isinstance(config, MaskConfig) and config.min_ratio > config.max_ratio:
        raise ConfigError(f"config: {prefix}min_ratio must not exceed {prefix}max_ratio")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries; `load_config` reads it back from YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in cast("dict[str, Any]", value).items()}
        return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(to_dict(config)), sort_keys=False)


def _updated(config: Any, values: Any, prefix: str) -> Any:
    """A copy of a dataclass with nested differences applied; an empty section has none."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"config: {prefix.rstrip('.') or 'the file'} must be a mapping, got {values!r}"
        )
    hints = typing.get_type_hints(config.__class__)
    changes: dict[str, Any] = {}
    for key, value in cast("dict[str, Any]", values).items():
        if key not in hints:
            nearest, known = nearest_name(str(key), list(hints)), ", ".join(hints)
            raise ConfigError(f"config: unknown key {prefix}{key}{nearest}; known: {known}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _updated(current, {} if value is None else value, f"{prefix}{key}.")
        else:
            changes[key] = _converted(value, hints[key], f"{prefix}{key}")
    return dataclasses.replace(config, **changes)


def _converted(value: Any, kind: Any, key: str) -> Any:
    """A YAML value as the annotated type; ints become floats, lists tuples, `2e-4` a float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # every union here is "or None"
        if value is None and type(None) in arguments:
            return None
        return _converted(value, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(
            f"config: {key} must be one of {', '.join(map(str, arguments))}, got {value!r}"
        )
    if origin is tuple:
        items = list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else []
        if len(items) == len(arguments):
            return tuple(_converted(v, a, key) for v, a in zip(items, arguments, strict=True))
        raise ConfigError(f"config: {key} must be a list of {len(arguments)} values, got {value!r}")
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 reads 2e-4 (no dot) as a string
    is_switch = kind is int and isinstance(value, bool)  # Python counts those among integers
    if kind is not float and isinstance(value, kind) and not is_switch:
        return value
    raise ConfigError(f"config: {key} must be {kind.__name__}, got {value!r}")
