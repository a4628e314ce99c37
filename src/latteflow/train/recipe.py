"""Recipes: YAML merged with ``key=value`` overrides by OmegaConf, then validated by pydantic.

A recipe names its stage; the stage decides which sections it has. Unknown keys are refused with the nearest known one.
A recipe's ``smoke:`` block is an override that makes the same run finish in seconds; ``smoke=true`` merges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from latteflow.errors import UserError
from latteflow.train.recipe_file import explained, read_values

Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Which pictures, and how they are read."""

    kind: Literal["captioned", "image_folder", "captions_csv", "webdataset", "parquet", "shapes", "latents"] = (
        "captioned"
    )
    """``captioned``: a set of this project's own, in memory; the others are read sample by sample (docs/data.md)."""
    path: str = "data/emoji"
    size: PositiveInt | None = None
    """Pixels a side that pictures are brought to; of a captioned set, its own."""
    buckets: bool = False
    """Keep the shape of pictures: sizes of about ``size`` squared, one a batch."""
    class_names: str | None = None
    """Of an image folder: a file that names its classes."""
    caption_field: str | None = None
    """Of webdataset shards: the field of ``.json`` files that holds the caption."""
    split: str | None = None
    """Of parquet: which split; left out, ``train``."""
    picture_column: str | None = None
    caption_column: str | None = None
    revision: str | None = None
    """Of parquet from the hub: a branch, tag or commit."""
    cache: str | None = None
    """Of parquet: where ``datasets`` keeps its Arrow files."""
    streaming: bool = False
    """Of parquet, for ``latteflow encode`` alone: read rows as they come, without a copy."""
    quarantine_limit: Probability = 0.01
    """The share of samples that may be unreadable."""
    validation: NonNegativeInt = 512
    """How many samples, of all over the source, are kept for validation; of a captioned set, its held-out ones are."""
    selection: Literal["all", "drawable"] = "all"
    """A choice of concepts by rules, the same for every split (``latteflow.data.selection``)."""
    extra: bool = False
    """Train on the set's extra styles as well: other drawings of the same things, which nothing is measured on."""
    leave_out_groups: tuple[str, ...] = ()
    leave_out_subgroups: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    """The styles to keep; empty keeps all."""
    skin_tones: tuple[str, ...] = ()
    """The skin tones to keep; empty keeps all."""


class TrainSection(Section):
    """The loop: the same for every stage."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Samples an optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: PositiveInt = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for the matrices inside the network, AdamW for the rest."""
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    beta2: Probability = 0.99
    warmup_steps: NonNegativeInt = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    gradient_clip: PositiveFloat = 1.0
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is no number: stop, or leave the update out."""
    nonfinite_patience: PositiveInt = 3
    """How many updates in a row may be left out."""
    ema_decay: Probability = 0.999
    mixed_precision: Literal["no", "bf16"] = "bf16"
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 20
    preview_every: PositiveInt = 500
    """Steps between picture grids and validation figures."""
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the work: whole weights in each, or sharded."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass: less memory, a third more work."""
    compile: bool = False
    """Compile the repeated layers with torch.compile."""
    workers: NonNegativeInt = 0
    """Processes that read samples ahead; 0 reads in the run's own."""
    cpu_threads: PositiveInt | None = None
    """Threads on CPU; left out, PyTorch's own choice."""

    @model_validator(mode="after")
    def _parts_hold_samples(self) -> TrainSection:
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError("gradient_accumulation_steps must not exceed batch_size: each part needs a sample")
        return self


class AutoencoderSection(Section):
    """The DC-AE (diffusers ``AutoencoderDC``): one width and block count a stage; each stage but the first halves."""

    latent_channels: PositiveInt = 16
    widths: tuple[PositiveInt, ...] = (32, 64, 128, 256)
    layers: tuple[NonNegativeInt, ...] = (0, 1, 1, 1)
    """Blocks a stage. 0 in front joins the first stage to the second: no work is done at full resolution."""
    latent_noise: NonNegativeFloat = 0.0
    """Noise added to the latents before decoding in training, as a fraction of their batch spread. [D]"""
    gradient_weight: NonNegativeFloat = 0.0
    """Weight of the L1 loss on differences of neighbouring pixels, beside L1 on the pixels themselves. [D]"""


