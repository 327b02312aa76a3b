"""Drafts, guesses of the tokens to come, save passes of the language model and change no token."""

import copy
import itertools

import numpy as np
import pytest
import torch
from test_llama_openvla import check_equal, new_model, prompts
from transformers import GenerationConfig

from openvla.decoding_openvla import Steps, decode_tokens
from openvla.graphs_openvla import plain_decoding
from openvla.llama_openvla import LlamaSteps
from openvla.observation import Observation
from openvla.outputs_openvla import ActionPrediction
from openvla.policy import OpenVLAPolicy
from openvla.token_head_openvla import TokenHead


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def chunked():
    return new_model(action_chunk=3)


class Rows(Steps):
    """Steps over a table: what comes after each beginning of an answer; counts what is read."""

    verifies = True

    def __init__(self, batch: int, num_tokens: int, tokens: int = 5, seed: int = 0):
        self.batch, self.tokens, self.seed = batch, tokens, seed
        self.read: list[int] = []
        self.seen = torch.zeros(batch, num_tokens, dtype=torch.long)

    def logits(self, begin: int, count: int) -> torch.Tensor:
        rows = []
        for row, number in itertools.product(range(self.batch), range(begin, begin + count)):
            generator = torch.Generator().manual_seed(hash((self.seed, row, *self.seen[row, :number].tolist())) % 2**31)
            rows.append(torch.rand(self.tokens, generator=generator))
        return torch.stack(rows).reshape(self.batch, count, -1)

    def prefill(self, token_ids=None):
        count = 0 if token_ids is None else token_ids.shape[1]
        if count:
            self.seen[:, :count] = token_ids
        self.read.append(1 + count)
        return self.logits(0, 1 + count)

    def step(self, token_ids, begin):
        self.seen[:, begin : begin + token_ids.shape[1]] = token_ids
        self.read.append(token_ids.shape[1])
        return self.logits(begin + 1, token_ids.shape[1])


def chosen_after(steps: Rows, row: int, guesses: list[int]) -> list[int]:
    """What a row of a table chooses at each place of an answer, each after the guesses before it."""
    steps.seen[row, : len(guesses)] = torch.tensor(guesses)
    return [int(logits.argmax()) + 10 for logits in steps.logits(0, len(guesses) + 1)[row]]


def passes_of(steps: Rows, row: int, guesses: list[int]) -> list[int]:
    """In which pass each token of a row is decided, if each pass tries again what the one before chose."""
    passes: list[int] = []
    for number in itertools.count(1):
        chosen = chosen_after(steps, row, guesses)
        right = [one == other for one, other in zip(guesses, chosen)]
        known = right.index(False) + 1 if False in right else len(chosen)
        passes += [number] * (known - len(passes))
        if known == len(chosen):
            return passes
        guesses = chosen[:-1]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_every_draft_gives_the_tokens_of_plain_decoding(batch, num_tokens):
    """Over tables of logits, drafts at random: tokens, probabilities, and no pass more than it takes."""
    finite = torch.ones(batch, 1, dtype=torch.bool)
    for seed in range(30):
        plain = decode_tokens(Rows(batch, num_tokens, seed=seed), finite, num_tokens, 10)
        assert plain.passes.tolist() == [[*range(1, num_tokens + 1)]] * batch
        keep = torch.rand(batch, num_tokens - 1, generator=torch.Generator().manual_seed(seed)) < seed / 29
        draft = torch.where(keep, plain.token_ids[:, :-1], 14).tolist()
        steps = Rows(batch, num_tokens, seed=seed)
        found = decode_tokens(steps, finite, num_tokens, 10, None, draft)
        for name in ("token_ids", "probabilities", "entropies"):
            assert getattr(found, name).tolist() == getattr(plain, name).tolist()
        table = Rows(batch, num_tokens, seed=seed)
        expected = [passes_of(table, row, guesses) for row, guesses in enumerate(draft)]
        assert found.passes.tolist() == expected
        assert len(steps.read) == max(map(max, expected))


