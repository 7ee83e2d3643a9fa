"""From rollouts to a selector directory: choose groups, read each trajectory once, fit the probe, fit the selector."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ..atomic_write import sole_run, write_whole
from ..errors import ConfigError, InputError
from ..scheduling.language_model import LanguageModel
from ..selectors.config import CONFIG_FILE, BaseIdentity, SelectorConfig
from ..selectors.learned_trigger import save_probe
from ..selectors.reference import Reference
from .card import write_card
from .config import TrainConfig
from .crew import Crew
from .differences import differences
from .disagreement import fit_probe, hidden_along
from .fit import CHECKPOINT, State, fit
from .groups import choose, read_for, split
from .labels import check_same_ids
from .objectives import fresh_selector, objective_for
from .paid import Paid, read_paid
from .progress import quiet
from .shards import MANIFEST
from .workers import Workers, free_port

SETTINGS = "training.json"

IDENTIFYING = {"model_type", "hidden_size", "tokenizer_fingerprint", "weights_fingerprint"}
"""Of the base, what a training that goes on compares."""


def train(config: TrainConfig, crew: Crew | None = None) -> Path:
    """Train one selector; a killed run goes on from its last checkpoint, a finished one is left alone.

    Args:
        config: see ``TrainConfig``.
        crew: processes that share every batch; their number changes nothing but the seconds. Without one, those that a
            launcher started, see ``workers``.

    Returns:
        The selector's directory: weights, ``probe.safetensors``, ``selector.json`` and a model card.

    Raises:
        FolderInUse: another run is at work there.
        ConfigError: the directory holds a selector of other settings; rollouts or paid groups of another model; an LLM
            that does not fit the SLM, where it is needed.
        InputError: unfinished rollouts, or too few; a file of paid groups that is none.
        S2TError: the loss is no longer a number; the last checkpoint stands.
    """
    if crew is not None and crew.count > 1:
        with sole_run(config.out):
            for _ in crew.each(partial(_train_as, config, crew.count, free_port()), range(crew.count)):
                pass
        return config.out
    workers = Workers()
    models = (
        config.models if workers.device is None else config.models.model_copy(update={"device": str(workers.device)})
    )
    with sole_run(config.out) if workers.first else nullcontext():
        _train(models.load_slm(), config, workers)
    return config.out


def train_with(slm: LanguageModel, config: TrainConfig) -> None:
    """``train`` on a model that is loaded already, in this process alone."""
    with sole_run(config.out):
        _train(slm, config, Workers())


def _train_as(config: TrainConfig, count: int, port: int, rank: int) -> None:
    """One of ``count`` processes of a crew; only the first shows how far it is."""
    with Workers.joined(rank, count, port) as workers, quiet(rank > 0):
        _train(config.models.load_slm(), config, workers)


def _train(slm: LanguageModel, config: TrainConfig, workers: Workers) -> None:
    settings = config.fit
    paid = read_paid(slm, config.paid, settings.k)
    made_from = _made_from(config, slm)
    finished = _finished(config.out, made_from)
    workers.wait()  # no process writes before all have looked
    if finished:
        return
    llm = _llm(slm, config)
    shards = read_for(slm, config.rollouts, settings.k)
    examples = choose(shards, k=settings.k, rate=settings.rate, kl_rate=settings.kl_rate)
    learn, hold = split(examples, settings.validation)
    groups, held = sum(len(e.positions) for e in learn), sum(len(e.positions) for e in hold)
    if not groups or not held:
        raise InputError(
            f"{groups} training and {held} validation groups are too few.",
            hint="Collect more items, or raise `rate` or `validation`.",
        )
    hidden = workers.everyones(hidden_along(slm, workers.part(examples)))
    of = {id(example): states for example, states in zip(examples, hidden, strict=True)}
    probe = fit_probe(learn, [of[id(example)] for example in learn], seed=settings.seed)
    selector = fresh_selector(slm, config.kind, settings)
    states = [of[id(example)] for example in learn] + (hidden_along(slm, paid.examples) if paid.examples else [])
    train_objective = objective_for(selector, [*learn, *paid.examples], states, settings, llm)
    validation = objective_for(selector, hold, [of[id(example)] for example in hold], settings)
    if workers.first:
        write_whole(config.out / SETTINGS, (json.dumps(made_from, indent=2) + "\n").encode())
    state = fit(selector, slm, train_objective, validation, settings, config.out, workers)
    if workers.first:
        save_probe(config.out, probe.weight, probe.bias)
        figures = _figures(config, state, paid, groups, held, len(learn), len(hold))
        identity = BaseIdentity.of(slm)
        Reference.of(selector, slm).save(config.out)
        selector.save(config.out, SelectorConfig(kind=config.kind, base=identity, k=settings.k, training=figures))
        write_card(config.out)
        (config.out / CHECKPOINT).unlink(missing_ok=True)
    workers.wait()  # no process reads the directory before it is whole


def _llm(slm: LanguageModel, config: TrainConfig) -> LanguageModel | None:
    """The LLM, where more is learned from it than the rollouts keep.

    Raises:
        ConfigError: other ids than the SLM's.
        ModelNotFound: it is not there.
    """
    if not config.fit.prompt_share:
        return None
    llm = config.models.load_llm()
    check_same_ids(slm, llm.tokenizer, llm.name)
    llm.model.requires_grad_(False)
    return llm


def _figures(
    config: TrainConfig, state: State, paid: Paid, groups: int, held_groups: int, trajectories: int, held: int
) -> dict[str, Any]:
    """What ``selector.json`` remembers of the training."""
    return {
        "groups": groups,
        "trajectories": trajectories,
        **({"paid_groups": paid.groups, "paid_left_out": paid.left_out} if config.paid else {}),
        "validation_groups": held_groups,
        "validation_trajectories": held,
        "agreement_untrained": round(state.looks[0].agreement, 4),
        "agreement": round(state.best, 4),
        "best_step": state.best_step,
        "steps": state.step,
        "settings": config.fit.model_dump(mode="json", exclude=_unused(config)),
    }


def _made_from(config: TrainConfig, slm: LanguageModel) -> dict[str, Any]:
    """All that decides the weights."""
    return {
        "kind": config.kind,
        # how memory is spent changes no weights: a run that had too little may go on with checkpointing
        "fit": config.fit.model_dump(mode="json", exclude={"checkpointing"} | _unused(config)),
        "slm": BaseIdentity.of(slm).model_dump(include=IDENTIFYING),
        "rollouts": [_digest(folder / MANIFEST) for folder in config.rollouts],
        **({"paid": [_digest(file) for file in config.paid]} if config.paid else {}),
    }


def _finished(out: Path, made_from: dict[str, Any]) -> bool:
    """Whether this very training was finished before. A folder where none was begun in earnest says nothing.

    Raises:
        ConfigError: something else was trained there, or is half trained.
    """
    finished, begun = (out / CONFIG_FILE).exists(), (out / CHECKPOINT).exists()
    file = out / SETTINGS
    if (finished or begun) and file.exists() and (differing := differences(_read(file), made_from)):
        raise ConfigError(
            f"{out} holds a{'' if finished else ' half-trained'} selector of other settings: {differing}.",
            hint=f"Put them back, give another `out`, or move that folder away: mv {out} {out}-before.",
        )
    return finished


def _unused(config: TrainConfig) -> set[str]:
    """A setting that is off is left out, as in older folders."""
    return set() if config.fit.prompt_share else {"prompt_share"}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}.", hint="Delete the folder to train anew.") from error


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else None
