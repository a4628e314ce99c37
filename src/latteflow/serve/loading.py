"""Loading a model as whoever starts a program asks for it: device, dtype, and what went wrong in one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.errors import UserError

if TYPE_CHECKING:
    import torch

    from latteflow.pipeline import LatteFlowPipeline

DTYPES = ("float32", "bfloat16", "float16")


def load_pipeline(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    *,
    compiled: bool = False,
) -> LatteFlowPipeline:
    """Load a pipeline onto a device, quietly; float32 on CPU and for embedded models, bfloat16 elsewhere.

    With ``compiled`` its groups are compiled when they first draw.

    Raises:
        UserError: there is no such model, its files are broken or another model's, or it cannot be had in that way.
    """
    check_asked(model, dtype)
    import torch
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import disable_progress_bars
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    from latteflow.models.embedded import embedded_models, resolve_model
    from latteflow.models.quantization import quantization_config, quantized_settings
    from latteflow.pipeline import LatteFlowPipeline

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    embedded = embedded_models()
    target = target_device(device)
    settings: dict[str, Any] = {} if quantize is None else {"quantization_config": quantization_config(quantize)}
    if dtype is not None:
        settings["dtype"] = getattr(torch, dtype)
    settings = quantized_settings(Path(resolve_model(model)), settings)
    if target.type != "cpu" and model not in embedded:
        settings.setdefault("dtype", torch.bfloat16)
    try:
        pipe = LatteFlowPipeline.from_pretrained(model, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        here = model in embedded or Path(model).exists()
        if not here or isinstance(error, (HfHubHTTPError, HFValidationError)):
            raise UserError(_no_model(model, embedded)) from error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"{model} cannot be loaded as a latteflow model ({reason}): is it complete?") from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(target)
    if compiled:
        pipe.compile()
    return pipe


def fastest_dtype(model: str, device: str | None = None) -> str | None:
    """Return the dtype for many pictures at a time, where it is another than ``load_pipeline`` takes by itself.

    An embedded model answers and draws as well in bfloat16 (benchmarks/results/quantized.md), and a CPU that multiplies
    it natively then does about twice as much; alone, a picture takes the same time.
    """
    import torch

    from latteflow.models.embedded import embedded_models

    if model not in embedded_models() or target_device(device).type != "cpu":
        return None
    can = torch.cpu.get_capabilities()
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else None


def fastest_threads(model: str) -> int | None:
    """Return how many threads a forward of a served model takes, where torch's own number is slower.

    The forwards of embedded models are too small to be shared. OpenMP's threads wait for one another without sleeping,
    but only while a process has no more of them than cores. An engine and a decoder have, and each product then waits
    for threads to wake: a picture takes nearly twice as long (docs/LOG.md).
    """
    from latteflow.models.embedded import embedded_models

    return 1 if model in embedded_models() else None


def check_asked(model: str, dtype: str | None) -> None:
    """Refuse, before anything heavy is loaded, what can be no model, or is no dtype.

    Raises:
        UserError: it is none.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}: give {', '.join(DTYPES)}")
    from latteflow.models.embedded import embedded_models

    embedded, folder = embedded_models(), Path(model)
    if model in embedded:
        return
    if model and folder.exists():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{model} holds no model_index.json: a model's folder is what save_pretrained writes")
        return
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(_no_model(model, embedded))


def found_anywhere(model: str) -> str:
    """Return a model as a process that runs in another folder finds it."""
    from latteflow.models.embedded import embedded_models

    return model if model in embedded_models() or not Path(model).exists() else str(Path(model).absolute())


def asked_weights(dtype: str | None, quantize: str | None) -> dict[str, object]:
    """Return what a picture's record says of the weights: nothing, if they were what they are by default."""
    return {name: value for name, value in {"dtype": dtype, "quantize": quantize}.items() if value is not None}


def _no_model(model: str, embedded: Iterable[str]) -> str:
    return f"no model {model!r}: embedded are {', '.join(embedded) or 'none'}; a folder or hub id (owner/name) will do"


def target_device(name: str | None) -> torch.device:
    """Return the device of that name; without one, CUDA where there is one, else the CPU.

    Raises:
        UserError: it is not to be had here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not to be had here: leave --device out, or give cpu") from error
    return device