def test_what_the_model_chose_behind_a_wrong_guess_is_tried_next():
    """It saw the image: where a number hardly depends on those before it, two passes decide all of them."""

    class Independent(Rows):
        def logits(self, begin, count):
            places = torch.arange(begin, begin + count)
            return torch.nn.functional.one_hot(places % self.tokens, self.tokens).float().expand(self.batch, -1, -1)

    draft = [[14, 10, 10, 10, 10, 10], [10, 11, 14, 14, 14, 14]]
    found = decode_tokens(Independent(2, 7), torch.ones(2, 1, dtype=torch.bool), 7, 10, None, draft)
    assert found.token_ids.tolist() == [[10, 11, 12, 13, 14, 10, 11]] * 2
    assert found.passes.tolist() == [[1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2, 2]]


def test_what_is_not_finite_behind_a_wrong_guess_does_not_matter():
    """float16 may overflow on tokens that are never chosen."""

    class Overflowing(Rows):
        def logits(self, begin, count):
            logits = super().logits(begin, count)
            wrong = (self.seen == 99).cumsum(dim=1) > 0
            for number in range(max(begin, 1), begin + count):
                logits[wrong[:, number - 1], number - begin] = torch.nan
            return logits

    finite = torch.ones(2, 1, dtype=torch.bool)
    plain = decode_tokens(Rows(2, 5), finite, 5, 10)
    draft = [[99] * 4] * 2
    found = decode_tokens(Overflowing(2, 5), finite, 5, 10, None, draft)
    assert found.token_ids.tolist() == plain.token_ids.tolist()
    assert found.probabilities.isfinite().all()
    broken = decode_tokens(Rows(2, 5), torch.tensor([[True], [False]]), 5, 10, None, draft)
    assert broken.probabilities.isfinite().all(dim=1).tolist() == [True, False]


def drafts_for(tokens: np.ndarray, seed: int) -> list:
    """(name, draft) of all kinds, for tokens (batch, ...)."""
    rows = tokens.reshape(len(tokens), -1)
    generator = np.random.default_rng(seed)
    partly = np.where(generator.random(rows.shape) < 0.6, rows, generator.integers(144, 400, rows.shape))
    return [
        ("right", tokens),
        ("wrong", np.full_like(rows, 150)),
        ("partly right", partly),
        ("shifted", np.roll(rows, 1, axis=1)),
        ("too short", partly[:, :3]),
        ("too long", np.concatenate([rows, rows, rows], axis=1)),
        ("of another robot", generator.integers(0, 400, (len(rows), 14))),
        ("of some rows", [None if row % 2 else rows[row] for row in range(len(rows))]),
        ("none", [None] * len(rows)),
        ("empty", [[]] * len(rows)),
        ("empty and none", [None if row % 2 else [] for row in range(len(rows))]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constrained", [True, False])
def test_tokens_do_not_depend_on_the_draft(model, constrained, dtype):
    model = new_model().to(dtype) if dtype != torch.float32 else model
    for seed in range(6):
        inputs = prompts(1 + seed % 3, seed, padded=seed % 2 == 1)
        expected = model.predict_action(**inputs, constrained=constrained, return_dict=True)
        tokens = expected.token_ids.reshape(-1, 7)
        for name, draft in drafts_for(tokens, seed):
            draft = draft if len(tokens) > 1 else draft[0]
            found = model.predict_action(**inputs, constrained=constrained, draft=draft, return_dict=True)
            assert found.token_ids.tolist() == expected.token_ids.tolist(), name
            assert found.actions.tolist() == expected.actions.tolist(), name
            np.testing.assert_allclose(found.token_probabilities, expected.token_probabilities, rtol=1e-4, atol=1e-6)
            passes = found.token_passes.reshape(-1, 7).max(axis=1)
            assert (passes <= 7).all() and (name not in ("right", "too long") or (passes == 1).all()), name


def test_an_empty_draft_guesses_the_middle_of_every_range(model, monkeypatch):
    inputs, given = prompts(2), []
    prefill = LlamaSteps.prefill
    monkeypatch.setattr(LlamaSteps, "prefill", lambda self, ids=None: given.append(ids) or prefill(self, ids))
    model.predict_action(**inputs, draft=[[], None])
    middle = int(model.action_tokenizer.encode(np.zeros(1))[0])
    assert given[0].tolist() == [[middle] * 6] * 2
    model.predict_action(**inputs, draft=[[150, 151], [150] * 9])
    assert given[1].tolist() == [[150, 151, *[middle] * 4], [150] * 6]
    assert model.predict_action(**inputs, draft=[None, None], return_dict=True).token_passes.max() == 7
    assert given[2] is None


def test_chunks_and_prefixes(chunked):
    inputs = prompts(2, 3, padded=True)
    expected = chunked.predict_action(**inputs, return_dict=True)
    found = chunked.predict_action(**inputs, draft=expected.token_ids, return_dict=True)
    assert found.token_ids.tolist() == expected.token_ids.tolist() and (found.token_passes == 1).all()
    committed = expected.actions[:, :1]
    continued = chunked.predict_action(**inputs, committed=committed, return_dict=True)
    again = chunked.predict_action(**inputs, committed=committed, draft=continued.token_ids, return_dict=True)
    assert again.token_ids.tolist() == continued.token_ids.tolist()
    assert again.token_passes.tolist() == [[[0] * 7, [1] * 7, [1] * 7]] * 2
    single = {name: value[:1] for name, value in prompts(2, 3).items()}
    one = chunked.predict_action(**single, return_dict=True)
    assert (chunked.predict_action(**single, draft=one.token_ids, return_dict=True).token_passes == 1).all()


def test_steps_of_the_library_do_not_look_at_drafts(model):
    inputs = prompts(2)
    expected = model.predict_action(**inputs, return_dict=True)
    with plain_decoding():
        found = model.predict_action(**inputs, draft=expected.token_ids, return_dict=True)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.token_passes.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (7, "draft is a int, expected token ids for each of the 2 samples"),
        (np.array(150), "draft is a ndarray, expected token ids"),
        (torch.tensor(150), "draft is a Tensor, expected token ids"),
        ([[150, 151], [150], None], "draft is a list of 3, expected token ids"),
        ({150, 151}, "draft is a set of 2"),
        ([[150] * 7], "expected token ids for each of the 2 samples"),
        ([[150.5] * 7] * 2, "holds torch.float64, expected token ids"),
        ([[True] * 7] * 2, "holds torch.bool"),
        ([[150, 400], [150]], "ranges from 150 to 400, the model knows token ids from 0 to 399"),
        ([[-1], [150]], "ranges from -1"),
        ([["open"], [150]], "lists of numbers"),
    ],
)
def test_drafts_that_are_refused(model, monkeypatch, draft, message):
    monkeypatch.setattr(model, "encode_images", None)  # before any compute
    with pytest.raises(ValueError, match=message):
        model.predict_action(**prompts(2), draft=draft)


