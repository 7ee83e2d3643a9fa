"""Many rows in lockstep say what each row says alone."""

import pytest
import torch

from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.sequence import Prefix
from s2t_agents.testing import ARCHITECTURES, tiny_model
from s2t_agents.training.batch_prefix import BatchPrefix

PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 11]


def alone(model, ids):
    prefix = Prefix(model)
    prefix.extend(ids)
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
    ahead = batch.look_ahead(torch.tensor([2, 0]), candidates)
    for line, row in enumerate((2, 0)):
        single = alone(model, PROMPTS[row]).look_ahead(candidates[line])
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


def test_recurrent_models_are_refused_by_name():
    with pytest.raises(ConfigError, match="recurrent"):
        BatchPrefix(tiny_model("qwen3_next"), PROMPTS)
