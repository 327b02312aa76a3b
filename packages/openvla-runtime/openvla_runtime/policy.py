"""The policy: an exported model in control, with what it keeps between two steps of an episode.

One prediction, in the order of its steps: `prompts_openvla` (prompt), `frames_openvla` (pixels), two graphs, greedy
decoding over a draft (`decoding`), `action_tokenizer` (tokens to numbers, numbers to units).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .action_tokenizer import (
    ActionTokenizer,
    check_state_given,
    check_statistics,
    get_action_stats,
    normalize_state,
    resolve_unnorm_key,
    unnormalize_actions,
)
from .decoding import Decoded, LanguageModel
from .fields import check_fields
from .files_openvla import check_file, file_digest, read_json
from .forks_openvla import lock_over_forks
from .frames_openvla import PIXEL_FIELDS, PixelSteps, camera_images, read_samples
from .pixels_openvla import check_largest_pixel
from .prompts_openvla import (
    check_prompt_ids,
    end_with_empty,
    make_prompt,
    special_tokens_of,
    spell_action_tokens,
)
from .sessions import EXACT, open_session


FORMAT_VERSION = 1  # of runtime.json, the newest that is known here
RUNTIME_FILE, VISION_FILE, LANGUAGE_MODEL_FILE = "runtime.json", "vision.onnx", "language_model.onnx"
TOKENIZER_FILE = "tokenizer.json"
FILES = (TOKENIZER_FILE, VISION_FILE, LANGUAGE_MODEL_FILE)


@dataclass
class Prediction:
    """What is known of an action, (action_dim,) each, of models that predict chunks (action_chunk, action_dim).

    actions: float64, in the units of the dataset (un-normalized where its mask is True).
    normalized_actions: float64 in [-1, 1].
    token_ids: int64 ids of the chosen tokens.
    token_probabilities: float32 probability of each chosen token among the action tokens.
    token_entropies: float32 entropy of that distribution in nats; log(256) = 5.5 means no idea.
    passes: Runs of the language model; one where the draft was right, as many as tokens without one.
    """

    actions: np.ndarray
    normalized_actions: np.ndarray
    token_ids: np.ndarray
    token_probabilities: np.ndarray
    token_entropies: np.ndarray
    passes: int


class OnnxPolicy:
    """A model that `openvla export --to onnx` wrote, in control.

    The tokens of the last action ride along with the next prompt (a draft): where they are what the model would choose
    again, they cost nothing. In float32 they never change what is chosen. One policy follows one episode; from several
    threads it answers one after another.

    Args:
        folder: What the export wrote.
        unnorm_key: Dataset in whose units actions are. May be left out where the model knows only one, or each call of
            `act` says it.
        provider: What runs the graphs: "cpu", "cuda", "tensorrt", "coreml", "directml" (each needs a build of
            onnxruntime that has it), or "openvino". Others than "cpu", "cuda" and "openvino" may compute in less than
            float32, so that tokens may be others than those of the model.
        threads: Of the CPU; None: as many as the library chooses.
        drafts: Whether to use them; False for one token after the other, always. Default: in float32 only, and of the
            three providers that compute in it. What 16 bits round, and int8 quantizes, depends a little on what is read
            together: two tokens that are all but equally probable may change places.

    Raises:
        FileNotFoundError: If the folder is none of an export, or a file of it is missing.
        ValueError: If a file is damaged or of a newer version, or an option is none of these.
        KeyError: If `unnorm_key` is unknown.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        unnorm_key: str | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        drafts: bool | None = None,
    ):
        if not isinstance(folder, (str, os.PathLike)):
            raise ValueError(f"folder={folder!r:.100}: expected the path of a folder that `openvla export` wrote.")
        folder = Path(folder).expanduser()
        if not (folder / RUNTIME_FILE).is_file():
            hub = "" if folder.exists() else " One of the Hub is downloaded first (hf download ID --local-dir FOLDER)."
            raise FileNotFoundError(
                f"'{folder}' holds no {RUNTIME_FILE}: give a folder that `openvla export MODEL FOLDER --to onnx` "
                f"wrote.{hub}"
            )
        content = read_json(folder / RUNTIME_FILE)
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"'{folder / RUNTIME_FILE}' has format_version {content.get('format_version')!r}, and this version of "
                f"openvla-runtime knows {FORMAT_VERSION}: update it (pip install -U openvla-runtime), or export again."
            )
        if drafts is not None and not isinstance(drafts, bool):
            raise ValueError(f"drafts={drafts!r}: expected True, False or None.")
        try:
            check_fields(content)
            digests = {file: content["files"][file] for file in FILES}  # those that are read, in any case
            check_digest(folder, TOKENIZER_FILE, digests.pop(TOKENIZER_FILE))
            self._read(content, folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"'{folder / RUNTIME_FILE}' is damaged ({error}): export the model again.") from error
        if unnorm_key is not None:
            resolve_unnorm_key(self.statistics, unnorm_key)
        self.unnorm_key = unnorm_key
        self.drafts = (self.dtype == "float32" and provider in EXACT) if drafts is None else drafts
        for file in (VISION_FILE, LANGUAGE_MODEL_FILE):
            check_file(folder / file, "graph")
        for file, digest in {**content["files"], **digests}.items():
            if file != TOKENIZER_FILE:
                check_digest(folder, file, digest)
        of_8_bits = self.dtype == "int8"
        self._vision = open_session(folder / VISION_FILE, provider, threads, of_8_bits)  # towers may be in 8 bits, too
        self._check_inputs(folder)
        self._language_model = LanguageModel(open_session(folder / LANGUAGE_MODEL_FILE, provider, threads, of_8_bits))
        self._lock = lock_over_forks()
        self._draft: np.ndarray | None = None
        self._checked: dict[str, Any] = {}

    def _read(self, content: dict[str, Any], folder: Path) -> None:
        """What runtime.json and tokenizer.json say."""
        self.name: str = content["model"]
        self.dtype: str = content["dtype"]
        fields = {**content["config"], "text_config": SimpleNamespace(**content["config"]["text_config"])}
        self.config = SimpleNamespace(**fields)
        self.num_patches: int = content["num_patches"]
        self.camera_names: list[str] = content["camera_names"]
        self.normalization: dict[str, str] = content["normalization"]
        self.constant_state: str = content["constant_state"]
        self.prompt_template: str = content["prompt_template"]
        self.statistics = check_statistics(content["statistics"], f"'{folder / RUNTIME_FILE}'")
        self.pixels = PixelSteps(**{field: content["pixels"][field] for field in PIXEL_FIELDS})
        self.action_tokenizer = ActionTokenizer(self.config.action_vocab_size, self.config.n_action_bins)
        file = folder / TOKENIZER_FILE
        if not isinstance(read_json(file).get("model"), dict):
            raise ValueError(f"'{file}' holds no tokenizer ('model'): export the model again.")
        self.tokenizer = Tokenizer.from_file(str(file))
        tokens = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        self._special_tokens = special_tokens_of(self.prompt_template, tokens)
        # Names of special tokens in an instruction are text.
        self.tokenizer.encode_special_tokens = not self._special_tokens

    def _check_inputs(self, folder: Path) -> None:
        """Raise a `ValueError` unless pixels and state are those that the graph of the towers takes."""
        cameras, sizes, state = len(self.camera_names), self.pixels.input_sizes, self.config.proprio_dim
        fit = {"pixel_values": {(3 * cameras * len(sizes), *size[1:]) for size in sizes}}
        fit |= {} if state is None else {"state": {(state,)}}
        taken = {name: {shape[1:]} for name, (shape, _) in self._vision.inputs.items()}
        if fit != taken:
            raise ValueError(
                f"'{folder / RUNTIME_FILE}' tells of other images or another state ({fit}) than {VISION_FILE} takes "
                f"({taken}): export the model again."
            )

    # Acting -----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """An episode begins: forget the last action, that of a prediction which runs now as well (it is waited for)."""
        with self._lock:
            self._draft = None

    def act(
        self,
        image: Any,
        instruction: str,
        unnorm_key: str | None = None,
        state: Any = None,
        executed: int | None = None,
    ) -> np.ndarray:
        """(action_dim,) float64 in the units of a dataset, of a model that predicts chunks (action_chunk, action_dim).

        Args:
            image: Anything `load_image` reads, or `{camera: image}`, of which the model takes its `camera_names`.
            instruction: What to do, for example "open the drawer".
            unnorm_key: Dataset whose statistics give the action its units. Default: that of the policy.
            state: (S,) state of the robot in the units of the dataset, of a model that sees it.
            executed: How many steps of the last chunk were executed since; what remains of it is the draft. Default:
                all.

        Raises:
            ValueError: If something is missing, empty, not finite or too long; or if the model computed something that
                is not finite.
            KeyError: If `unnorm_key` is unknown.
            FileNotFoundError: If an image is a path that does not exist.
        """
        return self.predict(image, instruction, unnorm_key, state, executed).actions

    def predict(
        self,
        image: Any,
        instruction: str,
        unnorm_key: str | None = None,
        state: Any = None,
        executed: int | None = None,
    ) -> Prediction:
        """As `act`, with tokens, probabilities and entropies."""
        with self._lock:
            return self._predict(image, instruction, unnorm_key, state, executed)

    def _predict(self, image: Any, instruction: Any, unnorm_key: Any, state: Any, executed: int | None) -> Prediction:
        # 1. Prompt, pixels, state, units
        single, images, instructions = read_samples(image, instruction)
        if not single:
            raise ValueError("A policy acts for one robot: give one image and one instruction, not lists.")
        key = resolve_unnorm_key(self.statistics, self.unnorm_key if unnorm_key is None else unnorm_key)
        mode, statistics = (
            self.normalization.get(key, "bounds_q99"),
            get_action_stats(self.statistics, key, self._checked),
        )
        shape = (self.config.action_chunk, len(statistics["q01"]))
        prompt = self.prompt_ids(instructions[0], shape[0] * shape[1])
        given = {"pixel_values": self.pixel_values(images)}
        if (seen := self._state(state, key, mode)) is not None:
            given["state"] = seen
        draft = self._shifted(shape, executed)

        # 2. Towers, projector, language model
        features = self._vision.run(given)["features"]
        if features.shape[1] != self.num_patches:
            raise ValueError(
                f"The graph of the towers gives {features.shape[1]} patches, and {RUNTIME_FILE} tells of "
                f"{self.num_patches} (num_patches): export the model again."
            )
        self._draft = None
        decoded = self._language_model.decode(prompt, features, shape[0] * shape[1], self.action_tokenizer, draft)
        check_finite(decoded, features)
        self._draft = decoded.token_ids.reshape(shape).copy()  # callers may write into what they are given

        # 3. Units
        normalized = self.action_tokenizer.decode(self._draft)
        prediction = Prediction(
            unnormalize_actions(normalized, statistics, mode), normalized, decoded.token_ids.reshape(shape),
            decoded.probabilities.reshape(shape), decoded.entropies.reshape(shape), decoded.passes,
        )  # fmt: skip
        if shape[0] == 1:
            rows = {name: value[0] for name, value in vars(prediction).items() if name != "passes"}
            prediction = Prediction(**rows, passes=decoded.passes)
        return prediction

    def prompt_ids(self, instruction: str, num_tokens: int) -> list[int]:
        """Token ids of the prompt of an instruction, the end before the `num_tokens` of an action included."""
        text = make_prompt(instruction, self.prompt_template, self._special_tokens)
        first, end = self.action_tokenizer.token_range
        ids = spell_action_tokens(self.tokenizer.encode(text).ids, range(first, end), self.tokenizer)
        if self.config.image_token_id in ids or max(ids) >= self.config.text_config.vocab_size:
            raise ValueError(
                f"The prompt {text!r:.200} holds tokens that stand for no text here: say it in other words."
            )
        check_prompt_ids(ids, self.config, warn_without_bos=True)
        return end_with_empty(ids, self.config, self.num_patches, num_tokens)

    def pixel_values(self, images: Any) -> np.ndarray:
        """(1, cameras * 3 * towers, height, width) float32."""
        frames = [image for sample in camera_images(images, self.camera_names) for image in sample]
        pixels = self.pixels.normalized(frames)
        if (size := pixels.shape[-2:]) != (taken := tuple(self.pixels.input_sizes[0][1:])):  # with do_resize false
            raise ValueError(f"An image of {size[1]}x{size[0]} pixels: this model takes {taken[1]}x{taken[0]} alone.")
        check_largest_pixel(max(-float(pixels.min()), float(pixels.max())))  # NaN if one value is
        return pixels.reshape(1, -1, *pixels.shape[2:])

    def _state(self, state: Any, key: str, mode: str) -> np.ndarray | None:
        """(1, proprio_dim) float32, normalized; None of a model that sees none."""
        expected = self.config.proprio_dim
        check_state_given(state, expected)
        if expected is None:
            return None
        try:
            numbers = np.asarray(state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"state={state!r:.100}: expected {expected} numbers.") from error
        if numbers.dtype.kind not in "biuf":
            raise ValueError(f"state={state!r:.100}: expected {expected} numbers.")
        numbers = numbers.astype(np.float64)
        if numbers.shape not in ((expected,), (1, expected)) or not np.isfinite(numbers).all():
            broken = "" if np.isfinite(numbers).all() else " and holds NaN or infinity"
            raise ValueError(f"state has shape {numbers.shape}{broken}, expected finite numbers ({expected},).")
        row = normalize_state(numbers.reshape(-1), self.statistics, key, mode, self.constant_state)
        return row.astype(np.float32)[None]

    def _shifted(self, shape: tuple[int, int], executed: int | None) -> list[int]:
        """The last chunk without the steps that were executed, its last step repeated; after `reset` the middle of
        every range."""
        whole = isinstance(executed, (int, np.integer)) and not isinstance(executed, bool)
        if executed is not None and not (whole and 0 <= executed <= shape[0]):
            raise ValueError(f"executed={executed!r}: expected a number of steps from 0 to {shape[0]}.")
        if not self.drafts:
            return []
        if self._draft is None or self._draft.shape != shape:
            return self.action_tokenizer.encode(np.zeros(shape)).reshape(-1).tolist()
        steps = np.arange(shape[0]) + (shape[0] if executed is None else executed)
        return self._draft[np.minimum(steps, shape[0] - 1)].reshape(-1).tolist()


def check_digest(folder: Path, file: str, digest: str) -> None:
    """Raise an error if a file is missing, or another than the one that was exported."""
    if file_digest(check_file(folder / file)) != digest:
        raise ValueError(
            f"'{folder / file}' is not the file that was exported with {RUNTIME_FILE}: it was damaged, or "
            "comes from another export. Copy the complete folder, or export the model again."
        )


def check_finite(decoded: Decoded, features: np.ndarray) -> None:
    """Raise a `ValueError` if the model computed NaN or infinity."""
    if not (decoded.finite and np.isfinite(features).all()):
        raise ValueError(
            "The model computed NaN or infinite values, so there is no action: the weights are damaged, or float16 "
            "overflowed (export the model with --dtype float32)."
        )
