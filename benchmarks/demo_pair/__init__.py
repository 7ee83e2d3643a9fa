"""How the bundled pair was made: tokenizer, corpus, training, and checks of the result. See the README beside this."""
