"""Small talk: what people say when they want no tool, and what is said back."""

from __future__ import annotations

from random import Random

TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi there.", "Hey!", "Good day!", "Hello", "Hi"), "Hello! How can I help you?"),
    (("How do you do?", "How are you today?", "Are you well?", "How is it going?"), "I am fine, thank you."),
    (("Who are you?", "What is your name?", "What are you?"), "I am a small model, here to help you."),
    (("Thanks!", "Thank you.", "Thank you very much!", "That was helpful."), "You are welcome!"),
    (("Bye!", "Goodbye.", "See you soon.", "Good night."), "Goodbye! See you soon."),
    (("Tell me a joke.", "Make me laugh.", "Do you know a joke?", "Tell me a joke about dogs."),
     "Why did the dog sit in the shade? It did not want to be a hot dog."),
    (("What can you do?", "How can you help me?"), "I can work with numbers and call tools."),
    (("I am tired.", "I had a long day."), "Then have a good rest."),
    (("I am happy.", "What a nice day!", "I love this day."), "I am glad to hear that!"),
    (("Do you like music?", "Do you like songs?"), "I like to hear about music."),
    (("Sing me a song.", "Write a poem.", "Tell me a story.", "Write a story about a dog.", "Write a short poem."),
     "The sun went down, the moon came up, and the stars were bright over the sea."),
    (("Sorry.", "I am sorry."), "No problem at all."),
    (("Are you a person?", "Are you human?"), "No, I am a small model."),
    (("What is the sun?", "Tell me about the sun."), "The sun is a star."),
    (("What color is grass?", "Is grass green?"), "Grass is green."),
    (("Good morning!", "Good morning to you."), "Good morning! How can I help you?"),
)  # fmt: skip


def draw_talk(rng: Random) -> tuple[str, str]:
    """What is said, and the usual reply."""
    said, reply = rng.choice(TALK)
    return rng.choice(said), reply
