"""Parts of a model that the published one does not have: projectors of state and noisy actions, a head with weights,
FiLM. They begin at random, learn whatever the strategy, and belong to an adapter that was trained with them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from .action_heads_openvla import head_without_weights, make_head
from .configuration_openvla import HEADS_WITH_WEIGHTS, OpenVLAConfig
from .parallel_openvla import NoisyActionProjector
from .vision_openvla import FILM, OpenVLAProprioProjector
from .weights_openvla import check_tensors, check_weight_file


# Fields of the configuration that ask for them
PARTS = ("action_head", "action_dim", "proprio_dim", "use_film", "diffusion_steps")
PARTS_FILE = "added_parts.safetensors"  # beside an adapter
PREFIXES = ("action_head.", "proprio_projector.", "noisy_action_projector.")
WEIGHTLESS_HEADS = ("tokens", "parallel_tokens")  # the model's own output layer: another head takes nothing away


def is_added(name: str) -> bool:
    """Whether a parameter of this name is of a part that the published model does not have."""
    return name.startswith(PREFIXES) or (name.startswith("vision_backbone.") and FILM.search(name) is not None)


def asks_for_parts(fields: Mapping[str, Any]) -> bool:
    """Whether a model with these fields of the configuration has such parts."""
    head = fields.get("action_head") in HEADS_WITH_WEIGHTS
    return head or fields.get("proprio_dim") is not None or bool(fields.get("use_film"))


def check_reads_both_ways(config: Any) -> None:
    """Raise a `ValueError` if the head predicts in one pass, in which every token sees every other, and the language
    model knows positions by a bias of its attention alone."""
    text = config.text_config
    alibi = text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False)
    if alibi and head_without_weights(config).parallel:
        raise ValueError(
            f"action_head='{config.action_head}' reads in both directions, and a '{text.model_type}' knows positions "
            "by a bias that grows in one (ALiBi): take action_head='tokens', or a language model of another kind."
        )


class ModelParts:
    """The part of `OpenVLAForActionPrediction` that builds them."""

    if TYPE_CHECKING:  # what the model has
        config: OpenVLAConfig
        adapter_state: Any
        vision_backbone: Any
        projector: Any
        state_dict: Any
        get_submodule: Any
        load_state_dict: Any
        named_parameters: Any
        _init_weights: Any

    def _make_parts(self) -> None:
        """What the configuration asks for, as far as it is not there; weights at random."""
        config, hidden = self.config, self.config.text_config.hidden_size
        check_reads_both_ways(config)
        if config.proprio_dim is not None and not hasattr(self, "proprio_projector"):
            self.proprio_projector = OpenVLAProprioProjector(config.proprio_dim, hidden)
        if config.action_head == "diffusion" and not hasattr(self, "noisy_action_projector"):
            self.noisy_action_projector = NoisyActionProjector(hidden)
        if config.use_film and not self.vision_backbone.use_film:
            self.vision_backbone.add_film(hidden)
        made = (config.action_head, config.action_dim)
        if getattr(self, "_made_head", None) != made:
            self.action_head = make_head(config)
            self._made_head = made

    def add_parts(self, **fields: Any) -> None:
        """Give the model what it lacks of `PARTS`; new weights begin at random, to be trained.

        Raises:
            ValueError: If it has such a part of another size already, or loses one.
        """
        config, like = self.config, self.projector.fc1.weight
        before = {name: getattr(config, name) for name in fields}
        for name, value in fields.items():
            if name == "diffusion_steps" and config.action_head != "diffusion":
                continue  # of a head that comes now
            if before[name] not in (None, False, *WEIGHTLESS_HEADS, value):
                raise ValueError(
                    f"The model has {name}={before[name]!r}, asked for {name}={value!r}: begin with a model without it."
                )
        config.__dict__.update(fields)
        try:
            config.check_fields()
            check_reads_both_ways(config)
        except ValueError:
            config.__dict__.update(before)  # refused: it stays the model that it was
            raise
        known = {*self.state_dict()}
        self._make_parts()
        for name in sorted({name.rpartition(".")[0] for name in {*self.state_dict()} - known}):
            module = self.get_submodule(name).to(like)
            if not name.startswith("action_head."):  # which begins as torch has it
                self._init_weights(module)

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of these parts, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if is_added(name)}

    def load_parts(self, folder: str | os.PathLike, fields: Mapping[str, Any], owner: str = "default") -> None:
        """Take the parts that an adapter in a local folder was trained with, in place of those that are there.

        Args:
            fields: Of the configuration in its training.
            owner: Name of the adapter; "" while it is not loaded. The model predicts with these parts only while this
                adapter is active, see `AdapterState`.

        Raises:
            FileNotFoundError, ValueError: If their file is missing or damaged, or does not hold what `fields` ask for.
        """
        before = {name: getattr(self.config, name) for name in PARTS}
        wanted = {name: fields.get(name, before[name]) for name in PARTS}
        file = Path(folder) / PARTS_FILE
        holds_weights = asks_for_parts(wanted) or file.is_file()  # not where only the tokens are chosen all at once
        if wanted == before and not asks_for_parts(fields) and not file.is_file():
            return
        if holds_weights:
            check_weight_file(file, whole_numbers=False)
        self.adapter_state.parts_owner = ""  # nobody's until all are there: they begin at random
        self.add_parts(**wanted)
        stored, own = load_file(file) if holds_weights else {}, self.added_parameters()
        shapes = {
            name: (stored[name].shape, own[name].shape)
            for name in stored.keys() & own.keys()
            if stored[name].shape != own[name].shape
        }
        check_tensors(f"'{file}'", own.keys() - stored.keys(), stored.keys() - own.keys(), shapes)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])
        self.adapter_state.parts_owner = owner


__all__ = ["PARTS", "PARTS_FILE", "PREFIXES", "WEIGHTLESS_HEADS", "ModelParts", "asks_for_parts", "is_added"]
