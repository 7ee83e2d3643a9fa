"""A large model behind an OpenAI-compatible server picks where the small one is unsure.

    python examples/llm_openai_server.py --url http://127.0.0.1:8000/v1 --model s2t-demo-llm

Best is a server that takes token ids and names tokens by id, as vLLM does; examples/vllm starts one with the bundled
LLM, and so does "s2t serve --model s2t-demo-llm". With the server down the answer still comes, marked as degraded.
"""

import argparse
from decimal import Decimal

from s2t_agents import Budget, ChatS2T, Escalation, OpenAILLM, TokenPrice
from s2t_agents.triggers import entropy

QUESTION = "Ann has 37 shells. She finds 48 more. Then 19 are lost. How many shells are left?"


def main() -> None:
    """Ask one question and say who decided."""
    parser = argparse.ArgumentParser(description="Ask an OpenAI-compatible server where the small model is unsure.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="up to and including /v1")
    parser.add_argument("--model", default="s2t-demo-llm", help="as the server calls it")
    parser.add_argument("--key-env", help="the environment variable that holds an API key")
    given = parser.parse_args()
    llm = OpenAILLM(
        given.url,
        given.model,
        api_key_env=given.key_env,
        price=TokenPrice(Decimal("0.50"), Decimal("1.50")),  # what a million tokens cost you there
    )
    model = ChatS2T(
        model="s2t-demo",
        trigger=entropy(above=0.1),
        escalation=Escalation(llm, margin=1.0),
        budget=Budget(usd="0.001", seconds=30),
    )
    answer = model.invoke(QUESTION)
    s2t = answer.response_metadata["s2t"]
    print(answer.text)
    print(f"{s2t['escalations']} picked by the LLM for ${s2t['cost_usd']['llm']:.7f}, degraded: {s2t['degraded']}")


if __name__ == "__main__":
    main()
