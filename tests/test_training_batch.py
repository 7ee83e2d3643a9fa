"""Many rows in lockstep say what each row says alone."""

import pytest
import torch

from s2t_agents.backends.torch.backend import TorchBackend
from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ARCHITECTURES, tiny_model
from s2t_agents.training.batch_prefix import BatchPrefix, PromptReader, left_padded

PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 11]


def alone(model, ids):
    prefix = TokenSequence(model)
    prefix.append(ids)
    return prefix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_a_batch_equal_single_prefixes(architecture):
    model = tiny_model(architecture)
    batch = BatchPrefix(model, PROMPTS)
    batch.extend(torch.tensor([[1], [2], [3]]))
    for row, (prompt, token) in enumerate(zip(PROMPTS, (1, 2, 3), strict=True)):
        single = alone(model, [*prompt, token])
        torch.testing.assert_close(batch.logits[row], single.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.hidden[row], single.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_looking_ahead_from_some_rows_equals_looking_ahead_alone(architecture):
    model = tiny_model(architecture)
    batch = BatchPrefix(model, PROMPTS)
    candidates = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    ahead = batch.score_candidates(torch.tensor([2, 0]), candidates)
    for line, row in enumerate((2, 0)):
        single = alone(model, PROMPTS[row]).score_candidates(candidates[line])
        torch.testing.assert_close(ahead[line], single, atol=1e-4, rtol=1e-4)


def test_a_fork_leaves_its_origin_alone():
    model = tiny_model()
    batch = BatchPrefix(model, PROMPTS)
    before = batch.logits.clone()
    fork = batch.fork()
    fork.extend(torch.tensor([[1], [2], [3]]))
    fork.keep(torch.tensor([1]))
    batch.extend(torch.tensor([[4], [4], [4]]))
    assert batch.mask.shape == (3, 31)
    assert fork.mask.shape == (1, 31)
    torch.testing.assert_close(before[1], alone(model, PROMPTS[1]).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.logits[2], alone(model, [*PROMPTS[2], 4]).logits, atol=1e-4, rtol=1e-4)


def test_rows_can_leave_the_batch():
    model = tiny_model()
    batch = BatchPrefix(model, PROMPTS)
    batch.keep(torch.tensor([0, 2]))
    batch.extend(torch.tensor([[8], [9]]))
    torch.testing.assert_close(batch.logits[1], alone(model, [*PROMPTS[2], 9]).logits, atol=1e-4, rtol=1e-4)


def test_rows_leave_one_after_another_and_those_that_stay_do_not_notice():
    model = tiny_model()
    ids = [[(7 * row + at) % 90 + 5 for at in range(3 + (5 * row) % 23)] for row in range(20)]  # more than one forward
    batch = BatchPrefix(model, ids)
    rows = list(range(20))
    for gone in (3, 17, 0, 9, 11):
        batch.keep(torch.tensor([at for at, row in enumerate(rows) if row != gone]))
        rows.remove(gone)
        batch.extend(torch.tensor([[row + 1] for row in rows]))
        ids = [[*each, row + 1] for row, each in enumerate(ids)]
    assert batch.mask.sum(1).tolist() == [len(ids[row]) for row in rows]
    candidates = torch.tensor([[3, 4], [5, 6]])
    ahead = batch.score_candidates(torch.tensor([14, 2]), candidates)
    for at, line in ((14, 0), (2, 1), (7, None)):
        single = alone(model, ids[rows[at]])
        torch.testing.assert_close(batch.logits[at], single.logits, atol=1e-4, rtol=1e-4)
        if line is not None:
            scored = single.score_candidates(candidates[line])
            torch.testing.assert_close(ahead[line], scored, atol=1e-4, rtol=1e-4)


def test_recurrent_models_are_refused_by_name():
    with pytest.raises(ConfigError, match="recurrent"):
        BatchPrefix(tiny_model("qwen3_next"), PROMPTS)


def test_prompts_are_read_once_however_often_they_are_asked_for(monkeypatch):
    model, read = tiny_model(), []
    rows = TorchBackend.read_rows
    monkeypatch.setattr(
        TorchBackend, "read_rows", lambda self, ids, *rest: read.append(len(ids)) or rows(self, ids, *rest)
    )
    reader = PromptReader(model)
    reader([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    reader([PROMPTS[1]])
    assert read == [2]
    reader(PROMPTS)  # one of them is new: a batch of its own
    assert read == [2, 3]
    reader.forget()
    reader([PROMPTS[1]])
    assert read == [2, 3, 1]


def test_rows_of_one_prompt_grow_apart():
    model = tiny_model()
    reader = PromptReader(model)
    wanted = [PROMPTS[2], PROMPTS[0], PROMPTS[2]]
    for tokens in ((1, 2, 3), (4, 5, 6)):  # the second time nothing of the first is left in it
        rows = reader(wanted)
        rows.extend(torch.tensor(tokens)[:, None])
        for row, (prompt, token) in enumerate(zip(wanted, tokens, strict=True)):
            torch.testing.assert_close(rows.logits[row], alone(model, [*prompt, token]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_along_completions_of_different_length(architecture):
    model = tiny_model(architecture)
    completions = [[1, 2, 3], [], [4]]
    logits = BatchPrefix(model, PROMPTS).read_along(*left_padded(completions, model.device))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        torch.testing.assert_close(logits[row, 0], alone(model, prompt).logits, atol=1e-4, rtol=1e-4)
        for at in range(len(completion)):
            single = alone(model, [*prompt, *completion[: at + 1]]).logits
            torch.testing.assert_close(logits[row, at - len(completion)], single, atol=1e-4, rtol=1e-4)


def test_logits_along_nothing_are_those_at_the_end():
    model = tiny_model()
    logits = BatchPrefix(model, PROMPTS).read_along(*left_padded([[], [], []], model.device))
    assert logits.shape[:2] == (3, 1)
