"""What a call may ask for: bounds that catch a mistake before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from latteflow.errors import UserError

_MOST_STEPS = 1000
_MOST_TOKENS = 16_384
"""Tokens of one picture: a bound against a size that was meant otherwise, not against any real one."""


def check_prompt(prompt: str | Sequence[str] | None, context: object) -> None:
    """Refuse what is neither words nor a list of them, and a prompt beside the context of one.

    Raises:
        UserError: it is neither, an empty list, or both or none of the two are given.
    """
    if (prompt is None) == (context is None):
        raise UserError("give a prompt, or the context of one")
    whole = prompt is None or isinstance(prompt, str)
    if not whole and not (prompt and all(isinstance(one, str) for one in prompt)):
        raise UserError(f"prompt has to be a string or a list of them: got {prompt!r}")


def check_size(height: int, width: int, *, factor: int) -> None:
    """Refuse a size in pixels that is no whole number of tokens of ``factor`` a side, or of far too many.

    Raises:
        UserError: it is.
    """
    for name, side in (("height", height), ("width", width)):
        if side < factor or side % factor:
            raise UserError(f"{name} {side} does not do: give a multiple of {factor}")
    if height * width > _MOST_TOKENS * factor**2:
        raise UserError(f"{height}x{width} is more than {_MOST_TOKENS} tokens of {factor}x{factor}: draw smaller")


def check_output(output_type: str, tensor_inputs: Sequence[str], offered: Sequence[str]) -> None:
    """Refuse an output, or tensors for a callback, that are not offered.

    Raises:
        UserError: they are not.
    """
    if output_type not in ("pil", "np", "pt", "latent"):
        raise UserError(f"output_type is pil, np, pt or latent: got {output_type!r}")
    if not set(tensor_inputs) <= set(offered):
        raise UserError(f"callback_on_step_end_tensor_inputs can hold {list(offered)} only")


def check_sampling(
    steps: int, guidance_scale: float, guidance_interval: Sequence[float], num_images_per_prompt: int
) -> None:
    """Refuse numbers that no picture can be drawn with.

    Raises:
        UserError: one is.
    """
    if not 1 <= steps <= _MOST_STEPS:
        raise UserError(f"num_inference_steps has to be 1 to {_MOST_STEPS}: got {steps}")
    if not 0 <= guidance_scale <= 100:  # false for NaN, too
        raise UserError(f"guidance_scale has to be 0 to 100: got {guidance_scale}")
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise UserError(f"guidance_interval has to be two times from 0 to 1, in order: got {guidance_interval}")
    if num_images_per_prompt < 1:
        raise UserError(f"num_images_per_prompt has to be 1 or more: got {num_images_per_prompt}")
