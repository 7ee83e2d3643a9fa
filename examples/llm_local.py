"""A large model on this machine picks where the small one is unsure. Runs as it is, on the bundled pair.

    python examples/llm_local.py

Any pair of Hugging Face models or GGUF files works the same: ChatS2T(model="Qwen/Qwen3-0.6B", ...,
LocalLLM("Qwen/Qwen3-8B", device="cuda")); with another tokenizer the candidates are scored by their bytes. Its weights
are read at the first question, and it only ever reads what is new since the last one.
"""

from s2t_agents import Budget, ChatS2T, Escalation, LocalLLM
from s2t_agents.triggers import entropy

QUESTION = "Ann has 37 shells. She finds 48 more. Then 19 are lost. How many shells are left?"


def main() -> None:
    """Ask one question and say who decided."""
    model = ChatS2T(
        model="s2t-demo",
        trigger=entropy(above=0.1),  # a trained selector brings its own threshold
        escalation=Escalation(LocalLLM("s2t-demo-llm"), margin=1.0),
        budget=Budget(escalations=5),
    )
    answer = model.invoke(QUESTION)
    s2t = answer.response_metadata["s2t"]
    print(answer.text)
    print(f"{s2t['tokens']} tokens, {s2t['escalations']} picked by the LLM, {s2t['refused']} refused by the budget")


if __name__ == "__main__":
    main()
