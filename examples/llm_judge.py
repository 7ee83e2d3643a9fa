"""Any chat model picks where the small one is unsure: it reads short continuations and names one.

    python examples/llm_judge.py                               # the bundled large model judges: no key, no network
    python examples/llm_judge.py --judge openai:gpt-4o-mini    # needs langchain-openai and OPENAI_API_KEY

No log-probabilities and no shared tokenizer are needed. The whole continuation that is named is kept, so one paid call
decides a sentence. The bundled model was not trained to judge: this shows the way, not a gain.
"""

import argparse

from langchain.chat_models import init_chat_model

from s2t_agents import Budget, ChatJudge, ChatS2T, Escalation
from s2t_agents.triggers import entropy

QUESTION = "Ann has 37 shells. She finds 48 more. Then 19 are lost. How many shells are left?"


def main() -> None:
    """Ask one question and say who decided."""
    parser = argparse.ArgumentParser(description="Let a chat model judge where the small model is unsure.")
    parser.add_argument("--judge", help="provider:model, as init_chat_model takes it; the bundled LLM by default")
    given = parser.parse_args()
    chat = init_chat_model(given.judge, max_tokens=64) if given.judge else ChatS2T(model="s2t-demo-llm", max_tokens=96)
    model = ChatS2T(
        model="s2t-demo",
        k=3,
        trigger=entropy(above=0.1),
        escalation=Escalation(ChatJudge(chat, context_chars=600), margin=1.0),
        budget=Budget(escalations=3),
    )
    answer = model.invoke(QUESTION)
    s2t = answer.response_metadata["s2t"]
    print(answer.text)
    print(f"{s2t['tokens']} tokens, {s2t['escalations']} sentences decided by the judge, degraded: {s2t['degraded']}")


if __name__ == "__main__":
    main()
