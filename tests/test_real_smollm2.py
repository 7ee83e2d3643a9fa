"""SmolLM2-135M-Instruct, a real checkpoint, as a LangChain model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from s2t_agents import ChatS2T

pytestmark = pytest.mark.real

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours, separated by commas.",
    "Translate 'good morning' to Spanish.",
]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), AutoTokenizer.from_pretrained(smollm2)


def test_greedy_answers_are_those_of_transformers_alone_and_in_a_batch(
    smollm2: Path, reference: tuple[Any, Any]
) -> None:
    network, tokenizer = reference
    model = ChatS2T(model=str(smollm2), max_tokens=32)
    expected = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = network.generate(**ids, max_new_tokens=32, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert all(len(text) > 10 for text in expected)
    assert [model.invoke(question).text for question in QUESTIONS] == expected
    assert [answer.text for answer in model.batch(QUESTIONS)] == expected
