"""What tests of the torch backend look at besides the backend protocol."""

from collections.abc import Callable, Sequence

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
