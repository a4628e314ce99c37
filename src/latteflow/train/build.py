"""From a recipe to the stage it describes."""

from __future__ import annotations

import torch

from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.train.autoencoder import AutoencoderStage
from latteflow.train.backbone import BackboneStage
from latteflow.train.generator import GeneratorStage
from latteflow.train.recipe import AutoencoderRecipe, BackboneRecipe, DataSection, GeneratorRecipe
from latteflow.train.stage import Stage


def build_stage(recipe: AutoencoderRecipe | BackboneRecipe | GeneratorRecipe) -> Stage:
    """Read the recipe's data and build its stage, weights initialised from the recipe's seed.

    Raises:
        UserError: the data set, the autoencoder or the backbone that the recipe names is not there.
    """
    images, heldout = (load_split(recipe.data, split) for split in ("train", "heldout"))
    torch.manual_seed(recipe.train.seed)  # initial weights come from torch's global generator
    if isinstance(recipe, AutoencoderRecipe):
        return AutoencoderStage(recipe.autoencoder, images, heldout)
    if isinstance(recipe, BackboneRecipe):
        return BackboneStage(recipe.backbone, images, heldout)
    return GeneratorStage(recipe.generator, images, heldout, seed=recipe.train.seed)


def load_split(data: DataSection, split: str) -> CaptionedImages:
    """Read one split with the recipe's filters; training pictures with the extra styles, if the recipe wants them."""
    filters = data.model_dump(exclude={"path", "extra"})
    images = load_captioned_images(data.path, split, **filters)
    if split == "train" and data.extra:
        images = images.joined(load_captioned_images(data.path, "extra", **{**filters, "styles": ()}))
    return images