class ClassifierSection(Section):
    """The judge, or the teacher of the backbone's vision tower."""

    picture_size: PositiveInt = 128
    """Side that pictures are enlarged to."""
    frozen_blocks: Annotated[int, Field(ge=1, le=15)] = 5
    """How many of the network's 16 blocks stay as ImageNet made them; they are cheap at no gradient."""
    blend_share: Probability = 0.2
    """Share of pictures that another one is laid over."""
    start_from_means: bool = True
    """Start each concept's vector from its pictures' mean features, which takes a pass over the set."""


class VisionSection(Section):
    """The vision tower of the small Qwen2-VL, trained alone before words come in."""

    teacher: str
    """Folder of the trained teacher."""
    hidden_size: PositiveInt = 256
    num_heads: PositiveInt = 4
    vision_depth: PositiveInt = 6
    vision_width: PositiveInt = 192
    vision_heads: PositiveInt = 4
    patch_size: PositiveInt = 8
    others_share: Probability = 0.4
    """Share of pictures that come from the whole training set, with what the selection leaves out; the teacher and
    their styles say what they are."""
    mild_share: Probability = 0.5
    """Share of pictures that are only moved, by whole pixels; the others are distorted."""
    blend_share: Probability = 0.6
    """Share of the distorted pictures that another one is laid over."""


class BackboneSection(Section):
    """The small Qwen2-VL of the embedded model, and its tokenizer."""

    vision: str | None = None
    """Folder of a trained vision tower to start from; left out, the tower starts from nothing."""
    teacher: str | None = None
    """Folder of the trained teacher, which then goes on teaching the tower; left out, labels alone do."""
    vocabulary: PositiveInt = 3072
    hidden_size: PositiveInt = 256
    intermediate_size: PositiveInt = 640
    num_layers: PositiveInt = 12
    num_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    vision_depth: PositiveInt = 4
    vision_width: PositiveInt = 192
    vision_heads: PositiveInt = 4
    patch_size: PositiveInt = 8
    turns: Annotated[int, Field(ge=1, le=5)] = 2
    """Questions asked about one picture in one training sequence."""
    conversation_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of a batch's pictures that are talked about; all are classified."""
    class_weight: NonNegativeFloat = 1.0
    """Weight of what the readers learn (classes, the teacher's features) beside the loss on words. [D]"""
    blend_share: Probability = 0.5
    """Share of distorted pictures, not talked about, that another is laid over, where there is a teacher."""
    mild_share: Probability = 0.5
    """Share of pictures that are only moved, by whole pixels, where there is a teacher; the others are distorted."""
    text_share: Probability = 0.15
    """Share of conversations without a picture: a loose description to its canonical caption."""
    augment: bool = True


class LoraSection(Section):
    """Adapters beside frozen weights, through PEFT."""

    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    """Their output is scaled by alpha / rank; left out, by 1."""


class EncodeSection(Section):
    """Latents ahead of training: ``latteflow encode``."""

    output: str
    """Folder of the shards."""
    shard_size: PositiveInt = 1024
    batch_size: PositiveInt = 32
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    contexts: bool = False
    """Prompts' contexts as well."""
    backend: Literal["local", "ray"] = "local"
    workers: NonNegativeInt = 0
    """Ray actors, each with an autoencoder of its own; 0 for one a device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU where there is one."""
    readers: PositiveInt = 4
    """Threads a worker that read pictures ahead."""
    cpu_threads: PositiveInt = 1
    """Threads a worker that compute, without a GPU."""


