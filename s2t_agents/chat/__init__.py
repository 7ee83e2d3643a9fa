"""``ChatS2T``, and everything between LangChain messages and token ids."""
