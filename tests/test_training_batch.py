"""What is read in padded batches is what each row says alone."""

import pytest
import torch
from sequences import read

from s2t_agents.backends.torch.backend import TorchBackend
from s2t_agents.errors import ConfigError
from s2t_agents.testing import ARCHITECTURES, tiny_model
from s2t_agents.training.batch_reading import logits_along

PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 11]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_along_completions_of_different_length(architecture):
    model = tiny_model(architecture)
    completions = [[1, 2, 3], [], [4]]
    logits = logits_along(model, PROMPTS, completions)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        torch.testing.assert_close(logits[row, 0], read(model, prompt).logits, atol=1e-4, rtol=1e-4)
        for at in range(len(completion)):
            single = read(model, [*prompt, *completion[: at + 1]]).logits
            torch.testing.assert_close(logits[row, at - len(completion)], single, atol=1e-4, rtol=1e-4)


def test_logits_along_nothing_are_those_at_the_end():
    model = tiny_model()
    logits = logits_along(model, PROMPTS, [[], [], []])
    assert logits.shape[:2] == (3, 1)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits[row, 0], read(model, prompt).logits, atol=1e-4, rtol=1e-4)


def test_a_prompt_of_several_rows_is_read_once_and_they_grow_apart(monkeypatch):
    model, widths = tiny_model(), []
    rows = TorchBackend.read_rows
    monkeypatch.setattr(
        TorchBackend, "read_rows", lambda self, ids, *rest: widths.append(len(ids)) or rows(self, ids, *rest)
    )
    prompts, completions = [PROMPTS[2], PROMPTS[0], PROMPTS[2]], [[1], [2], [3]]
    logits = logits_along(model, prompts, completions)
    assert widths == [2, 3]
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        torch.testing.assert_close(logits[row, 1], read(model, prompt + completion).logits, atol=1e-4, rtol=1e-4)


def test_recurrent_models_are_refused_by_name():
    with pytest.raises(ConfigError, match="recurrent"):
        logits_along(tiny_model("qwen3_next"), PROMPTS, [[], [], []])
