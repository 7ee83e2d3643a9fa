"""What tests look at, and hold, of a model on the torch backend besides the backend protocol."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from s2t_agents import ChatS2T
from s2t_agents.backends.base import Output, Work
from s2t_agents.backends.torch.model_runner import ModelRunner
from s2t_agents.scheduling.language_model import LanguageModel


def runner(model: LanguageModel) -> ModelRunner:
    """The path chooser of a model on the torch backend."""
    return model.torch_backend.runner


def watched_forwards(model: LanguageModel, watch: Callable[[list[Work]], None]) -> None:
    """Tell ``watch`` of every batch before its forward; what it raises, the forward raises."""
    forward = model.backend.forward

    def watched(batch: Sequence[Work]) -> list[Output]:
        watch(list(batch))
        return forward(batch)

    model.backend.forward = watched  # type: ignore[method-assign]


@contextmanager
def slot_taken(model: ChatS2T) -> Iterator[None]:
    """Another generation holds the engine's only slot, and does not give it back."""
    stream = model.stream("hello")
    next(stream)
    yield
    assert model.engine.admission.queued == 0
    stream.close()