def test_only_the_most_probable_tokens_have_drafts(model, monkeypatch):
    monkeypatch.setattr(model, "encode_images", None)
    with pytest.raises(ValueError, match="with do_sample=True leave it out"):
        model.predict_action(**prompts(2), draft=[[150]] * 2, do_sample=True)
    other = new_model(action_head="parallel_tokens", action_dim=7)
    with pytest.raises(ValueError, match="with action_head='parallel_tokens' leave it out"):
        other.predict_action(**prompts(2), draft=[[150]] * 2)


# Within an episode


class Recorder:
    """A model that says what it was given."""

    def __init__(self, model):
        self.model, self.drafts = model, []
        self.norm_stats, self.config = model.norm_stats, model.config
        self.action_head, self.dtype, self.device = model.action_head, model.dtype, model.device

    def predict_action(self, images, instructions, draft=None, unnorm_key=None, **options):
        self.drafts.append(draft)
        inputs = prompts(len(images), int(images[0]["image"][0, 0, 0]))
        return self.model.predict_action(**inputs, draft=draft, unnorm_key=unnorm_key, **options)


def seen(number: int, slot: int = 0, step: int | None = None) -> Observation:
    return Observation({"image": np.full((4, 4, 3), number, np.uint8)}, np.zeros(3, np.float32), "go", None, step, slot)


def acted(policy, observation) -> np.ndarray:
    return policy.act([observation])[0]


def test_a_policy_drafts_within_an_episode(model):
    policy, plain = OpenVLAPolicy(Recorder(model)), OpenVLAPolicy(Recorder(model), drafts=False)
    for number in (1, 1, 2):
        assert acted(policy, seen(number)).tolist() == acted(plain, seen(number)).tolist()
    assert plain.model.drafts == [None] * 3 and plain.passes == [7]
    assert policy.model.drafts[0][0].shape == (0,) and policy.model.drafts[1][0].shape == (1, 7)
    acted(policy, seen(2))
    assert policy.passes == [1]
    policy.reset()
    acted(policy, seen(2))
    assert policy.model.drafts[-1][0].shape == (0,) and policy.passes[0] > 1
    both = [seen(2, slot=0), seen(2, slot=5)]  # slot 5 has no draft yet
    policy.act(both)
    policy.act(both)
    assert policy.passes == [1, 1]
    policy.reset(5)
    policy.act(both)
    assert policy.passes[0] == 1 < policy.passes[1]


