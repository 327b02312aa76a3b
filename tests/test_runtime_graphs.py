"""An export whose runtime.json tells of other graphs than it holds: what they give is looked at."""

import numpy as np
import pytest
from openvla_runtime.action_tokenizer import ActionTokenizer
from openvla_runtime.decoding import LanguageModel


class Graph:
    """A language model that always chooses its last but one action token."""

    inputs = {"features": ((1, None, 4), np.dtype(np.float32)), "past.0": ((1, 1, None, 2), np.dtype(np.float32))}

    def __init__(self, bins):
        self.bins = bins

    def run(self, values):
        logits = np.zeros((1, len(values["rows"]), self.bins), np.float32)
        logits[..., -2] = 1
        length = values["past.0"].shape[2] + len(values["position_ids"][0])
        return {"logits": logits, "present.0": np.zeros((1, 1, length, 2), np.float32)}


def test_other_action_tokens_are_no_action():
    """256 logits were read as 128: a number in place of another, silently."""
    tokenizer, features = ActionTokenizer(1000, 128), np.zeros((1, 3, 4), np.float32)
    found = LanguageModel(Graph(128)).decode([1, 2], features, 7, tokenizer)
    assert found.token_ids.tolist() == [998] * 7
    for bins in (64, 127, 256):
        with pytest.raises(ValueError, match=f"among {bins} action tokens, and runtime.json tells of 128"):
            LanguageModel(Graph(bins)).decode([1, 2], features, 7, tokenizer)
