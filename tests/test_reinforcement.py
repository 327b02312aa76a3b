"""docs/training.md, "Reinforcement learning": probabilities of what was sampled, once more and with gradients."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_modeling_openvla import INSTRUCTIONS

from openvla import OpenVLAConfig, OpenVLAForActionPrediction, OpenVLAProcessor


ROOT = Path(__file__).resolve().parents[1]
SECTION = re.search(
    r"^## Reinforcement learning\n.*?^```python\n(.*?)^```$",
    (ROOT / "docs" / "training.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)
IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8))


def new_model(**fields) -> OpenVLAForActionPrediction:
    """The weights of the embedded policy under another configuration."""
    model = OpenVLAForActionPrediction.from_pretrained(ROOT)
    config = OpenVLAConfig(**{**model.config.to_dict(), **fields})
    made = OpenVLAForActionPrediction.from_pretrained(None, config=config, state_dict=model.state_dict())
    made.processor = OpenVLAProcessor.from_pretrained(ROOT)
    return made


def run_section(model: OpenVLAForActionPrediction) -> dict:
    names = {"model": model, "images": IMAGES, "instructions": INSTRUCTIONS, "unnorm_key": "metaworld"}
    torch.manual_seed(0)
    exec(compile(SECTION[1], "training.md", "exec"), names)
    return names


@pytest.mark.parametrize("chunk", [1, 3])
def test_tokens_one_after_the_other(chunk):
    model = new_model(action_chunk=chunk)
    names = run_section(model)
    found = names["log_probabilities"]()
    np.testing.assert_allclose(
        found.detach().exp().numpy(), names["taken"].token_probabilities.reshape(3, -1), atol=1e-5
    )
    found.sum().backward()
    assert all(p.grad is not None for p in model.language_model.parameters())


def test_parallel_tokens():
    model = new_model(action_chunk=3, action_head="parallel_tokens")
    names = run_section(model)
    prompts, tokens = names["prompts"], names["tokens"]
    rows = [
        torch.tensor([*prompt, *answer, model.config.text_config.eos_token_id])
        for prompt, answer in zip(prompts, tokens.tolist())
    ]
    input_ids, mask = (
        torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        for some in (rows, [torch.ones_like(row) for row in rows])
    )
    logits = model(
        input_ids, mask, names["pixel_values"],
        first_action=torch.tensor([len(prompt) for prompt in prompts]), num_actions=tokens.shape[1],
    ).logits[:, :-1]  # fmt: skip
    first, end = model.action_tokenizer.token_range
    scores = logits[..., first:end] / names["temperature"]
    found = torch.distributions.Categorical(logits=scores).log_prob(tokens - first)
    np.testing.assert_allclose(
        found.detach().exp().numpy(), names["taken"].token_probabilities.reshape(3, -1), atol=1e-5
    )
