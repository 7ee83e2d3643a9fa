"""Rollouts: labelled truly, whole or not there, the same however often the run was killed."""

import errno
import itertools
import json
import os
import queue
import shutil
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fixtures import QUICK, prompts, save_model, tiny_pair, write_prompts

from s2t_agents.backends.statistics import FLOOR
from s2t_agents.backends.torch.backend import TorchBackend
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError, InputError, ModelNotFound, S2TError, TokenizerMismatch
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import tiny_model
from s2t_agents.training import progress
from s2t_agents.training import shards as shard_files
from s2t_agents.training.batching import dialogues
from s2t_agents.training.collect import Collector, collect, collect_with
from s2t_agents.training.config import CollectConfig, Models, Rollouts
from s2t_agents.training.crew import Crew
from s2t_agents.training.dialogue import Speaker
from s2t_agents.training.disagreement import hidden_along
from s2t_agents.training.groups import Example, choose, read_for
from s2t_agents.training.labels import LocalTeacher, along, check_same_ids, label
from s2t_agents.training.losses import selection_loss
from s2t_agents.training.shards import read_manifest, read_shards
from s2t_agents.training.tasks import DemoTaskConfig, JsonlTask, JsonlTaskConfig, disjoint
from s2t_agents.training.tasks.items import Calls
from s2t_agents.types import Sampling


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_labels_are_what_both_models_say_at_each_step(pair, tmp_path):
    slm, llm, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    shard = read_shards(tmp_path / "rollouts")[1]
    for prompt, ids, steps in list(shard.trajectories())[:2]:
        ours, theirs = TokenSequence(slm), TokenSequence(llm)
        for at, row in enumerate(range(steps.start, steps.stop)):
            new = prompt if not at else [ids[at - 1]]
            ours.append(new)
            theirs.append(new)
            p, q = ours.logits.log_softmax(0), theirs.logits.log_softmax(0)
            candidates = shard.candidates[row].long()
            assert candidates.tolist() == p.topk(8).indices.tolist()
            torch.testing.assert_close(shard.slm[row], p[candidates], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(shard.llm[row], q[candidates], atol=1e-4, rtol=1e-4)
            assert int(shard.llm_best[row]) == int(q.argmax())
            assert float(shard.kl[row]) == pytest.approx(float((q.exp() * (q - p)).sum()), abs=1e-3)
            assert float(shard.entropy[row]) == pytest.approx(float(-(p.exp() * p).sum()), abs=1e-3)
            assert ids[at] == int(candidates[0])  # greedy


FIRST = ([5, 6, 7], [8, 9])
SECOND = ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14])  # begins with all of the first
OTHER = ([5, 6, 9], [8])


def test_a_dialogue_is_read_once_and_its_turns_are_what_they_are_alone(pair, monkeypatch):
    slm, rows = pair[0], []
    read = TorchBackend.read_rows
    monkeypatch.setattr(
        TorchBackend, "read_rows", lambda self, ids, *rest: rows.append(len(ids)) or read(self, ids, *rest)
    )
    turns = [FIRST, SECOND, OTHER]
    together = along(slm, turns)
    assert rows == [2, 2]  # the prompts, and what follows them
    for turn, found in zip(turns, together, strict=True):
        assert len(found) == len(turn[1])
        torch.testing.assert_close(found, along(slm, [turn])[0], atol=1e-5, rtol=1e-5)


def test_hidden_states_along_a_dialogue_are_those_of_its_turns_alone(pair):
    nothing = torch.empty(0)
    examples = [
        Example(
            ids=prompt + ids[:-1],
            item="",
            positions=nothing,
            candidates=nothing,
            slm=nothing,
            llm=nothing,
            all_positions=len(prompt) + torch.arange(len(ids)),
            differs=nothing,
            entropy=nothing,
        )
        for prompt, ids in (FIRST, SECOND, OTHER)
    ]
    for example, found in zip(examples, hidden_along(pair[0], examples), strict=True):
        assert len(found) == len(example.all_positions)
        torch.testing.assert_close(found, hidden_along(pair[0], [example])[0], atol=1e-5, rtol=1e-5)


@given(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=8))
def test_a_chain_is_made_of_neighbours_that_begin_with_each_other(rows):
    chains = dialogues(rows)
    assert [at for chain in chains for at in chain] == list(range(len(rows)))
    for chain in chains:
        assert all(rows[chain[-1]][: len(rows[at])] == rows[at] for at in chain)
    for one, other in itertools.pairwise(chains):
        before, after = rows[one[-1]], rows[other[0]]
        assert after[: len(before)] != before