class GeneratorSection(Section):
    """The replica and how it is trained."""

    autoencoder: str
    """Folder of the trained autoencoder."""
    backbone: str
    """Folder of the trained backbone and its processor."""
    start_from: str | None = None
    """A trained pipeline (folder or embedded model) of the same shape, whose replica's weights are taken over."""
    num_groups: PositiveInt = 4
    edges: tuple[float, ...] | None = None
    """Edges of the timestep intervals; left out, uniform."""
    residual_attention: Literal["probs", "logits", "none"] = "probs"
    shared_io: bool = True
    """One patch embedding, time embedding and head for all groups; if false, groups share no trainable weight."""
    lora: LoraSection | None = None
    """Train adapters only; left out, every weight of the replica."""
    groups: tuple[NonNegativeInt, ...] | None = None
    """The groups to train; left out, all. Others keep their weights. Needs ``shared_io: false``."""
    patch_size: PositiveInt = 1
    time_embedding_size: PositiveInt = 128
    initial_scale: float = 0.3
    """scale(t) of both branches of a layer at the start. [D]"""
    pooled_context: PositiveInt | None = None
    """Width inside a perceptron a layer that adds the words' mean value to every token; left out, none. [D]"""
    density: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    uniform_mix: Annotated[float, Field(ge=0.1, le=1)] = 0.1
    narrowing_steps: NonNegativeInt = 0
    """Steps over which each expert's times narrow from all up to its interval's end to its interval alone. [D]"""
    prompt_dropout: Probability = 0.1
    captions_per_image: PositiveInt = 4
    """Captions of each picture, the canonical one and others that are drawn; their contexts are computed once."""
    copies_per_image: PositiveInt = 1
    """Latents of each picture in memory: its own, and those of copies moved by up to two pixels, on white."""
    latent_scale: Literal["channel", "common"] = "channel"
    """Latents get spread 1 in every channel, or one factor for all channels gives them spread 1 together. [D]"""
    preview_prompts: tuple[str, ...] = ("a slice of pizza, noto style",)
    guidance_scale: float = 3.0

    @model_validator(mode="after")
    def _groups_are_apart(self) -> GeneratorSection:
        if self.groups is not None:
            if self.shared_io:
                raise ValueError(
                    "groups can be trained one by one only where they share no weight: set shared_io=false"
                )
            if not self.groups or not set(self.groups) <= set(range(self.num_groups)):
                raise ValueError(f"groups has to name some of 0 to {self.num_groups - 1}")
        return self


class StageRecipe(Section):
    """What the recipes of all stages have."""

    output: str
    """Folder of checkpoints, previews, logs and the final weights."""
    data: DataSection = DataSection()
    train: TrainSection


class AutoencoderRecipe(StageRecipe):
    """Stage one: pictures to latents and back."""

    stage: Literal["autoencoder"]
    autoencoder: AutoencoderSection = AutoencoderSection()


class VisionRecipe(StageRecipe):
    """Before stage two: its vision tower, taught by a classifier."""

    stage: Literal["vision"]
    vision: VisionSection


class BackboneRecipe(StageRecipe):
    """Stage two: a vision-language model that captions and answers."""

    stage: Literal["backbone"]
    backbone: BackboneSection = BackboneSection()


class ClassifierRecipe(StageRecipe):
    """A classifier of pictures, beside the model: the judge, or the teacher."""

    stage: Literal["classifier"]
    classifier: ClassifierSection = ClassifierSection()


class GeneratorRecipe(StageRecipe):
    """Stage three: the replica, with backbone and autoencoder frozen."""

    stage: Literal["generator"]
    generator: GeneratorSection
    encode: EncodeSection | None = None


AnyRecipe: TypeAlias = AutoencoderRecipe | ClassifierRecipe | VisionRecipe | BackboneRecipe | GeneratorRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="stage")]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe and apply ``key=value`` overrides (dotted keys; ``smoke=true`` merges the recipe's smoke block).

    Raises:
        UserError: no such file, not YAML, an override without ``=``, an unknown key, or a value of the wrong kind.
    """
    values = read_values(Path(path), overrides)
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{path}: {explained(error, _known_keys(), _STAGES)}") from error


_STAGES = ("autoencoder", "classifier", "vision", "backbone", "generator")


def _known_keys() -> set[str]:
    sections: list[type[Section]] = [*get_args(AnyRecipe), DataSection, TrainSection, AutoencoderSection]
    sections += [ClassifierSection, VisionSection, BackboneSection, GeneratorSection, LoraSection, EncodeSection]
    return {name for section in sections for name in section.model_fields}


def resolved(recipe: Section) -> dict[str, Any]:
    """Return the recipe as plain JSON values, every default written out: what a run records beside its weights."""
    return recipe.model_dump(mode="json")
