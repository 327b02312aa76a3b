"""One interface to what runs a graph: ONNX Runtime, or OpenVINO."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .choices_openvla import check_choice


PROVIDERS = {  # of ONNX Runtime, by the names that people say
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}
OPENVINO = "openvino"
EXACT = ("cpu", "cuda", OPENVINO)  # compute in float32 what is exported in float32; others may in less
MOST_THREADS = 1024  # ONNX Runtime starts as many as it is told, until the memory is full
OPTIONS = {"cuda": {"use_tf32": "0"}}  # otherwise products of float32 keep 10 bits: other tokens than the model's
WIDE_SUMS = ("session.x64quantprecision", "1")  # of ONNX Runtime: products of 8 bits by slower kernels, which are exact


class Session(Protocol):
    """A graph that is ready to run.

    inputs: Shape of each, None where a size is free, and type.
    """

    inputs: dict[str, tuple[tuple[int | None, ...], np.dtype]]

    def run(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        ...


class OnnxSession:
    """A graph in ONNX Runtime."""

    def __init__(self, file: Path, provider: str, threads: int | None, of_8_bits: bool):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if of_8_bits and needs_wide_sums():  # for every provider: what it has no kernel for the CPU multiplies
            options.add_session_config_entry(*WIDE_SUMS)
        if threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        chosen = PROVIDERS[provider]
        # What a provider cannot do the CPU does.
        providers = {chosen: OPTIONS.get(provider, {}), PROVIDERS["cpu"]: {}}
        self._session = onnxruntime.InferenceSession(file, options, providers=list(providers.items()))
        if chosen not in self._session.get_providers():  # ONNX Runtime goes on with the CPU alone
            raise ValueError(
                f"provider='{provider}' could not be started, mostly because libraries of it are missing or of another "
                "version (ONNX Runtime has said which): install what this build of onnxruntime needs, or take another."
            )
        self._outputs = [output.name for output in self._session.get_outputs()]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        self.inputs = {
            given.name: (
                tuple(size if isinstance(size, int) else None for size in given.shape),
                np.dtype(types.get(given.type, bool)),
            )
            for given in self._session.get_inputs()
        }

    def run(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(values)), strict=True))


@cache
def needs_wide_sums() -> bool:
    """Whether products of 8 bits are wrong in ONNX Runtime here by themselves: CPUs with AVX2 and without VNNI add them
    in pairs of 16 bits, and cut off what does not fit. Found by multiplying the largest numbers; the exact kernels are
    several times as slow where the others are right.

    Raises:
        ValueError: If they are wrong in both ways.
    """
    import onnxruntime

    weight = np.full((64, 64), 127, np.int8)
    weight[:, ::5] = -127
    for needed in (False, True):
        options = onnxruntime.SessionOptions()
        if needed:
            options.add_session_config_entry(*WIDE_SUMS)
        session = onnxruntime.InferenceSession(_product(weight), options, providers=[PROVIDERS["cpu"]])
        for count in (1, 7, 64):  # each has a kernel of its own
            rows = np.full((count, 64), 255, np.uint8)
            rows[:, ::3] = 0
            (found,) = session.run(None, {"rows": rows})
            if not np.array_equal(found, rows.astype(np.int32) @ weight.astype(np.int32)):
                break
        else:
            return needed
    raise ValueError(
        f"ONNX Runtime {onnxruntime.__version__} gives wrong products of 8 bits on this CPU: install another version."
    )


def _product(weight: np.ndarray) -> bytes:
    """A graph of one `MatMulInteger` with an int8 weight, as ONNX stores it (onnx.proto)."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value // 128)

    def field(place: int, content: int | bytes) -> bytes:
        if isinstance(content, int):
            return number(8 * place) + number(content)
        return number(8 * place + 2) + number(len(content)) + content

    def value(name: bytes, kind: int) -> bytes:
        any_size = field(2, 2 * field(1, b""))
        return field(1, name) + field(2, field(1, field(1, kind) + any_size))

    node = field(1, b"rows") + field(1, b"weight") + field(2, b"product") + field(4, b"MatMulInteger")
    sizes = b"".join(field(1, size) for size in weight.shape)
    constant = sizes + field(2, 3) + field(8, b"weight") + field(9, weight.tobytes())
    given, found = value(b"rows", 2), value(b"product", 6)  # uint8, int32
    graph = field(1, node) + field(2, b"product") + field(5, constant) + field(11, given) + field(12, found)
    return field(1, 8) + field(7, graph) + field(8, field(2, 18))  # versions of the format and of its operators


@cache
def openvino_core() -> Any:
    """One for all graphs, kept for good. Each has a stack for signals of its own; when the first of two goes (2026.4),
    that of the thread is gone with it, and Ctrl-C, or the end of any child process, kills the program."""
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """A graph in OpenVINO, on the CPU, in the precision that it was exported in."""

    def __init__(self, file: Path, threads: int | None):
        # Otherwise a processor that knows bfloat16 computes in it: other tokens than those of the model.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._model = openvino_core().compile_model(file, "CPU", options)
        self.inputs = {
            given.any_name: (
                tuple(None if size.is_dynamic else size.get_length() for size in given.partial_shape),
                np.dtype(given.element_type.to_dtype()),
            )
            for given in self._model.inputs
        }

    def run(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._model(dict(values), share_inputs=True)
        return {name: values for output, values in found.items() for name in output.names}


def open_session(file: Path, provider: str, threads: int | None, of_8_bits: bool = False) -> Session:
    """A graph, ready to run.

    Args:
        provider: One of `PROVIDERS`, or "openvino".
        threads: 1 to `MOST_THREADS`; None: as many as the library chooses.
        of_8_bits: Whether its products are of whole numbers.

    Raises:
        ValueError: If nothing of that name is there, it cannot be started, or the library cannot read the graph.
        ModuleNotFoundError: If OpenVINO is asked for and not installed.
    """
    check_choice("provider", provider, [*PROVIDERS, OPENVINO])
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise ValueError(f"threads={threads!r}: expected a whole number from 1 to {MOST_THREADS}, or None.")
    if provider == OPENVINO:
        try:
            return OpenVinoSession(file, threads)
        except ImportError as error:
            raise ModuleNotFoundError(
                "provider='openvino' needs openvino, which is not installed: pip install 'openvla-runtime[openvino]'.",
                name="openvino",
            ) from error
        except RuntimeError as error:
            if file.with_name(f"{file.name}.data").is_symlink():  # of the Hub's cache: out of the folder
                raise ValueError(
                    f"OpenVINO reads no weights through links, and '{file.parent}' holds such, as the Hub's cache "
                    "does: download it with snapshot_download(..., local_dir=FOLDER), or copy it with the files "
                    f"themselves (cp -rL), and give that folder. {str(error)[:500]}"
                ) from error
            raise ValueError(f"OpenVINO cannot read '{file}': export it again. {str(error)[:500]}") from error
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in there:
        known = [name for name, theirs in PROVIDERS.items() if theirs in there]
        raise ValueError(
            f"provider='{provider}' is not in this build of onnxruntime, which has {', '.join(known)}: install the "
            "build that has it (for CUDA onnxruntime-gpu)."
        )
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return OnnxSession(file, provider, threads, of_8_bits)
    except (
        errors.Fail,
        errors.InvalidProtobuf,
        errors.InvalidGraph,
        errors.NotImplemented,
        errors.NoSuchFile,
    ) as error:
        raise ValueError(f"ONNX Runtime cannot read '{file}': export it again. {str(error)[:500]}") from error