def test_greedy_and_sampled_rollouts_of_every_item(pair, tmp_path):
    slm, _, teacher = pair
    settings = QUICK.model_copy(update={"samples": 2})
    collect_with(slm, teacher, prompts(tmp_path), settings, tmp_path / "rollouts")
    found = read_shards(tmp_path / "rollouts")
    assert [shard.item.tolist() for shard in found] == [[*range(at, at + 4)] * 3 for at in (0, 4, 8)]
    rows = [ids for _, ids, _ in found[0].trajectories()]
    assert rows[0] != rows[4] != rows[8]


def test_greedy_rollouts_are_the_same_beside_samples(pair, tmp_path):
    slm, _, teacher = pair
    task, found = prompts(tmp_path), {}
    for samples in (0, 2):
        settings = QUICK.model_copy(update={"samples": samples})
        collect_with(slm, teacher, task, settings, tmp_path / str(samples))
        shard = read_shards(tmp_path / str(samples))[0]
        found[samples] = [ids for _, ids, _ in shard.trajectories()][:4]
    assert found[0] == found[2]


def test_a_run_that_was_stopped_after_any_shard_ends_the_same(pair, tmp_path, monkeypatch):
    slm, _, teacher = pair
    task, settings = prompts(tmp_path), QUICK.model_copy(update={"samples": 1})
    collect_with(slm, teacher, task, settings, tmp_path / "whole")
    write = shard_files.write_whole

    def dies_at_the_second(path, data):
        if path.name == "shard-00001.safetensors":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(shard_files, "write_whole", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        collect_with(slm, teacher, task, settings, tmp_path / "broken")
    with pytest.raises(InputError, match="2 of 3 shards are missing"):
        read_shards(tmp_path / "broken")
    monkeypatch.undo()
    collect_with(slm, teacher, task, settings, tmp_path / "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


SCRIPT = """
import sys
from pathlib import Path
from s2t_agents.training.collect import collect
from s2t_agents.training.config import CollectConfig
collect(CollectConfig.model_validate_json(Path(sys.argv[1]).read_text()))
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_and_again_ends_the_same(pair, tmp_path):
    slm, llm, _ = pair
    models = Models(
        slm=str(save_model(slm, tmp_path / "slm")), llm=str(save_model(llm, tmp_path / "llm")), device="cpu"
    )
    file = write_prompts(tmp_path / "prompts.jsonl", 24)
    settings = QUICK.model_copy(update={"shard_items": 1, "max_tokens": 40})
    config = CollectConfig(
        models=models, task=JsonlTaskConfig(task="jsonl", path=file), out=tmp_path / "killed", rollouts=settings
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = forked.start("-c", SCRIPT, str(tmp_path / "config.json"))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("shard-*"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    made = len(list((tmp_path / "killed").glob("shard-*")))
    assert 5 <= made < 24
    collect(config)
    collect(config.model_copy(update={"out": tmp_path / "whole"}))
    for half in (tmp_path / "killed").glob(".*.part"):
        half.unlink()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_collection_in_bfloat16_is_of_the_same_weights_and_not_the_same_collection(pair, tmp_path):
    slm, llm, _ = pair
    models = Models(
        slm=str(save_model(slm, tmp_path / "slm")), llm=str(save_model(llm, tmp_path / "llm")), device="cpu"
    )
    task = JsonlTaskConfig(task="jsonl", path=write_prompts(tmp_path / "prompts.jsonl", 4))
    config = CollectConfig(models=models, task=task, out=tmp_path / "rollouts", rollouts=QUICK)
    half = config.model_copy(update={"rollouts": QUICK.model_copy(update={"dtype": "bfloat16"})})
    collect(half)
    choose(read_for(models.load_slm(), [tmp_path / "rollouts"], 4), k=4, rate=0.5, kl_rate=0.0)
    with pytest.raises(ConfigError, match="other"):
        collect(config)


@pytest.mark.slow
def test_several_processes_make_the_same_shards_as_one(pair, tmp_path):
    slm, llm, _ = pair
    models = Models(
        slm=str(save_model(slm, tmp_path / "slm")), llm=str(save_model(llm, tmp_path / "llm")), device="cpu"
    )
    task = JsonlTaskConfig(task="jsonl", path=write_prompts(tmp_path / "prompts.jsonl", 22))
    config = CollectConfig(models=models, task=task, out=tmp_path / "one", rollouts=QUICK)
    collect(config)
    with Crew(2) as crew:
        collect(config.model_copy(update={"out": tmp_path / "two"}), crew)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert len(files(tmp_path / "two")) == 7


def test_prompts_that_changed_since_the_last_collection_are_read_anew(pair, tmp_path):
    slm, llm, _ = pair
    models = Models(
        slm=str(save_model(slm, tmp_path / "slm")), llm=str(save_model(llm, tmp_path / "llm")), device="cpu"
    )
    task = JsonlTaskConfig(task="jsonl", path=write_prompts(tmp_path / "prompts.jsonl", 4))
    config = CollectConfig(models=models, task=task, out=tmp_path / "out", rollouts=QUICK)
    collect(config)
    write_prompts(tmp_path / "prompts.jsonl", 8)
    with pytest.raises(ConfigError, match=r"prompts \(hash\) is .* number of prompts is 4 there and 8 now"):
        collect(config)


BAD = {
    "too long": "word " * 600,
    "a NUL": "one \0 two",
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}],
}


@pytest.mark.parametrize("prompt", BAD.values(), ids=BAD)
def test_prompts_that_cannot_be_read_are_named_before_the_first_answer(pair, tmp_path, prompt):
    slm, _, teacher = pair
    good = write_prompts(tmp_path / "good.jsonl", 12).read_text().splitlines()
    bad = [json.dumps({"id": name, "prompt": prompt, "answer": "1"}) for name in ("first", "second")]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([*good[:9], bad[0], *good[9:], bad[1]]))
    message = rf"2 of 14 prompts cannot be used, id 'first' of {file}, line 10 first: "
    with pytest.raises(InputError, match=message):
        collect_with(slm, teacher, JsonlTask(file, "numeric"), QUICK, tmp_path / "rollouts")
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(("items", "size"), [(1, 4), (20, 4), (80, 10), (700, 88), (2000, 128)])
def test_few_prompts_are_collected_in_small_shards(pair, tmp_path, monkeypatch, items, size):
    slm, _, teacher = pair
    monkeypatch.setattr(Collector, "make", lambda self, number, progress: 0)
    collect_with(slm, teacher, prompts(tmp_path, items), Rollouts(), tmp_path / "rollouts")
    manifest = read_manifest(tmp_path / "rollouts")
    assert (manifest.settings["shard_items"], manifest.shards) == (size, -(-items // size))


@pytest.mark.parametrize("later", [None, 2, 6])
def test_a_collection_goes_on_with_the_shards_that_it_was_begun_with(pair, tmp_path, later):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    (tmp_path / "begun" / "shard-00001.safetensors").unlink()
    changed = QUICK.model_copy(update={"shard_items": later})
    collect_with(slm, teacher, prompts(tmp_path), changed, tmp_path / "begun")
    assert files(tmp_path / "begun") == files(tmp_path / "whole")


def test_progress_counts_answers_and_labels_within_a_shard(pair, tmp_path, monkeypatch):
    slm, _, teacher = pair
    post = queue.SimpleQueue()
    monkeypatch.setattr(progress, "TELL_S", 0.0)
    monkeypatch.setattr(progress, "_post", post)
    settings = QUICK.model_copy(update={"shard_items": 12, "samples": 1})
    collect_with(slm, teacher, prompts(tmp_path), settings, tmp_path / "rollouts")
    told = [post.get() for _ in range(post.qsize())]
    assert {each.total for each in told} == {48, None}  # 12 prompts, greedy and one sample, answered and labelled
    assert [each.done for each in told[:25]] == list(range(25))
    assert told[-1].done == 48


def test_a_full_disk_is_named_and_whole_shards_are_kept(pair, tmp_path, monkeypatch):
    slm, _, teacher = pair
    task = prompts(tmp_path)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:  # the manifest and two shards fit
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(S2TError, match="shard-00002.*No space left on device.*is kept"):
        collect_with(slm, teacher, task, QUICK, tmp_path / "rollouts")
    assert sorted(files(tmp_path / "rollouts")) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    monkeypatch.undo()
    collect_with(slm, teacher, task, QUICK, tmp_path / "rollouts")
    assert len(read_shards(tmp_path / "rollouts")) == 3


def test_a_folder_of_other_rollouts_is_refused(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    changed = QUICK.model_copy(update={"k": 4, "max_tokens": 9})
    with pytest.raises(ConfigError, match=r"settings: k is 8 there and 4 now; max_tokens is 12 there and 9 now\."):
        collect_with(slm, teacher, prompts(tmp_path), changed, tmp_path / "rollouts")
    with pytest.raises(ConfigError, match=r"task is .*-12 there.*prompts \(hash\) is .*number of prompts is 12 there"):
        collect_with(slm, teacher, prompts(tmp_path, 11), QUICK, tmp_path / "rollouts")


def test_a_folder_in_which_no_shard_was_made_blocks_nobody(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    for file in (tmp_path / "rollouts").glob("shard-*"):
        file.unlink()
    collect_with(slm, teacher, prompts(tmp_path), QUICK.model_copy(update={"k": 4}), tmp_path / "rollouts")
    assert read_manifest(tmp_path / "rollouts").settings["k"] == 4


def test_the_manifest_names_models_prompts_and_settings(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    manifest = read_manifest(tmp_path / "rollouts")
    assert manifest.slm.weights_fingerprint == slm.weights_fingerprint != manifest.llm.weights_fingerprint
    assert (manifest.items, manifest.shards, manifest.settings["k"]) == (12, 3, 8)


def test_nothing_to_collect_is_refused_before_any_model_is_loaded(tmp_path):
    config = CollectConfig(
        models=Models(slm="/nowhere", llm="/nowhere"),
        task=DemoTaskConfig(count=1),
        out=tmp_path,
        rollouts=Rollouts(greedy=False),
    )
    with pytest.raises(ConfigError, match="no rollouts"):
        collect(config)


def test_no_rollouts_and_broken_shards_are_named(pair, tmp_path):
    slm, _, teacher = pair
    with pytest.raises(ModelNotFound, match=r"manifest.json is missing.*collect"):
        read_shards(tmp_path)
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    (tmp_path / "rollouts" / "shard-00001.safetensors").write_bytes(b"no shard")
    with pytest.raises(InputError, match=r"shard-00001.safetensors is not a readable shard"):
        read_shards(tmp_path / "rollouts")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no prompts"),
        (['{"prompt": "a", "answer": "1", "id": 7}', '{"prompt": "b", "answer": "1", "id": 7}'], "'7'"),
        (['{"prompt": "a", "answer": "1"}', '{"prompt": "b"}'], "no answer for 1 of 2 prompts, id '2'"),
        (['{"prompt": "", "answer": "1"}'], "line 1: no prompt"),
        (["{"], "line 1: not JSON"),
        (['{"prompt": " \\n", "answer": "1"}'], "line 1: no prompt"),
        (['{"prompt": "a", "answer": "1"}', '{"prompt": "a", "answer": "1", "tool": []}'], "line 2: .*mean 'tools'"),
        (['{"prompt": "a", "answers": "1"}'], "line 1: .*mean 'answer'"),
        (['{"prompt": "a", "answer": "1", "id": null}'], "line 1: id is null"),
        (['{"prompt": "a", "answer": "1", "id": [1]}'], r"line 1: id is \[1\]"),
        (['{"prompt": "a", "answer": "1", "tools": [{"x": 1}]}'], "line 1: .*a tool has no name"),
        (['{"prompt": [{"role": "user", "content": null}], "answer": "1"}'], "line 1: .*has no content"),
        (['{"prompt": [{"role": "assistant", "content": "b"}], "answer": "1"}'], "line 1: .*ends with the assistant"),
    ],
)
def test_prompt_files_that_can_not_be_used(tmp_path, lines, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        JsonlTask(file, "numeric")


def test_a_byte_order_mark_and_other_fields_are_no_fault(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "answer": "1", "source": "log"}\n', encoding="utf-8-sig")
    assert len(JsonlTask(file, "numeric").items) == 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"first": 10}, "holds 10 prompts, 0 of them from first = 10 on"),
        ({"first": 12, "count": 3}, "holds 10 prompts, 0 of them from first = 12 on, and count is 3"),
        ({"first": 6, "count": 5}, "holds 10 prompts, 4 of them from first = 6 on, and count is 5"),
        ({"count": 11}, "holds 10 prompts, 10 of them from first = 0 on, and count is 11"),
    ],
)
def test_a_part_beyond_the_end_of_a_file_is_named_with_what_there_is(tmp_path, part, message):
    file = write_prompts(tmp_path / "prompts.jsonl", 10)
    with pytest.raises(InputError, match=message):
        JsonlTask(file, "numeric", **part)


def test_answers_are_not_needed_to_collect(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    assert len(JsonlTask(file, "numeric", answers=False).items) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone.jsonl cannot be read: [^.]*\. Give a JSONL file of prompts\.$"):
        JsonlTask(tmp_path / "gone.jsonl", "numeric")
    with pytest.raises(InputError, match=f"starts at the working directory, {Path.cwd()}"):
        JsonlTask(Path("gone.jsonl"), "numeric")


def test_parts_of_one_file_share_nothing_and_overlaps_are_refused(tmp_path):
    file = write_prompts(tmp_path / "prompts.jsonl", 10)
    first, second = JsonlTask(file, "numeric", count=5), JsonlTask(file, "numeric", first=5)
    disjoint(first, second)
    with pytest.raises(ConfigError, match="share 1 prompts, '4'"):
        disjoint(first, JsonlTask(file, "numeric", first=4))


def test_splits_of_the_demo_world_share_nothing():
    heldout, other = DemoTaskConfig(first=0, count=20), DemoTaskConfig(first=20, count=20)
    disjoint(heldout.open(), other.open())
    with pytest.raises(ConfigError, match="share"):
        disjoint(heldout.open(), DemoTaskConfig(first=19, count=5).open())


def test_models_with_other_token_ids_are_refused(pair):
    slm, llm, _ = pair

    class Shifted:
        def get_vocab(self):
            return {token: i + 1 for token, i in llm.tokenizer.get_vocab().items()}

    with pytest.raises(TokenizerMismatch, match="disagree on 263 token ids"):
        check_same_ids(slm, Shifted(), "other")


def test_an_on_policy_round_needs_a_calibrated_selector(pair, tmp_path):
    from s2t_agents.selectors.config import BaseIdentity, SelectorConfig
    from s2t_agents.training.config import Fit
    from s2t_agents.training.objectives import fresh_selector

    slm, _, teacher = pair
    selector = fresh_selector(slm, "head", Fit(width=8))
    selector.save(tmp_path / "head", SelectorConfig(kind="head", base=BaseIdentity.of(slm), k=4))
    settings = QUICK.model_copy(update={"selector": tmp_path / "head"})
    with pytest.raises(ConfigError, match="no thresholds"):
        collect_with(slm, teacher, prompts(tmp_path), settings, tmp_path / "rollouts")


def test_a_trajectory_is_labelled_the_same_in_any_batch(pair):
    slm, _, teacher = pair
    trajectories = [([65] * n, [66] * m) for n, m in ((3, 5), (30, 2), (9, 20), (4, 4))]
    together = label(slm, teacher, trajectories, 4)
    alone = label(slm, teacher, trajectories[2:3], 4)[0]
    torch.testing.assert_close(together[2].llm, alone.llm, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[2].kl, alone.kl, atol=1e-4, rtol=1e-4)


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"unit": {"enum": ["mm", "cm", "mile", "inch"]}, "exact": {"type": "boolean"}},
                "required": ["unit", "exact"],
            },
        },
    },
)


def test_labels_are_of_what_was_legal(tmp_path):
    slm, llm = (tiny_model("qwen3", seed=seed, max_position_embeddings=1024) for seed in (1, 2))
    teacher = LocalTeacher(llm)
    task = prompts(tmp_path, 4)
    task.items = [replace(item, tools=TOOLS, calls=Calls()) for item in task.items]
    task.call = lambda item, name, arguments: None  # the call is the answer
    settings = Rollouts(k=4, max_tokens=200, shard_items=4)
    collect_with(slm, teacher, task, settings, tmp_path / "out")
    (shard,) = read_shards(tmp_path / "out")
    speaker = Speaker(slm)
    for (prompt, ids, steps), item in zip(shard.trajectories(), task.items, strict=True):
        assert [name for name, _ in speaker.read(ids).calls] == ["add"]
        grammar = speaker.grammar(item, prompt, 200)
        live = list(Engine(slm, k=4).steps(prompt, Sampling(max_tokens=200), grammar=grammar))
        assert ids == [step.token_id for step in live]
        for at, step in zip(range(steps.start, steps.stop), live, strict=True):
            legal = shard.slm[at] > FLOOR
            assert shard.candidates[at][0] == step.token_id
            assert torch.equal(legal, shard.llm[at] > FLOOR)
            assert shard.llm_best[at] in shard.candidates[at][legal] or legal.all()
            assert shard.slm[at][legal].exp().sum() <= 1 + 1e-4
            if step.picked_by == "grammar":
                assert (int(legal.sum()), float(shard.entropy[at]), float(shard.kl[at])) == (1, 0.0, 0.0)
    forced, free = (shard.entropy == 0).sum(), (shard.entropy > 0).sum()
    assert forced > 20
    assert free >= 8
    examples = choose([("x", shard)], k=4, rate=0.2, kl_rate=0.05)
    scores = torch.cat([example.slm for example in examples])
    assert selection_loss(scores, torch.cat([e.llm for e in examples]), soft=0.5, temperature=1.0).isfinite()
