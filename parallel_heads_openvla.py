"""Heads of OpenVLA-OFT (arXiv 2502.19645): all numbers of a chunk come out of one pass of the language model.

Shapes: `batch` samples, K `action_chunk`, A `action_dim`, `hidden` width of the language model.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .action_tokenizer import ActionTokenizer
from .configuration_openvla import OpenVLAConfig
from .decoding_openvla import are_finite, check_finite, choose_token
from .graphs_openvla import open_sequence, without_graphs
from .inputs_openvla import ModelInputs
from .outputs_openvla import ActionPrediction, OpenVLAOutput
from .parallel_openvla import ActionSequence, time_embedding
from .patches_openvla import IGNORE_INDEX
from .quantized_linear_openvla import type_of_inputs
from .sampling_openvla import Choice, check_generator
from .token_head_openvla import Comparison, TokenHead, learned_labels


class ParallelTokenHead(TokenHead):
    """Each number of a chunk is one token, and all are chosen at once: none sees what the others became."""

    parallel = one_pass = True
    takes_drafts = False
    margin = 1e-8  # in the units of an action, see `unnormalize_actions`
    action_dim: int = 1  # A, for `prefix_training`
    # In training the first steps of each sample, drawn from 0 to this many, are decided already and not learned, as
    # where the model thinks while the robot moves.
    prefix_training = 0

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `first_action` (batch,), where its placeholders begin, and `num_actions`, how many there are.
        Reads labels: before they are on a device."""
        learned = batch["labels"] != IGNORE_INDEX
        first = learned.int().argmax(dim=1)
        return {**batch, "first_action": first, "num_actions": int(learned[0].sum()) - 1}

    def draw(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `committed` (batch, 1), steps of each sample that are decided already."""
        count = len(batch["labels"])
        drawn = torch.randint(0, self.prefix_training + 1, (count, 1)) if self.prefix_training else None
        return batch if drawn is None else {**batch, "committed": drawn}

    def num_learned(self, batch: dict[str, Any]) -> int:
        learned = learned_labels(batch["labels"], batch.get("action_is_pad")) != IGNORE_INDEX
        place = (batch["labels"] != IGNORE_INDEX).cumsum(dim=1) - 1
        return int((learned & (place >= batch.get("committed", 0) * self.action_dim)).sum())

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean cross entropy of the tokens of the actions that are recorded, and of the end.

        Args:
            batch: Of `ActionCollator`, after `prepare`.

        Returns:
            The loss, and for `compare` the logits (batch, K * A, vocab_size) and the tokens (batch, K * A).
        """
        committed = self.draw_prefixes(model, batch)
        logits = model(**_inputs(batch), num_committed=committed * self.action_dim).logits.float()
        place = torch.arange(logits.shape[1], device=logits.device)
        labels = batch["labels"].gather(1, batch["first_action"][:, None] + place)
        learned = learned_labels(labels, batch.get("action_is_pad"))
        learned = learned.masked_fill(place < committed * self.action_dim, IGNORE_INDEX)
        loss = functional.cross_entropy(logits.flatten(0, 1), learned.flatten(), ignore_index=IGNORE_INDEX)
        return loss, {"logits": logits[:, :-1], "labels": labels[:, :-1], "committed": committed}

    def draw_prefixes(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """(batch, 1) steps of each sample that are decided already, of `draw`; in evaluation none."""
        labels = batch["labels"]
        drawn = {} if not model.training else batch if "committed" in batch else self.draw(batch)
        return drawn.get("committed", torch.zeros(len(labels), 1, dtype=torch.long)).to(labels.device)

    def compare(  # type: ignore[override]
        self, logits: torch.Tensor, labels: torch.Tensor, committed: torch.Tensor, shape: tuple[int, int]
    ) -> Comparison:
        predicted, wanted = (tokens.unflatten(1, shape) for tokens in (logits.argmax(dim=-1), labels))
        decided = _steps(predicted)[..., 0] < committed
        return Comparison(
            self.tokenizer.decode(predicted), self.tokenizer.decode(wanted), predicted == wanted, decided=decided
        )

    def forward_sequence(self, model: Any, sequence: ActionSequence, num_actions: int, **_: Any) -> OpenVLAOutput:
        """Logits (batch, num_actions + 1, vocab_size) of the actions and of the end."""
        hidden = sequence.hidden_states(model.language_model, num_actions + 1)
        return OpenVLAOutput(logits=model.get_output_embeddings()(hidden))

    def actions(self, model: Any, inputs: ModelInputs, shape: tuple[int, int], choice: Choice) -> ActionPrediction:
        decided, count = self.committed_tokens(inputs), self.num_tokens(shape)
        sequence = open_sequence(model, inputs, count, decided.tolist())
        hidden = sequence.hidden_states(model.language_model, count)[:, decided.shape[1] :]
        logits = model.get_output_embeddings()(hidden).float()
        finite = are_finite(logits)
        first, end = self.tokenizer.token_range if choice.constrained else (0, None)
        logits = logits[..., first:end].masked_fill(~finite[..., None], 0.0)
        tokens, *others = choose_token(logits.flatten(0, 1), choice.sampling)
        probabilities, entropies, distributions = (values.reshape(*logits.shape[:2], -1) for values in others)
        token_ids = (tokens + first).reshape(len(logits), -1)
        probabilities = probabilities[..., 0].masked_fill(~finite, torch.nan)
        chosen = (token_ids, probabilities, entropies[..., 0], torch.ones_like(token_ids))
        wanted = distributions if choice.distributions else None
        return self.prediction(decided, chosen, shape, model, wanted)

    def difference_of_graphs(
        self, model: Any, inputs: ModelInputs, shape: tuple[int, int], tolerance: float
    ) -> str | None:
        with without_graphs():
            expected = self.actions(model, inputs, shape, Choice(distributions=True))
        far = self.distance(self.actions(model, inputs, shape, Choice(distributions=True)), expected)
        return None if far <= tolerance else f"actions differ by {far:.0%}"

    def distance(self, found: Any, expected: Any) -> float:
        """The largest share of probability that went to other tokens; of a head that gives numbers alone, by how much
        of the largest of them, or of 1, they differ."""
        if expected.token_distributions is not None:
            return np.abs(found.token_distributions - expected.token_distributions).sum(axis=-1).max() / 2
        wanted = expected.normalized_actions
        return np.abs(found.normalized_actions - wanted).max() / max(1.0, np.abs(wanted).max())


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x))); names of tensors are the original's."""

    def __init__(self, width: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.ffn(features)


class ResidualMLP(nn.Module):
    """From the hidden states of one step, A side by side, to its A numbers."""

    def __init__(self, hidden: int, action_dim: int):
        super().__init__()
        self.action_dim = action_dim
        self.layer_norm1 = nn.LayerNorm(action_dim * hidden)
        self.fc1 = nn.Linear(action_dim * hidden, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, action_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, K * A, hidden) -> (batch, K, A)."""
        steps = hidden_states.unflatten(1, (-1, self.action_dim)).flatten(2)
        steps = steps.to(type_of_inputs(self.fc1, steps.dtype))
        features = functional.relu(self.fc1(self.layer_norm1(steps)))
        for block in self.mlp_resnet_blocks:
            features = block(features)
        return self.fc2(self.layer_norm2(features))


class RegressionHead(ParallelTokenHead, ResidualMLP):
    """The numbers themselves, learned with the L1 distance; not clipped to [-1, 1]. The tokens of the actions are
    placeholders in the sequence, whose embeddings are not read."""

    wants_actions = True

    def __init__(self, tokenizer: ActionTokenizer, config: OpenVLAConfig):
        assert config.action_dim is not None  # the configuration checks it
        ResidualMLP.__init__(self, config.text_config.hidden_size, config.action_dim)
        self.tokenizer = tokenizer

    def num_learned(self, batch: dict[str, Any]) -> int:
        actions, is_pad = batch["actions"], batch.get("action_is_pad")
        learned = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device) if is_pad is None else ~is_pad
        return int((learned & (_steps(actions)[..., 0] >= batch.get("committed", 0))).sum()) * actions.shape[2]

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean distance over all numbers of the batch that are no padding (`action_is_pad`).

        Args:
            batch: Of `ActionCollator`, after `prepare`, with the normalized `actions` (batch, K, A).

        Returns:
            The loss, and for `compare` the actions as predicted and as recorded.
        """
        wanted = batch["actions"]
        committed = self.draw_prefixes(model, batch)
        predicted = model(**_inputs(batch), num_committed=committed * self.action_dim).predicted.float()
        wanted = wanted.to(predicted)
        decided = _steps(predicted) < committed[..., None]
        loss = _mean((predicted - wanted).abs(), batch, decided)
        return loss, {"predicted": predicted, "wanted": wanted, "decided": decided[..., 0]}

    def compare(  # type: ignore[override]
        self, predicted: torch.Tensor, wanted: torch.Tensor, decided: torch.Tensor, shape: tuple[int, int]
    ) -> Comparison:
        return Comparison(predicted, wanted, decided=decided)

    def forward_sequence(self, model: Any, sequence: ActionSequence, num_actions: int, **_: Any) -> OpenVLAOutput:
        """`predicted` (batch, K, A)."""
        return OpenVLAOutput(predicted=self(sequence.hidden_states(model.language_model, num_actions)))

    def actions(self, model: Any, inputs: ModelInputs, shape: tuple[int, int], choice: Choice) -> ActionPrediction:
        self._check(shape, choice)
        count = self.num_tokens(shape)
        sequence = open_sequence(model, inputs, count, self.committed_tokens(inputs).tolist())
        predicted = self(sequence.hidden_states(model.language_model, count))
        return _numbers(predicted, model)

    def _check(self, shape: tuple[int, int], choice: Choice) -> None:
        if shape[1] != self.action_dim:
            raise ValueError(
                f"The head was trained for actions of {self.action_dim} numbers, the statistics have {shape[1]}: wrong "
                "unnorm_key?"
            )
        if choice.sampling is not None:
            raise ValueError("do_sample=True: this head gives numbers and chooses no tokens, leave it out.")


class DiffusionHead(RegressionHead):
    """The noise in noisy actions, which is taken away step by step; one pass of the language model for each step."""

    one_pass = False
    wants_executed = True

    def __init__(self, tokenizer: ActionTokenizer, config: OpenVLAConfig):
        super().__init__(tokenizer, config)
        self.num_train_steps = self.num_inference_steps = config.diffusion_steps
        self._scheduler: Any = None
        self.initial_noise = torch.randn  # (shape, dtype=, device=, generator=) -> what a prediction begins with

    @property
    def scheduler(self) -> Any:
        """The original's, DDIM on squared cosines: it holds no weights."""
        if self._scheduler is None:
            try:
                from diffusers import DDIMScheduler
            except ImportError as error:
                raise ModuleNotFoundError(
                    "action_head='diffusion' takes its steps from diffusers, which is not installed: pip install "
                    "'openvla[oft]', or pip install diffusers."
                ) from error
            self._scheduler = DDIMScheduler(num_train_timesteps=self.num_train_steps, beta_schedule="squaredcos_cap_v2")
        return self._scheduler

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean squared error of the noise. In evaluation noise and times are the same in every call.

        Returns:
            The loss, and for `compare` the actions that the predicted noise leaves, and those recorded.
        """
        wanted = batch["actions"].float()
        generator = None if model.training else torch.Generator(wanted.device).manual_seed(0)
        where = {"device": wanted.device, "generator": generator}
        noise = torch.randn(wanted.shape, **where)  # type: ignore[call-overload]
        times = torch.randint(0, self.num_train_steps, (len(wanted),), **where)  # type: ignore[call-overload]
        decided = _steps(wanted) < self.draw_prefixes(model, batch)[..., None]
        executed = batch.get("executed", wanted).to(wanted)
        noisy = torch.where(decided, executed, self.scheduler.add_noise(wanted, noise, times))
        predicted = model(**_inputs(batch), noisy_actions=noisy, times=times).predicted.float()
        kept = self.scheduler.alphas_cumprod.to(wanted.device)[times][:, None, None]
        clean = ((noisy - (1 - kept).sqrt() * predicted.detach()) / kept.sqrt()).clamp(-1, 1)
        loss = _mean(functional.mse_loss(predicted, noise, reduction="none"), batch, decided)
        return loss, {"predicted": clean, "wanted": wanted, "decided": decided[..., 0]}

    def forward_sequence(
        self,
        model: Any,
        sequence: ActionSequence,
        num_actions: int,
        noisy_actions: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        **_: Any,
    ) -> OpenVLAOutput:
        """`predicted` (batch, K, A), the noise in `noisy_actions` (batch, K, A) at `times` (batch,)."""
        if noisy_actions is None or times is None:
            raise ValueError("A diffusion head predicts the noise in actions: give noisy_actions and times.")
        hidden = sequence.hidden_states(
            model.language_model,
            num_actions,
            actions=model.noisy_action_projector(noisy_actions.flatten(1)),
            time=time_embedding(times, sequence.inputs_embeds.shape[2]),
        )
        return OpenVLAOutput(predicted=self(hidden))

    def actions(self, model: Any, inputs: ModelInputs, shape: tuple[int, int], choice: Choice) -> ActionPrediction:
        """Begins with noise, for which samples draw one after the other."""
        self._check(shape, choice)
        check_generator(choice.generator, model.device)
        scheduler, count = self.scheduler, self.num_tokens(shape)
        if self.num_inference_steps not in range(1, self.num_train_steps + 1):
            raise ValueError(f"num_inference_steps={self.num_inference_steps!r}: expected 1 to {self.num_train_steps}.")
        scheduler.set_timesteps(int(self.num_inference_steps))
        sequence = model.action_sequence(inputs, count, with_time=True)
        embeds = sequence.inputs_embeds
        where = {"dtype": embeds.dtype, "device": embeds.device, "generator": choice.generator}
        sample = torch.cat([self.initial_noise(torch.Size((1, *shape)), **where) for _ in inputs.prompts])  # type: ignore[call-overload]
        decided = None if inputs.committed is None else torch.from_numpy(inputs.committed).to(sample)
        for time in scheduler.timesteps.tolist():
            if decided is not None:
                sample[:, : decided.shape[1]] = decided
            times = torch.full((len(sample),), time, device=sample.device)
            noise = self.forward_sequence(model, sequence, count, sample, times).predicted
            sample = scheduler.step(noise, time, sample).prev_sample
        return _numbers(sample, model)


NOT_INPUTS = ("labels", "actions", "executed", "action_is_pad", "committed")


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What `forward` takes of a batch."""
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


def _steps(actions: torch.Tensor) -> torch.Tensor:
    """(1, K, 1) numbers of the steps of actions (batch, K, A)."""
    return torch.arange(actions.shape[1], device=actions.device)[None, :, None]


def _mean(values: torch.Tensor, batch: dict[str, Any], decided: torch.Tensor) -> torch.Tensor:
    """The mean of values (batch, K, A) over steps that are recorded and not `decided` (batch, K, 1) already."""
    learned = ~decided
    if "action_is_pad" in batch:
        learned = learned & ~batch["action_is_pad"][..., None]
    learned = learned.expand_as(values).to(values)
    return (values * learned).sum() / learned.sum().clamp(min=1)


def _numbers(predicted: torch.Tensor, model: Any) -> ActionPrediction:
    numbers = predicted.float().cpu().numpy()
    check_finite(numbers.reshape(len(numbers), -1), model)
    return ActionPrediction(normalized_actions=numbers.astype(np.float64))


__all__ = ["DiffusionHead", "ParallelTokenHead", "RegressionHead", "ResidualMLP"]
