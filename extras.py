"""What `pip install openvla` leaves out: which extra brings a library, and the words for one that is missing."""

import importlib.util
import warnings


# Library, by the name it is imported under -> the extras that bring it, the smallest first. Not here are libraries of
# pyproject.toml's first list and names that nobody knows: where one of those is missing, something is broken.
EXTRAS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("av", "google_crc32c", "h5py", "pyarrow", "tensorflow_datasets"), ("data", "train", "sim")),
    "simplejpeg": ("data", "train", "sim", "oft"),
    "accelerate": ("train", "quant"),
    **dict.fromkeys(("peft", "tensorboard"), ("train",)),
    "bitsandbytes": ("quant",),
    **dict.fromkeys(("gymnasium", "metaworld", "mujoco"), ("sim",)),
    "robosuite": ("robosuite",),
    **dict.fromkeys(
        ("fastapi", "msgpack", "prometheus_client", "python_multipart", "starlette", "uvicorn", "websockets"),
        ("serve",),
    ),
    "ray": ("ray",),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), ("onnx",)),
    "matplotlib": ("demo",),
    "diffusers": ("diffusion", "oft"),
}


def ignore_library_warnings() -> None:
    """For programs: warnings of one library about another, which nobody who reads them can do anything about."""
    # peft 0.21 reads it of every model of transformers 5.24.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def remedy(library: str | None, preferred: str | None = None) -> str | None:
    """The words for a library that is not installed; None if no extra brings it.

    Args:
        preferred: The extra to name if it brings the library, too: it brings everything else that is needed.
    """
    extras = EXTRAS.get(library or "", ())
    if not extras:
        return None
    extra = preferred if preferred in extras else extras[0]
    return f"{library}, which is not installed: pip install 'openvla[{extra}]'."


def require(*libraries: str, purpose: str, preferred: str | None = None) -> None:
    """Before work begins: raise a `ModuleNotFoundError` that names the first of `libraries` that is missing.

    Args:
        libraries: Names of the table.
        purpose: What needs them, as the message begins: "strategy 'lora'", ...
        preferred: See `remedy`.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(f"{purpose} needs {remedy(library, preferred)}", name=library)