def test_a_policy_in_half_precision_is_asked_to_draft(model):
    half = new_model().to(torch.bfloat16)
    for drafts, given in ((None, False), (True, True)):
        policy = OpenVLAPolicy(Recorder(half), drafts=drafts)
        for _ in range(2):
            acted(policy, seen(1))
        assert (policy.model.drafts[1] is not None) == given
    assert OpenVLAPolicy(Recorder(model))._is_exact()
    with torch.autocast("cpu", torch.bfloat16):
        assert not OpenVLAPolicy(Recorder(model))._is_exact()


def test_a_policy_drafts_where_its_language_model_is_exact():
    """Whatever types its other parts have: no draft goes through them."""
    model = new_model()
    model.vision_backbone.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and OpenVLAPolicy(model)._is_exact()
    model.to(torch.float32).language_model.to(torch.bfloat16)
    assert model.dtype == torch.float32 and not OpenVLAPolicy(model)._is_exact()


def test_a_policy_that_samples_or_is_given_a_draft(model):
    policy = OpenVLAPolicy(Recorder(model))
    acted(policy, seen(1))
    sampled = GenerationConfig(do_sample=True)
    for options in ({"do_sample": True, "temperature": 0.5}, {"generation_config": sampled}):
        assert policy.predict([seen(1)], **options)[0]["actions"].shape == (1, 7)
    assert policy.model.drafts[1:] == [None, None]
    policy.predict([seen(1)], do_sample=False, generation_config=sampled, draft=[[150]])
    assert policy.model.drafts[3] == [[150]]
    policy.predict([seen(1)], do_sample=False)
    assert policy.model.drafts[4] is not None


def test_a_head_that_tells_no_tokens_acts_without_drafts(chunked):
    class Still(TokenHead):
        def actions(self, model, inputs, shape, choice):
            return ActionPrediction(normalized_actions=np.zeros((len(inputs.prompts), *shape)))

    model = copy.deepcopy(chunked)
    model.action_head = Still(model.action_tokenizer)
    policy = OpenVLAPolicy(Recorder(model))
    for _ in range(2):
        assert not acted(policy, seen(1)).any()
    assert policy.passes == [] and [draft[0].shape for draft in policy.model.drafts] == [(0,)] * 2


def test_the_rest_of_a_chunk_is_the_draft(chunked):
    policy = OpenVLAPolicy(Recorder(chunked))
    acted(policy, seen(1, step=0))
    _, tokens = policy._last[0]
    for step, rows in ((1, [1, 2, 2]), (0, [0, 1, 2]), (7, [2, 2, 2])):
        assert policy._draft(seen(1, step=step)).tolist() == tokens[rows].tolist()
    assert policy._draft(seen(1)).tolist() == tokens[[2, 2, 2]].tolist()  # nobody counts: all were executed
    policy._last[0] = (5, tokens)
    assert policy._draft(seen(1, step=2)).shape == (0,)
    acted(policy, seen(1, step=5))
    assert policy.passes == [1]


def test_a_batch_of_one_row_of_drafts(model):
    inputs = prompts(1)
    tokens = model.predict_action(**inputs, return_dict=True).token_ids
    for draft in (tokens, tokens[None], [tokens], tokens.tolist(), torch.from_numpy(tokens), (tokens,)):
        assert (model.predict_action(**inputs, draft=draft, return_dict=True).token_passes == 1).all()
    assert model.predict_action(**inputs, draft=[None], return_dict=True).token_passes.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_adapters_and_half_precision_verify(model):
    half = new_model().to(torch.bfloat16)
    equal = []
    for seed in range(10):
        inputs = prompts(1, seed)
        expected = half.predict_action(**inputs, return_dict=True)
        found = half.predict_action(**inputs, draft=np.roll(expected.token_ids, 1), return_dict=True)
        equal.append(found.token_ids.tolist() == expected.token_ids.tolist())
    assert np.mean(equal) >= 0.6  # random weights: many logits are as near as bfloat16 rounds
    check_equal(model, prompts(2))
