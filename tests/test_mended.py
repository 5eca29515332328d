"""What once went wrong without a word or ended in a traceback, with the right value: checkpoints,
methods, templates, models, run folders, signals; and the loops of the scripts, by their command
lines, against independent computations.

`torchrun -m tests.test_mended FILE` writes what two ranks find, for the last test.
"""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import amft
import fomaml
import measure
import meta_lora
import plots
import run
import tiny.train
from checker import extract_answer, grade, is_equal
from data import (
    DataError,
    Example,
    Task,
    check_numbers,
    encode,
    episode_tasks,
    is_right,
    load_tasks,
    prompt_texts,
    sample_episode,
    split,
    template,
)
from games.play import Trajectory, Turn, demonstrate, play
from games.rules import Result
from learner import Pass, PolicyLearner, Row
from lora import Adapters
from model import (
    ModelError,
    World,
    layers_to_shard,
    load_config,
    load_readers,
    load_weights,
    setup,
)
from policy import Policy, sample
from tests.helpers import (
    ROOT,
    Parity,
    all_rows,
    assert_same_weights,
    chunks,
    command,
    final_weights,
    functional,
    logged,
    meta_gradient,
    one_rank_mesh,
    random_episodes,
    random_rows,
    reference_loss,
    run_here,
    run_well,
    save_small_model,
    small_llama,
    weights_of,
)

CPU = torch.device("cpu")
SCRIPTS = {"fomaml": fomaml, "meta_lora": meta_lora, "amft": amft}

# --------------------------------------------------------------------------------------------------
# Small data, a small game, short runs


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take most of such a short run; other tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "figure", lambda *_: None)
        yield


def parity_task() -> tuple:
    """What amft.load_task returns."""
    return Parity(), Parity(), Parity(), {"test": (Parity(), 4)}, "parity"


@pytest.fixture
def parity(monkeypatch):
    """amft.py plays Parity instead of solving problems."""
    monkeypatch.setattr(amft, "load_task", lambda *_: parity_task())


META_RUN = [
    "--steps", "4", "--save-every", "2", "--inner-steps", "2", "--tasks-per-step", "2",
    "--support-batch", "2", "--query-batch", "2", "--eval-every", "-1", "--eval-problems", "4",
    "--eval-max-new-tokens", "4", "--inner-lr", "0.04", "--outer-lr", "1e-3", "--shots", "0",
    "--no-eval-curve",
]  # fmt: skip
PARITY_RUN = [
    "--steps", "2", "--warmup-steps", "0", "--prompts-per-step", "4", "--samples", "4",
    "--max-new-tokens", "12", "--validation-prompts", "4", "--eval-every", "-1", "--show", "0",
]  # fmt: skip


def settings_of(name: str, model, sums: Path) -> list:
    """A short run of a script."""
    if name == "amft":
        return ["--model", model, *PARITY_RUN]
    inner = ["--inner-optimizer", "sgd"] if name == "fomaml" else []
    return ["--model", model, "--data", sums, *META_RUN, *inner]


def edited(folder: Path, name: str, **changes) -> None:
    """A JSON file of a model's folder with other values; None takes a key away."""
    file = folder / name
    values = json.loads(file.read_text()) if file.exists() else {}
    values = {k: v for k, v in (values | changes).items() if v is not None}
    file.write_text(json.dumps(values))


@pytest.fixture
def own_model(tmp_path) -> Path:
    """A copy of the small model, to change."""
    return save_small_model(tmp_path / "model")


def assert_one_line(capsys, *words: str) -> None:
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert error.count("\n") == 1, error


# --------------------------------------------------------------------------------------------------
# Checkpoints keep the source's generation_config and stop where the training's turns stop


def ends_with_another_token(folder: Path) -> None:
    """As base models whose template ends a turn with <|end|> and whose eos is another token."""
    edited(folder, "tokenizer_config.json", eos_token="<|system|>")
    _, tokenizer = load_config(str(folder))
    assert template(tokenizer).end != [tokenizer.eos_token_id]
    assert template(tokenizer).stop == {tokenizer.eos_token_id, *template(tokenizer).end}
    eos = tokenizer.eos_token_id
    edited(folder, "config.json", eos_token_id=eos)
    edited(folder, "generation_config.json", eos_token_id=eos)


@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoint_ends_where_turns_end(name, own_model, sums, tmp_path, parity):
    from transformers import AutoTokenizer, GenerationConfig

    ends_with_another_token(own_model)
    edited(own_model, "generation_config.json", top_k=7, do_sample=True)
    flags, checkpoint = [*settings_of(name, own_model, sums), "--steps", "1"], "checkpoint"
    if name == "meta_lora":
        flags, checkpoint = [*flags, "--merge"], "merged"
    assert run_here(SCRIPTS[name], *flags, "--output-dir", tmp_path / "r") == 0
    saved = GenerationConfig.from_pretrained(tmp_path / "r" / checkpoint)
    words = AutoTokenizer.from_pretrained(own_model).convert_tokens_to_ids
    assert saved.eos_token_id == sorted(words(["<|end|>", "<|system|>"]))
    assert saved.top_k == 7
    assert saved.do_sample


@pytest.mark.parametrize("do_sample", [True, False])
def test_checkpoint_keeps_sampling_settings(do_sample, own_model, sums, tmp_path):
    """Also those that the library refuses to save: a temperature without sampling."""
    from transformers import GenerationConfig

    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 3, 4]}
    edited(own_model, "generation_config.json", do_sample=do_sample, **settings)
    flags = [*settings_of("fomaml", own_model, sums), "--steps", "1"]
    assert run_here(fomaml, *flags, "--output-dir", tmp_path / "r") == 0
    saved = GenerationConfig.from_pretrained(tmp_path / "r" / "checkpoint")
    for key, value in settings.items():
        assert getattr(saved, key) == value, key


# --------------------------------------------------------------------------------------------------
# amft.py


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory) -> Path:
    """A random GPT-2, which has dropout 0.1, with the embedded tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer = load_config("tiny")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 8, n_embd=32, n_layer=2, n_head=2, n_positions=256,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    assert config.resid_pdrop == 0.1
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)
    folder = tmp_path_factory.mktemp("dropout")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_dropout_is_off_in_reinforcement_learning(dropout_model, tmp_path, parity):
    """The policy that is trained is the one that was sampled."""
    flags = ["--model", dropout_model, *PARITY_RUN, "--method", "rl", "--steps", "1"]
    assert run_here(amft, *flags, "--output-dir", tmp_path / "r") == 0
    (row,) = logged(tmp_path / "r")
    assert row["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert row["clip_fraction"] == 0


def test_dropout_in_evaluations_is_that_of_the_seed(dropout_model, sums, tmp_path):
    """A run that was killed between a checkpoint and its evaluation evaluates as it would have."""
    flags = ["--model", dropout_model, "--data", sums, *META_RUN, "--steps", "2"]
    flags += ["--eval-every", "0", "--output-dir", tmp_path / "r"]
    assert run_here(fomaml, *flags) == 0
    rows = logged(tmp_path / "r", "evaluations.jsonl")
    file = tmp_path / "r" / "evaluations.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert run_here(fomaml, *flags, "--resume") == 0
    assert logged(tmp_path / "r", "evaluations.jsonl") == rows


def turn_of(reward: float, length: int = 3) -> Turn:
    return Turn([5, 6], [7] * length, [-1.0] * length, True, "", reward)


def learner_of(**settings) -> PolicyLearner:
    """A learner of one rank whose steps change nothing."""
    args = amft.with_defaults(amft.Args(**settings))
    policy = Policy(small_llama(), False).train()
    still = {"params": list(policy.parameters()), "lr": 0.0, "peak": 0.0}
    world = World(CPU, mesh=one_rank_mesh())
    return PolicyLearner(args, policy, torch.optim.AdamW([still]), world, 0)


def test_srft_imitates_right_turns_only():
    """A wrong turn of a game that was won later is not right."""
    args = amft.with_defaults(amft.Args(method="srft"))
    group = [Trajectory([turn_of(-1.0), turn_of(5.0)], won=True), Trajectory([turn_of(-1.0)])]
    _, rl = amft.rows_of(args, [group], [Trajectory([turn_of(5.0)], won=True)])
    assert [row.right for row in rl] == [False, True, False, True]
    assert [row.demonstration for row in rl] == [False, False, False, True]


def groups_of(prompts: int, samples: int) -> tuple[list, list]:
    """(groups, demonstrations): a sample of each prompt is right, but for every other prompt."""
    groups, shown = [], []
    for i in range(prompts):
        rewards = [float(k == 0 and i % 2 == 0) for k in range(samples)]
        groups.append([Trajectory([turn_of(r)], won=r > 0) for r in rewards])
        shown.append(Trajectory([turn_of(1.0, length=4)], won=True))
    return groups, shown


@pytest.fixture
def passes(monkeypatch) -> list[dict]:
    """Of each backward pass on L_RL or L_SFT: how many rows of each prompt, and what they weigh."""
    seen = []
    real = PolicyLearner.backward

    def backward(self, work):
        if work.rows:
            counts: dict[tuple, int] = {}
            for row in work.rows:
                key = row.prompt, row.demonstration
                counts[key] = counts.get(key, 0) + 1
            weights = sum(row.weight * len(row.turn.ids) for row in work.rows)
            seen.append({"losses": set(work.losses), "rows": counts, "weight": weights})
        return real(self, work)

    monkeypatch.setattr(PolicyLearner, "backward", backward)
    return seen


def test_minibatches_are_of_whole_prompts(process_group, passes):
    """LUFFY's two minibatches: each holds all samples of its prompts and their demonstrations."""
    learner = learner_of(method="luffy", minibatches=2, prompts_per_step=4, samples=8)
    sft, rl = amft.rows_of(learner.args, *groups_of(4, 7))
    assert not sft
    step = amft.train_on(learner, 0.0, sft, rl, schedule=1.0, with_D=False)
    assert step.steps == 2
    assert [p["losses"] for p in passes] == [{"rl"}, {"rl"}]
    for seen in passes:
        assert len(seen["rows"]) == 4
        assert sorted(shown for _, shown in seen["rows"]) == [False, False, True, True]
        for (_, shown), count in seen["rows"].items():
            assert count == (1 if shown else 7)
    prompts = [{prompt for prompt, _ in seen["rows"]} for seen in passes]
    assert prompts[0] | prompts[1] == {0, 1, 2, 3}


def test_weights_of_hpt_know_minibatches(process_group, passes):
    """Two minibatches weigh, on average, what the whole weighs."""
    found = {}
    for count in (1, 2):
        passes.clear()
        learner = learner_of(
            method="hpt", minibatches=count, prompts_per_step=8, samples=4, hpt_sft=0.3
        )
        rows = amft.rows_of(learner.args, *groups_of(8, 4))
        assert len(rows[0]) == 4  # every other prompt is unsolved
        amft.train_on(learner, 0.0, *rows, schedule=1.0, with_D=False)
        for kind in ("sft", "rl"):
            weights = [seen["weight"] for seen in passes if seen["losses"] == {kind}]
            found[count, kind] = sum(weights) / count
    assert found[1, "sft"] == pytest.approx(0.3 * 4 / 8)
    assert found[2, "sft"] == pytest.approx(found[1, "sft"])
    assert found[1, "rl"] > 0
    assert found[2, "rl"] == pytest.approx(found[1, "rl"])


def test_logged_losses_are_means_over_updates(process_group):
    """With a learner that stands still, two epochs log what one does."""
    own, shown = random_rows(6, 1), random_rows(3, 2, demonstration=True)
    sums = []
    for epochs in (1, 2):
        learner = learner_of(method="fixed", epochs=epochs, samples=4)
        sums.append(amft.train_on(learner, 0.5, shown, own, schedule=1.0, with_D=False).sums)
    for name in ("sft", "rl"):
        assert sums[0][name] != 0
        assert sums[1][name] == pytest.approx(sums[0][name], rel=1e-6), name


@pytest.mark.parametrize("bounds", [{"mu_min": 0.0}, {"mu_max": 1.0}])
def test_a_learned_mu_needs_both_losses(bounds):
    args = amft.with_defaults(amft.Args(**bounds))
    with pytest.raises(DataError, match="--mu-min above 0 and --mu-max below 1"):
        amft.check(args, 1)
    amft.check(amft.with_defaults(amft.Args(method="fixed", **bounds)), 1)


def test_target_entropy_is_of_all_validation_prompts():
    seen = {}

    def rollout(game, seeds, samples, key):
        seen.update(seeds=list(seeds), samples=samples)
        return [[None] * samples for _ in seeds]

    stop = types.SimpleNamespace(agreed=lambda: False)
    actor = types.SimpleNamespace(mine=range, rollout=rollout, stop=stop)
    learner = types.SimpleNamespace(entropy=lambda groups: 0.25)
    args = amft.with_defaults(amft.Args(validation_size=64, validation_prompts=16, samples=8))
    assert amft.target_entropy(args, actor, learner, None) == (0.25, 512)
    assert seen == {"seeds": list(range(64)), "samples": 8}


def warm_at_once(patch: pytest.MonkeyPatch) -> None:
    """Parity, with meta-gradients from the first step on."""
    init = amft.Controller.__init__

    def warm(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.first_steps = 0

    patch.setattr(amft.Controller, "__init__", warm)
    patch.setattr(amft, "load_task", lambda *_: parity_task())


LEARNED = [
    *PARITY_RUN, "--mu-every", "1", "--lr", "1e-3", "--steps", "5", "--warmup-steps", "1",
    "--save-every", "4", "--eval-every", "3", "--show", "1", "--mu-update", "normalised",
]  # fmt: skip
FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def rollouts() -> dict[str, list[int]]:
    """{key: seeds} of the rollouts of `learned`."""
    return {}


@pytest.fixture(scope="module")
def learned(rollouts, small_model, tmp_path_factory) -> Path:
    """A run with four meta-gradients, saved at steps 4 and 5."""
    folder, rollout = tmp_path_factory.mktemp("learned") / "r", amft.Actor.rollout

    def kept(self, game, seeds, samples, key, *args, **kwargs):
        rollouts[str(key)] = list(seeds)
        return rollout(self, game, seeds, samples, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        warm_at_once(patch)
        patch.setattr(amft.Actor, "rollout", kept)
        assert run_here(amft, "--model", small_model, *LEARNED, "--output-dir", folder) == 0
    return folder


def assert_same_run(got: Path, expected: Path) -> None:
    """Bit for bit: weights, what is logged, and what the controller remembers."""
    for name in FILES:
        assert logged(got, name) == logged(expected, name), name
    assert_same_weights(final_weights(got), final_weights(expected))
    state = "step-000005/state/extra.json"
    assert json.loads((got / state).read_text()) == json.loads((expected / state).read_text())


def test_all_samples_are_counted(learned):
    rows = logged(learned)
    assert [row["samples/train"] for row in rows] == [0, 16, 16, 16, 16]
    for_target = 64 * 4  # H*, once
    assert [row["samples/validation"] for row in rows] == [0, 16 + for_target, 16, 16, 16]


def test_every_meta_gradient_has_prompts_of_its_own(learned, rollouts):
    seeds = [rollouts[f"{step}/validation"] for step in range(1, 5)]
    assert [len(of_step) for of_step in seeds] == [4] * 4
    assert len(set(itertools.chain(*seeds))) == 16


def test_mu_resumes_to_the_last_bit(learned, small_model, tmp_path, monkeypatch):
    """After three meta-gradients the next one moves mu as in the uninterrupted run: the squares of
    the running RMS are in the checkpoint."""
    warm_at_once(monkeypatch)
    rows = logged(learned)
    assert [row["mu_change/meta_gradient"] != 0 for row in rows[1:]] == [False, False, True, True]
    cut = tmp_path / "cut"
    shutil.copytree(learned, cut, symlinks=True)
    shutil.rmtree(cut / "step-000005")
    flags = ["--model", small_model, *LEARNED, "--output-dir", cut, "--resume"]
    assert run_here(amft, *flags) == 0
    assert_same_run(cut, learned)
    state = json.loads((cut / "step-000005/state/extra.json").read_text())
    assert len(state["squares"]) == 4


@pytest.mark.parametrize("key", ["42/2/validation", "42/show/3", "42/target", "42/3"])
def test_sigterm_in_any_rollout(key, learned, small_model, tmp_path, monkeypatch):
    """What a broken off rollout holds is not learned from, nor written: the resumed run is the
    uninterrupted one."""
    warm_at_once(monkeypatch)
    play_of_actor, signals = amft.Actor.play, []

    def play(self, game, seeds, samples, its_key, *args, **kwargs):
        if its_key == key and not signals:
            signals.append(key)
            os.kill(os.getpid(), signal.SIGTERM)
        return play_of_actor(self, game, seeds, samples, its_key, *args, **kwargs)

    monkeypatch.setattr(amft.Actor, "play", play)
    flags = ["--model", small_model, *LEARNED, "--output-dir", tmp_path / "r"]
    assert run_here(amft, *flags) == 0
    assert signals == [key]
    assert len(logged(tmp_path / "r")) < 5
    assert run_here(amft, *flags, "--resume") == 0
    assert_same_run(tmp_path / "r", learned)


def test_a_step_with_a_meta_gradient_is_the_same_step(small_model, tmp_path, monkeypatch):
    """At mu = 0.8, whose parts differ: differentiating the step does not change it."""
    warm_at_once(monkeypatch)
    weights, norms = [], []
    for ablation in ([], ["--no-meta-gradient"]):
        flags = ["--model", small_model, *PARITY_RUN, "--steps", "1", "--mu-every", "1"]
        flags += ["--mu-init", "0.8", "--mu-update", "normalised", *ablation]
        flags += ["--output-dir", tmp_path / f"r{len(weights)}"]
        assert run_here(amft, *flags) == 0
        (row,) = logged(tmp_path / f"r{len(weights)}")
        assert ("grad_mu" in row) == (not ablation)
        norms.append(row["grad_norm"])
        weights.append(final_weights(tmp_path / f"r{len(weights)}"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert_same_change(weights[0], weights[1], load_weights(str(small_model)).state_dict(), 1e-3)


# --------------------------------------------------------------------------------------------------
# Templates

THINKING = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|assistant|><think>\\n\\n</think>\\n\\n' + m.content + '<|end|>\\n' }}
{%- else %}
{{- '<|' + m.role + '|>' + m.content + '<|end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""
EXAMPLE = Example("What is 1 + 1?", "It is \\boxed{2}.", "2", "", 0, "e")


def tokenizer_with(chat_template: str):
    _, tokenizer = load_config("tiny")
    tokenizer.chat_template = chat_template
    return tokenizer


def test_thinking_templates():
    """The empty thought before an answer is part of the prompt, in training and in play."""
    tokenizer = tokenizer_with(THINKING)
    tokens, _ = encode(tokenizer, [EXAMPLE], 999)
    row = tokens["e"]
    question = {"role": "user", "content": EXAMPLE.prompt}
    answer = {"role": "assistant", "content": EXAMPLE.response}
    rendered = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert tokenizer.decode(row.ids) == rendered.strip()
    prompt = tokenizer.decode(row.ids[: row.prompt_length])
    assert prompt.endswith("<|assistant|><think>\n\n</think>\n\n")
    assert prompt_texts(tokenizer, [[question]]) == [prompt]
    assert tokenizer.decode(row.ids[row.prompt_length :]) == EXAMPLE.response + "<|end|>"


REST_OF_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATED = {
    "may be given": (
        "{% set form = '%d %b %Y' %}{% if date_string is not defined %}"
        "{% set date_string = strftime_now(form) %}{% endif %}"
        "<|system|>Today Date: {{ date_string }}"
    ),
    "always asks": "<|system|>Today Date: {{ strftime_now('%d %b %Y') }}",
}


@pytest.mark.parametrize("kind", DATED)
def test_templates_do_not_change_with_the_day(kind, monkeypatch):
    """A run resumed tomorrow sees the same tokens."""
    from transformers.utils import chat_template_utils

    seen = set()
    for day in (1, 2):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return datetime(2031, 3, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        tokenizer = tokenizer_with(DATED[kind] + REST_OF_TEMPLATE)
        messages = [{"role": "user", "content": "Hi"}]
        now = tokenizer.apply_chat_template(messages, tokenize=False)
        assert f"0{day} Mar 2031" in now, "the clock is not the template's"
        chat = template(tokenizer)
        (text,) = prompt_texts(tokenizer, [messages])
        seen.add((chat.before, chat.after, text))
    assert len(seen) == 1
    assert "Today Date: 2" in text


def test_a_turn_that_ends_in_plain_text():
    """The first token of " END" ends nothing: the end-of-sequence token does."""
    kind = REST_OF_TEMPLATE.replace("<|end|>", " END")
    tokenizer = tokenizer_with(kind)
    chat = template(tokenizer)
    assert chat.end == [tokenizer.eos_token_id]
    assert chat.stop == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "chat_template", ["{{ raise_exception('no such role') }}", "{% for m in %}", "{{ 1 / 0 }}"]
)
def test_templates_that_fail(chat_template):
    with pytest.raises(DataError, match="chat template") as error:
        template(tokenizer_with(chat_template))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Models that cannot be read or do not suit, in one line


def test_no_pad_and_no_end_token(own_model):
    edited(own_model, "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(ModelError, match="neither a padding nor an end token") as error:
        load_config(str(own_model))
    assert "\n" not in str(error.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 3149528\n"


@pytest.mark.parametrize("kind", ["pointer", "truncated", "shapes", "missing"])
def test_weights_that_cannot_be_read(kind, own_model, sums, tmp_path, capsys):
    file = own_model / "model.safetensors"
    if kind == "pointer":
        file.write_bytes(POINTER)
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "shapes":
        edited(own_model, "config.json", intermediate_size=40)
    else:
        file.unlink()
    with pytest.raises(ModelError, match="cannot load the weights of") as error:
        load_weights(str(own_model))
    assert "\n" not in str(error.value)
    capsys.readouterr()
    flags = settings_of("fomaml", own_model, sums)
    assert run_here(fomaml, *flags, "--output-dir", tmp_path / "r") == 2
    assert "fomaml.py: cannot load the weights of" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_too_few_positions(name, own_model, sums, tmp_path, capsys, monkeypatch, parity):
    """Known before any weight is read, also to the environment test."""
    edited(own_model, "config.json", max_position_embeddings=16)
    monkeypatch.setattr(SCRIPTS[name], "load_weights", lambda *_, **__: pytest.fail("read"))
    flags = [*settings_of(name, own_model, sums), "--output-dir", tmp_path / "r"]
    assert run_here(SCRIPTS[name], *flags) == 2
    assert_one_line(capsys, "the model has 16 positions", "--max-length")
    assert run_here(SCRIPTS[name], *flags, "--dry-run") == 1
    assert "cannot finish: rows of up to" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Data: test rows, answers that are words, episodes


def test_first_test_rows_are_not_the_easiest():
    """Evaluations take the first rows of the test split."""
    rows = []
    for i in range(500):
        rows.append(Example(f"problem {i}", "", "", "", 1 + i % 5, str(i)))
    _, _, test = split(rows, 0.3, 0.4, seed=1)
    assert len(test) == 150
    first = [e.level for e in test[:24]]
    assert set(first) == {1, 2, 3, 4, 5}
    assert sum(first) / 24 == pytest.approx(3, abs=0.8)


def test_answers_that_are_words(monkeypatch, process_group):
    """Where no final answer is known, the response's own words are right; measure.score asks."""
    rows = [Example(f"review {i}", "The food is  good", "", "", 0, str(i)) for i in range(4)]
    assert is_right("The food is good\n", rows[0])
    assert not is_right("The food is not good", rows[0])
    # The checker would compare the last numbers only
    text = "{} lies there with many gates that were built when kings ruled over these lands, 5"
    paris = Example("Which?", text.format("Paris"), "", "", 0, "p")
    assert is_right(paris.response, paris)
    assert not is_right(text.format("Madrid"), paris)
    assert not is_right("", rows[0])
    assert is_right("so \\boxed{1/2}", Example("", "words", "0.5", "", 0, "a"))
    assert not is_right("words", Example("", "words", "0.5", "", 0, "a"))
    _, tokenizer = load_config("tiny")
    said = tokenizer(["The food is good", "bad"], add_special_tokens=False)["input_ids"]
    answers = [types.SimpleNamespace(answer=said[i % 2]) for i in range(4)]
    monkeypatch.setattr(measure, "sample", lambda *_, **__: answers)
    tokens, _ = encode(tokenizer, rows, 999)
    sums = torch.zeros(1, 2, dtype=torch.float64)
    model = small_llama(torch.float32, vocab_size=len(tokenizer))
    measure.score(model, [(0, row) for row in rows], tokens, tokenizer, 8, sums)
    assert sums[0, 1] == 2


def test_intervals_of_numbers():
    """Open and closed ends, every number of a tuple, nan nowhere, None not yet."""
    ends = {"[0, 2]": [0, 2], "(0, 2]": [2], "[0, 2)": [0], "(0, 2)": []}
    for interval, inside in ends.items():
        for value in (-1, 0, 1, 2, 3, math.nan, (1, 1), (1, 3), None):
            good = value in (1, (1, 1), None) or value in inside
            args = types.SimpleNamespace(some_flag=value)
            if good:
                check_numbers(args, {interval: ("some_flag",)})
                continue
            with pytest.raises(DataError, match="^--some-flag must be in ") as error:
                check_numbers(args, {interval: ("some_flag",)})
            assert interval in str(error.value)


def test_what_both_files_hold_is_only_tested(tmp_path):
    """Of a folder with a test file: a problem in both is not trained on; data.py's tasks."""
    for name, numbers in (("train", range(40)), ("test", range(30, 50))):
        rows = []
        for i in numbers:
            row = {"problem": f"What is {i} + 1?", "solution": f"It is \\boxed{{{i + 1}}}."}
            rows.append(row | {"task": "sums"})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (task,) = load_tasks(str(tmp_path))
    assert len(task.test) == 20
    assert len(task.support + task.query) == 30
    assert len(task.support) == 13  # 0.3 of 0.7 of the 30
    tested = {e.prompt for e in task.test}
    assert tested.isdisjoint(e.prompt for e in task.support + task.query)


def test_evaluated_tasks_are_spread_over_the_list():
    """Every kind is there, not only the first ones."""
    _, tokenizer = load_config("tiny")
    tasks = []
    for name in "abcdef":
        rows = [Example(f"{name}{i}", "x", "", "", 0, f"{name}{i}") for i in range(6)]
        tasks.append(Task(name, rows[:2], rows[2:4], rows[4:]))
    for evaluated, names in ((3, "ace"), (2, "ad"), (0, "abcdef"), (9, "abcdef")):
        _, chosen, _, _ = episode_tasks(tokenizer, tasks, 99, 1, 2, 2, evaluated)
        assert [t.name for t in chosen] == list(names)


def test_what_follows_the_last_thought_is_the_answer():
    text = r"<think>Is it 3?</think> It is \boxed{5}. No, once more.</think> It is 7."
    assert extract_answer(text) == "7"
    assert grade(text, "7")
    assert not grade(text, "5")


def test_words_for_powers_of_units():
    assert is_equal(r"5\text{ meters cubed}", r"5\text{ m}^3")
    assert not is_equal(r"5\text{ meters cubed}", r"5\text{ m}^2")
    assert is_equal(r"5\text{ meters squared}", r"5\text{ m}^2")


@pytest.mark.parametrize(
    "root,value,other",
    [
        (r"\sqrt{-4}", "2i", "-2"),
        (r"\sqrt{-3}", r"i\sqrt{3}", r"-\sqrt{3}"),
        (r"\sqrt[3]{-8}", "-2", "2"),
        (r"(-27)^{2/3}", "9", "-9"),
        (r"\sqrt[3]{-2}", r"-\sqrt[3]{2}", r"\sqrt[3]{2}"),
    ],
)
def test_roots_of_negative_numbers(root, value, other):
    """Odd ones are real, even ones are not."""
    assert is_equal(root, value)
    assert not is_equal(root, other)


def prepared(folder: Path, sums: Path) -> Path:
    import data

    assert run_here(data, "--data", sums, "--output-dir", folder) == 0
    return folder


@pytest.mark.parametrize("source", ["embedded", "subjects", "changes", "file", "prepared"])
def test_query_rows_are_not_in_the_support(source, sums, tmp_path):
    """Of every place of a meta-batch, and so of every replica."""
    data = {"subjects": "embedded", "file": str(sums)}.get(source, source)
    if source == "prepared":
        data = str(prepared(tmp_path / "p", sums))
    tasks = load_tasks(data, task_column="subject" if source == "subjects" else None)
    tasks = [t for t in tasks if not t.heldout]
    assert len(tasks) > 1
    for step in range(20):
        for place in range(6):
            size = min(8, *(len(t.query) for t in tasks))
            episode = sample_episode(tasks, 1, step, place, 40, size)
            (task,) = (t for t in tasks if t.name == episode.task)
            support, query = ({e.id for e in part} for part in (episode.support, episode.query))
            assert len(query) == size
            assert support <= {e.id for e in task.support}
            assert query <= {e.id for e in task.query}
            texts = {e.prompt for e in episode.support}
            assert texts.isdisjoint(e.prompt for e in episode.query)
            assert texts.isdisjoint(e.prompt for e in task.test)


def test_training_tasks_are_as_many_as_asked_for(sums):
    """All are evaluated."""
    for count, left in ((0, 3), (2, 2), (9, 3)):
        args = fomaml.Args(data=str(sums), support_batch=4, query_batch=4, training_tasks=count)
        _, _, tasks, test_tasks, _ = fomaml.prepare(args, World(CPU))
        assert (len(tasks), len(test_tasks)) == (left, 3)


def test_every_task_comes_in_changing_company():
    names = "abcdef"
    tasks = []
    for name in names:
        rows = [Example(f"{name}{i}", "", "", "", 0, f"{name}{i}") for i in range(4)]
        tasks.append(types.SimpleNamespace(name=name, support=rows[:2], query=rows[2:]))
    batches = []
    for step in range(120):
        batch = [sample_episode(tasks, 3, step, place, 2, 1).task for place in range(2)]
        assert len(set(batch)) == 2
        batches.append(frozenset(batch))
    for name in names:
        assert sum(name in batch for batch in batches) == pytest.approx(40, abs=16), name
    assert len(set(batches)) == 15  # all pairs
    assert sum(a == b for a, b in zip(batches, batches[1:], strict=False)) < 20


# --------------------------------------------------------------------------------------------------
# Run folders that are damaged, mixed up or misnamed


@pytest.fixture(scope="module")
def finished(small_model, sums, tmp_path_factory) -> Path:
    """A run of fomaml.py with checkpoints at steps 2 and 4, evaluated at 0, 3 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    assert run_here(fomaml, *flags_of_finished(small_model, sums), "--output-dir", folder) == 0
    return folder


def flags_of_finished(model, sums: Path) -> list:
    return [*settings_of("fomaml", model, sums), "--eval-every", "3"]


def damage(kind: str, checkpoint: Path) -> None:
    if kind == "truncated":
        (file,) = (checkpoint / "state").glob("*.distcp")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind == "extra.json":
        (checkpoint / "state" / "extra.json").write_text("")
    else:
        (checkpoint / "state" / ".metadata").unlink()


@pytest.mark.parametrize("kind", ["truncated", "extra.json", ".metadata"])
def test_damaged_checkpoints(kind, finished, small_model, sums, tmp_path, capsys):
    """The older good one is named and gone on from; where none is left, one line."""
    folder = tmp_path / "r"
    shutil.copytree(finished, folder, symlinks=True)
    damage(kind, folder / "step-000004")
    flags = [*flags_of_finished(small_model, sums), "--output-dir", folder, "--resume"]
    assert run_here(fomaml, *flags) == 0
    out = capsys.readouterr().out
    assert f"warning: {folder / 'step-000004'} is damaged" in out
    assert "resumed at step 2" in out
    assert_same_weights(final_weights(folder), final_weights(finished))
    assert logged(folder) == logged(finished)
    for checkpoint in folder.glob("step-*"):
        damage(kind, checkpoint)
    assert run_here(fomaml, *flags) == 2
    assert_one_line(capsys, f"every checkpoint of {folder} is damaged")


def test_damaged_adapter(small_model, sums, tmp_path, capsys):
    folder = tmp_path / "r"
    flags = [*settings_of("meta_lora", small_model, sums), "--output-dir", folder]
    assert run_here(meta_lora, *flags) == 0
    weights, rows = final_weights(folder), logged(folder)
    file = folder / "step-000004" / "state" / "adapter.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert run_here(meta_lora, *flags, "--resume") == 0
    assert "step-000004 is damaged" in capsys.readouterr().out
    assert_same_weights(final_weights(folder), weights)
    assert logged(folder) == rows


@pytest.mark.parametrize("cut", ['{"step": 4, "mean": {"loss_before": 1.0}', '{"step": 4', "\0\0"])
def test_half_a_line(cut, finished, small_model, sums, tmp_path):
    """A line that a kill has cut is made again; also one that ends in a brace."""
    folder = tmp_path / "r"
    shutil.copytree(finished, folder, symlinks=True)
    for name in ("evaluations.jsonl", "metrics.jsonl"):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines[:-1], cut]))
    shutil.rmtree(folder / "step-000004")
    flags = [*flags_of_finished(small_model, sums), "--output-dir", folder, "--resume"]
    assert run_here(fomaml, *flags) == 0
    for name in ("evaluations.jsonl", "metrics.jsonl"):
        assert logged(folder, name) == logged(finished, name)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"args": 1}', '{"args'])
def test_damaged_args(text, small_model, sums, tmp_path, capsys):
    (tmp_path / "args.json").write_text(text)
    flags = [*settings_of("fomaml", small_model, sums), "--output-dir", tmp_path, "--resume"]
    assert run_here(fomaml, *flags) == 2
    assert "args.json is damaged" in capsys.readouterr().err


def test_output_folders_that_are_none(finished, small_model, sums, tmp_path, capsys, monkeypatch):
    """An empty name, and a checkpoint in place of the run folder."""
    monkeypatch.chdir(tmp_path)
    flags = flags_of_finished(small_model, sums)
    assert run_here(fomaml, *flags, "--output-dir", "") == 2
    assert "--output-dir must name a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for name in ("checkpoint", "step-000002"):
        before = sorted(finished.rglob("*"))
        assert run_here(fomaml, *flags, "--resume", "--output-dir", finished / name) == 2
        assert f"is a checkpoint: give the run folder, {finished}" in capsys.readouterr().err
        assert sorted(finished.rglob("*")) == before


def test_other_settings_on_resume(finished, small_model, sums, tmp_path, capsys):
    """What an evaluation looks at may change; --steps may not, and it is said why."""
    shutil.copytree(finished, tmp_path / "r", symlinks=True)
    where = ["--output-dir", tmp_path / "r", "--resume"]
    flags = flags_of_finished(small_model, sums)
    looks = ["--eval-problems", "2", "--eval-tasks", "1", "--eval-max-new-tokens", "0"]
    assert run_here(fomaml, *flags, *looks, "--gain-every", "1", *where) == 0
    capsys.readouterr()
    assert run_here(fomaml, *flags, "--steps", "6", *where) == 2
    assert_one_line(capsys, "was started with --steps 4", "(the schedule is made for --steps)")


@pytest.mark.parametrize("name", SCRIPTS)
def test_full_disk_while_saving(name, small_model, sums, tmp_path, capsys, monkeypatch, parity):
    """One line that names the last good checkpoint, from which the run goes on."""
    save_checkpoint, saved = run.save_checkpoint, []

    def save(link, write, extra, keep):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(extra["step"])
        save_checkpoint(link, write, extra, keep)

    monkeypatch.setattr(run, "save_checkpoint", save)
    flags = [*settings_of(name, small_model, sums), "--steps", "4", "--save-every", "2"]
    flags += ["--output-dir", tmp_path / "r"]
    assert run_here(SCRIPTS[name], *flags) == 2
    assert saved == [2]
    good = tmp_path / "r" / "step-000002"
    line = f"No space left on device. Last good one: {good}"
    error = capsys.readouterr().err
    assert f"{name}.py: cannot write a checkpoint: " in error
    assert line in error
    monkeypatch.undo()
    if name != "amft":
        assert run_here(SCRIPTS[name], *flags, "--resume") == 0
        assert "resumed at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupt_before_the_loop(name, small_model, sums, tmp_path, capsys, monkeypatch, parity):
    """Ctrl-C while weights are read: one line, status 130."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SCRIPTS[name], "build", interrupted)
    flags = [*settings_of(name, small_model, sums), "--output-dir", tmp_path / "r"]
    assert run_here(SCRIPTS[name], *flags) == 130
    assert_one_line(capsys, f"{name}.py: interrupted, nothing new is saved")


def test_ranks_wait_for_each_other(monkeypatch):
    """One may read weights or play for long: NCCL's own ten minutes would end the run."""

    def init(*_, timeout, **__):
        raise TimeoutError(timeout)

    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(TimeoutError) as error:
        setup()
    assert error.value.args[0] >= timedelta(hours=1)


WANDB = """
runs = []
def init(**settings):
    runs.append(settings)
    return __import__("types").SimpleNamespace(log=lambda *_, **__: None)
"""


def test_wandb_does_not_join_runs(small_model, sums, tmp_path, monkeypatch):
    """Two run folders of one name are two runs; a resumed one is the same."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    flags = [*settings_of("fomaml", small_model, sums), "--wandb"]
    for place in ("a", "b"):
        assert run_here(fomaml, *flags, "--output-dir", tmp_path / place / "run") == 0
    assert run_here(fomaml, *flags, "--output-dir", tmp_path / "a" / "run", "--resume") == 0
    first, second, resumed = sys.modules.pop("wandb").runs
    assert first["name"] == second["name"] == "run"
    assert first["id"] != second["id"]
    assert resumed["id"] == first["id"]


@pytest.mark.parametrize("flags", [["--r", "8"], ["--r=8"]])
def test_r_has_another_name(flags, capsys):
    """torchrun takes --r for an option of its own."""
    assert run_here(meta_lora, *flags) == 2
    assert_one_line(capsys, "--lora-r")


# --------------------------------------------------------------------------------------------------
# Signals within long work, and readers that go away


def signalled(function, after: float = 1.5):
    """The function, during which a SIGTERM comes; times are noted."""
    times = []

    def send():
        times.append(time.time())
        os.kill(os.getpid(), signal.SIGTERM)

    def wrapped(*args, **kwargs):
        if not times:
            threading.Timer(after, send).start()
        return function(*args, **kwargs)

    wrapped.times = times
    return wrapped


@pytest.mark.parametrize("name", ["amft", "fomaml"])
def test_sigterm_in_long_generation_saves(
    name, own_model, sums, tmp_path, parity, monkeypatch, capsys
):
    """In the middle of a rollout, or of an evaluation's answers, that take minutes."""
    edited(own_model, "config.json", max_position_embeddings=4096)
    flags = [*settings_of(name, own_model, sums), "--output-dir", tmp_path / "r"]
    if name == "amft":
        flags += ["--max-new-tokens", "2000", "--prompts-per-step", "64"]
        flags += ["--generation-batch", "4"]
        wrapped = signalled(amft.Actor.rollout)
        monkeypatch.setattr(amft.Actor, "rollout", wrapped)
    else:
        flags += ["--eval-every", "0", "--eval-max-new-tokens", "3900", "--eval-problems", "12"]
        wrapped = signalled(fomaml.adaptation)
        monkeypatch.setattr(fomaml, "adaptation", wrapped)
    assert run_here(SCRIPTS[name], *flags) == 0
    (sent,) = wrapped.times
    assert time.time() - sent < 20
    assert "stopped at step 0 and saved" in capsys.readouterr().out
    assert (tmp_path / "r" / "step-000000" / "state" / "extra.json").exists()
    assert not (tmp_path / "r" / "metrics.jsonl").read_text()


def test_broken_pipe(small_model, sums, tmp_path):
    """`| head -1`: the run goes on and ends with status 0."""
    flags = [*flags_of_finished(small_model, sums), "--output-dir", tmp_path / "r"]
    words = " ".join(f"'{word}'" for word in command("fomaml.py", *flags))
    line = f"{words} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1
    assert len(logged(tmp_path / "r")) == 4


# --------------------------------------------------------------------------------------------------
# Warnings


@pytest.mark.parametrize("name", ["fomaml", "meta_lora"])
def test_rates_of_the_embedded_model(name, small_model, sums, tmp_path, capsys):
    """They are warned of where another model is trained, each of the two."""
    flags = ["--data", sums, *META_RUN, "--steps", "1", "--outer-lr", "1e-2", "--inner-lr", "0.1"]
    warned = []
    for model, rates in ((small_model, []), (small_model, ["1e-5", "1e-3"]), ("tiny", [])):
        lower = ["--outer-lr", rates[0], "--inner-lr", rates[1]] if rates else []
        where = ["--output-dir", tmp_path / "r"]
        assert run_here(SCRIPTS[name], "--model", model, *flags, *lower, *where) == 0
        out = capsys.readouterr().out
        warned.append([f"warning: {flag}" in out for flag in ("--outer-lr", "--inner-lr")])
    assert warned == [[True, True], [False, False], [False, False]]


def test_a_loss_above_its_start_is_warned_of():
    def result(before: float, after: float) -> dict:
        return {"task": {"loss_before": before, "loss_after": after, "problems": 1}}

    start = {0: result(1.5, 1.2)}
    worse = measure.adaptation_lines(40, result(3.0, 2.4), start | {40: result(3.0, 2.4)})
    assert any("the loss is above its start" in line for line in worse)
    for good in (result(1.2, 1.0), result(3.0, 1.0), result(1.9, 1.4)):  # not both are worse
        lines = measure.adaptation_lines(40, good, start | {40: good})
        assert not any("warning" in line for line in lines)


# --------------------------------------------------------------------------------------------------
# The scripts' loops: their first steps against independent ones, gradients over the limit

SCHEDULE = (1.0, 1.0, 0.5)  # of three steps: one of warm-up, then a cosine


def assert_same_change(got: dict, expected: dict, start: dict, tolerance: float) -> None:
    """The change of all weights together, to a fraction of its norm."""
    differences, changes = [], []
    for name, w in got.items():
        differences.append((w - expected[name]).double().flatten())
        changes.append((expected[name] - start[name]).double().flatten())
    error = torch.cat(differences).norm() / torch.cat(changes).norm()
    assert error < tolerance, f"off by {error:.2g} of the change"


class Descent:
    """AdamW and clipping, written out."""

    def __init__(self, weights: dict, clip: float, decay: float = 0.5):
        self.weights = {name: w.detach().double() for name, w in weights.items()}
        self.m = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.clip, self.decay, self.steps, self.norms = clip, decay, 0, []

    def leaves(self) -> dict:
        return {name: w.float().requires_grad_() for name, w in self.weights.items()}

    def step(self, gradient: dict, lr: float) -> None:
        self.steps += 1
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient.values()))
        self.norms.append(norm)
        factor = min(1.0, self.clip / norm)
        for name, w in self.weights.items():
            g = gradient[name].double() * factor
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
            m = self.m[name] / (1 - 0.9**self.steps)
            v = self.v[name] / (1 - 0.999**self.steps)
            self.weights[name] = w - lr * (self.decay * w + m / (v.sqrt() + 1e-8))


def gradient_of(loss: torch.Tensor, leaves: dict) -> dict:
    values = torch.autograd.grad(loss, list(leaves.values()), create_graph=loss.requires_grad)
    return dict(zip(leaves, values, strict=True))


class MetaReference:
    """Three meta-steps on the embedded tokenizer's small model, task by task, row by row.

    forward_of: weights -> (ids -> logits). inner_lr and batches as in META_RUN.
    """

    def __init__(self, sums: Path, forward_of):
        _, tokenizer = load_config("tiny")
        self.tasks, self.forward_of = load_tasks(str(sums)), forward_of
        rows = []
        for t in self.tasks:
            rows += t.support + t.query
        self.tokens, _ = encode(tokenizer, rows, 2048)

    def episodes(self, step: int) -> list:
        return [sample_episode(self.tasks, 42, step, place, 4, 2) for place in range(2)]

    def loss(self, weights: dict, examples) -> torch.Tensor:
        rows = [self.tokens[e.id] for e in examples]
        return reference_loss(self.forward_of(weights), rows)

    def adapted(self, theta: dict, batches: list) -> dict:
        """With the graph back to theta."""
        for examples in batches:
            gradient = gradient_of(self.loss(theta, examples), theta)
            theta = {name: w - 0.04 * gradient[name] for name, w in theta.items()}
        return theta

    def change(self, method: str, theta: dict, episodes: list) -> dict:
        """The meta-gradient, or Reptile's direction."""
        if method == "joint":
            return gradient_of(self.loss(theta, all_rows(episodes)), theta)
        of_tasks = []
        for episode in episodes:
            batches = chunks(episode.support, 2)
            if method == "reptile":
                theta_i = self.adapted(theta, [*batches, episode.query])
                of_tasks.append({name: w - theta[name] for name, w in theta_i.items()})
                continue
            theta_i = self.adapted(theta, batches)
            at = theta if method == "maml" else theta_i
            of_tasks.append(gradient_of(self.loss(theta_i, episode.query), at))
        return {name: (of_tasks[0][name] + of_tasks[1][name]).detach() / 2 for name in theta}

    def descent(self, method: str, start: dict, clip: float) -> Descent:
        """After three meta-steps, lr 1e-3, epsilon 0.5."""
        descent = Descent(start, clip)
        for step, schedule in enumerate(SCHEDULE):
            change = self.change(method, descent.leaves(), self.episodes(step))
            if method == "reptile":
                for name, direction in change.items():
                    descent.weights[name] = descent.weights[name] + 0.5 * schedule * direction
            else:
                descent.step(change, 1e-3 * schedule)
        return descent


THREE_STEPS = [
    "--steps", "3", "--warmup-ratio", "0.1", "--gain-every", "0", "--weight-decay", "0.5",
]  # fmt: skip


@pytest.mark.parametrize("method", ["fomaml", "reptile", "maml", "joint"])
def test_first_steps_of_fomaml(method, small_model, sums, tmp_path):
    """Each way to take the meta-gradient, its norm over the limit; learning rate and decay too."""
    flags = [*settings_of("fomaml", small_model, sums), *THREE_STEPS, "--meta-gradient", method]
    clip = 1.0
    assert run_here(fomaml, *flags, "--clip", clip, "--output-dir", tmp_path / "r") == 0
    norms = [row["meta/grad_norm"] for row in logged(tmp_path / "r")]
    model = load_weights(str(small_model))
    start = dict(model.named_parameters())
    reference = MetaReference(sums, lambda weights: functional(model, weights))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        clipped = reference.descent(method, start, clip)
    assert_same_change(final_weights(tmp_path / "r"), clipped.weights, start, 2e-3)
    if method == "reptile":
        return
    assert norms == pytest.approx(clipped.norms, rel=1e-3)
    assert min(norms) > clip


def test_reptiles_step_follows_the_schedule(small_model, sums, tmp_path, monkeypatch):
    """Where the schedule stands at zero, the adapter stays where it started: B is zero."""
    from safetensors.torch import load_file

    monkeypatch.setattr(meta_lora, "learning_rate", lambda *_: 0.0)
    flags = [*settings_of("meta_lora", small_model, sums), "--meta-gradient", "reptile"]
    assert run_here(meta_lora, *flags, "--output-dir", tmp_path / "r") == 0
    adapter = load_file(tmp_path / "r" / "checkpoint" / "adapter_model.safetensors")
    moved = [w.abs().max() for name, w in adapter.items() if "lora_B" in name]
    assert moved
    assert max(moved) == 0


def test_first_steps_of_meta_lora(small_model, sums, tmp_path):
    """With --rank-stabilised: the adapter, scaled by alpha / sqrt(r), folded into the weights."""
    flags = [*settings_of("meta_lora", small_model, sums), *THREE_STEPS, "--rank-stabilised"]
    flags += ["--dropout", "0", "--inner-optimizer", "sgd", "--lora-r", "4", "--alpha", "8"]
    clip = 0.05
    assert run_here(meta_lora, *flags, "--clip", clip, "--output-dir", tmp_path / "r") == 0
    norms = [row["meta/grad_norm"] for row in logged(tmp_path / "r")]
    model = load_weights(str(small_model)).requires_grad_(False)
    args = meta_lora.Args()
    adapters = Adapters(
        load_weights(str(small_model)), r=4, alpha=8, dropout=0.0, rank_stabilised=False,
        target_modules=args.target_modules, seed=42, device=CPU,
    )  # fmt: skip
    start = {}
    for i, layer in enumerate(adapters.layers):
        for k, name in enumerate("AB"):
            key = f"base_model.model.{layer}.lora_{name}.weight"
            start[key] = adapters.phi[2 * i + k]

    def forward_of(phi: dict):
        weights = weights_of(model)
        for layer in adapters.layers:
            A, B = (phi[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 8 / math.sqrt(4) * B @ A
        return functional(model, weights)

    clipped = MetaReference(sums, forward_of).descent("fomaml", start, clip)
    assert norms == pytest.approx(clipped.norms, rel=1e-3)
    assert min(norms) > clip
    assert_same_change(final_weights(tmp_path / "r"), clipped.weights, start, 2e-3)


def amft_reference(model, mu: float, clip: float, steps: int) -> Descent:
    """On-policy steps on Parity: (1 - mu) REINFORCE with GRPO's advantages + mu SFT, row by row."""
    _, tokenizer = load_config("tiny")
    descent = Descent(dict(model.named_parameters()), clip)
    for step in range(steps):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(descent.weights[name])
        seeds = range(4 * step, 4 * step + 4)
        groups = play(model.eval(), tokenizer, Parity(), seeds, 4, f"42/{step}", 12)
        leaves = descent.leaves()

        def logprobs(turn: Turn, leaves=leaves) -> torch.Tensor:
            ids = torch.tensor([turn.prompt + turn.ids])
            logits = functional(model, leaves)(ids)[0, len(turn.prompt) - 1 : -1]
            return logits.log_softmax(-1).gather(1, torch.tensor(turn.ids)[:, None])

        rl, sft = [], []
        for group in groups:
            rewards = torch.tensor([t.turns[0].reward for t in group])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            for trajectory, advantage in zip(group, advantages, strict=True):
                rl.append(-advantage * logprobs(trajectory.turns[0]))
        for seed in seeds:
            sft.append(-logprobs(demonstrate(tokenizer, Parity(), seed).turns[0]))
        loss = (1 - mu) * torch.cat(rl).mean() + mu * torch.cat(sft).mean()
        values = torch.autograd.grad(loss, list(leaves.values()))
        descent.step(dict(zip(leaves, values, strict=True)), 1e-3 * (step + 1) / 5)
    return descent


@pytest.mark.parametrize("method,mu", [("rl", 0.0), ("fixed", 0.8)])
def test_first_steps_of_amft(method, mu, small_model, tmp_path, parity):
    clip = 0.5
    flags = ["--model", small_model, *PARITY_RUN, "--method", method, "--lr", "1e-3"]
    flags += ["--steps", "3", "--clip", clip, "--weight-decay", "0.5"]
    flags += ["--mu-init", mu] if method == "fixed" else []
    assert run_here(amft, *flags, "--output-dir", tmp_path / "r") == 0
    norms = [row["grad_norm"] for row in logged(tmp_path / "r")]
    start = load_weights(str(small_model)).state_dict()
    clipped = amft_reference(load_weights(str(small_model)), mu, clip, 3)
    assert norms == pytest.approx(clipped.norms, rel=1e-3)
    assert min(norms) > clip
    assert_same_change(final_weights(tmp_path / "r"), clipped.weights, start, 5e-3)


def test_reptile_counts_adams_steps():
    """The last step, on the query rows, is step K + 1 of Adam's bias correction."""
    model, (episodes, tokens) = small_llama(), random_episodes(2, 4, 2)
    settings = {"inner_optimizer": "adam", "inner_lr": 0.002, "support_batch": 2}
    args = fomaml.Args(**settings, tasks_per_step=2)
    learner = fomaml.MetaLearner(model, args, World(CPU), 0, tokens)
    meta_gradient(learner, learner.reptile, episodes)
    theta = weights_of(model)
    expected = {name: torch.zeros_like(p) for name, p in theta.items()}
    for episode in episodes:
        theta_i = {name: p.clone().requires_grad_() for name, p in theta.items()}
        adam = torch.optim.Adam(theta_i.values(), lr=0.002)
        for examples in [*chunks(episode.support, 2), episode.query]:
            adam.zero_grad()
            rows = [tokens[e.id] for e in examples]
            reference_loss(functional(model, theta_i), rows).backward()
            adam.step()
        for name in expected:
            expected[name] += (theta_i[name].detach() - theta[name]) / 2
    for (name, e), g in zip(expected.items(), learner.meta_gradient, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-11, msg=name)


def assert_close_runs(got: Path, expected: Path) -> None:
    """Of the same steps, but for rounding."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        one, two = logged(got, name), logged(expected, name)
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            for row in (a, b):
                for task, numbers in row.pop("tasks", {}).items():
                    row |= {f"{task}/{k}": v for k, v in numbers.items()}
                row |= row.pop("mean", {})
            assert a == pytest.approx(b, rel=1e-3, abs=3e-5)
    a, b = final_weights(got), final_weights(expected)
    assert a.keys() == b.keys()
    apart = torch.cat([(a[name] - b[name]).double().flatten() for name in a])
    # Adam makes much of a gradient that is 0 but for rounding: a weight in thousands may differ
    assert apart.square().mean().sqrt() < 1e-5
    assert apart.abs().max() < 1e-3


def test_replicas_equal_one_rank(small_model, sums, tmp_path):
    """Two replicas take two tasks each, and evaluate different ones; three steps, as one rank."""
    flags = [*settings_of("fomaml", small_model, sums), *THREE_STEPS, "--tasks-per-step", "4"]
    flags += ["--eval-every", "0", "--gain-every", "1"]
    assert run_here(fomaml, *flags, "--output-dir", tmp_path / "1") == 0
    more = ["--replicas", "2", "--output-dir", tmp_path / "2"]
    run_well("fomaml.py", *flags, *more, ranks=2)
    assert_close_runs(tmp_path / "2", tmp_path / "1")
    tokens = tokens_of(tmp_path / "1")  # of the first replica, times two: about as many
    assert tokens_of(tmp_path / "2") == pytest.approx(tokens, rel=0.2)


def tokens_of(folder: Path) -> list[int]:
    """Those of each step, which are logged by the second."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [round(row["tokens_per_second"] * row["seconds"]) for row in rows]


def test_two_shards_with_learned_rates_equal_one_rank(small_model, sums, tmp_path):
    """The rates' gradient is of all weights, not of a rank's; both ranks see the same tokens."""
    flags = [*settings_of("fomaml", small_model, sums), *THREE_STEPS, "--eval-every", "-1"]
    flags += ["--learn-inner-lr", "scalar", "--rate-lr", "0.3", "--inner-optimizer", "sgd"]
    flags += ["--inner-lr", "0.05"]
    assert run_here(fomaml, *flags, "--output-dir", tmp_path / "1") == 0
    run_well("fomaml.py", *flags, "--output-dir", tmp_path / "2", ranks=2)
    assert_close_runs(tmp_path / "2", tmp_path / "1")
    assert tokens_of(tmp_path / "2") == tokens_of(tmp_path / "1")


def test_two_shards_of_reptile_equal_one_rank(small_model, sums, tmp_path):
    """The direction's norm is of all weights; a row at a time, inner steps cut by the norm of the
    whole gradient."""
    flags = [*settings_of("fomaml", small_model, sums), *THREE_STEPS, "--eval-every", "0"]
    flags += ["--meta-gradient", "reptile", "--micro-batch", "1", "--inner-clip", "0.5"]
    flags += ["--query-batch", "4", "--support-batch", "4", "--inner-lr", "0.2"]
    assert run_here(fomaml, *flags, "--output-dir", tmp_path / "1") == 0
    run_well("fomaml.py", *flags, "--output-dir", tmp_path / "2", ranks=2)
    assert_close_runs(tmp_path / "2", tmp_path / "1")


def test_tasks_per_forward_change_nothing(small_model, sums, tmp_path):
    """Also not what is logged of each task."""
    flags = [*settings_of("meta_lora", small_model, sums), *THREE_STEPS, "--tasks-per-step", "4"]
    flags += ["--dropout", "0", "--gain-every", "1", "--inner-optimizer", "sgd"]
    assert run_here(meta_lora, *flags, "--output-dir", tmp_path / "4") == 0
    flags += ["--tasks-per-forward", "1"]
    assert run_here(meta_lora, *flags, "--output-dir", tmp_path / "1") == 0
    assert_close_runs(tmp_path / "1", tmp_path / "4")


@pytest.mark.parametrize("method", ["fomaml", "reptile"])
def test_losses_of_adapters(method):
    """The support loss that is logged is that before the last support step."""
    episodes, tokens = random_episodes(2, 6, 2)
    args = meta_lora.Args(inner_lr=0.05, support_batch=2, tasks_per_step=2, inner_optimizer="sgd")
    model = small_llama().requires_grad_(False)
    adapters = Adapters(
        model, r=3, alpha=6, dropout=0.0, rank_stabilised=False, seed=1, device=CPU,
        target_modules=args.target_modules,
    )  # fmt: skip
    adapters.phi = [p.double() for p in adapters.phi]
    learner = meta_lora.AdapterLearner(model, adapters, args, World(CPU), 0, tokens)
    support, query = getattr(learner, method)(episodes)
    steps = meta_lora.support_steps(episodes, 2)
    learner.inner_loop(steps[:-1])
    with torch.no_grad():
        torch.testing.assert_close(support, learner.mean_losses(steps[-1]))
    learner.inner_loop(steps)
    with torch.no_grad():
        torch.testing.assert_close(query, learner.mean_losses([e.query for e in episodes]))


@pytest.mark.parametrize("inner_optimizer", ["sgd", "adam"])
def test_inner_clip_above_the_norm_changes_nothing(inner_optimizer):
    """It makes no small gradient larger."""
    episodes, tokens = random_episodes(2, 4, 2)
    found = []
    for clip in (0.0, 1e6):
        args = meta_lora.Args(
            inner_clip=clip, inner_lr=0.02, inner_optimizer=inner_optimizer, support_batch=2
        )
        model = small_llama().requires_grad_(False)
        adapters = Adapters(
            model, r=3, alpha=6, dropout=0.0, target_modules=args.target_modules,
            rank_stabilised=False, seed=1, device=CPU,
        )  # fmt: skip
        adapters.phi = [p.double() for p in adapters.phi]
        learner = meta_lora.AdapterLearner(model, adapters, args, World(CPU), 0, tokens)
        learner.inner_loop(meta_lora.support_steps(episodes, 2))
        found.append([p.detach() for p in adapters.stack])
    for plain, clipped, phi in zip(*found, adapters.phi, strict=True):
        assert not torch.equal(plain[0], phi)
        torch.testing.assert_close(clipped, plain, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# The sampler and episodes; how the embedded models are made


class Twice:
    """A game of two turns with the same prompt."""

    def reset(self, seed: int) -> list[str]:
        return []

    def prompt(self, state: list[str]) -> list[dict]:
        return [{"role": "user", "content": "Say something."}]

    def step(self, state: list[str], text: str) -> Result:
        state.append(text)
        return Result(0.0, len(state) == 2, False, "")


def test_every_turn_has_its_own_stream(small_model):
    _, tokenizer = load_config("tiny")
    model = load_weights(str(small_model)).eval()
    groups = play(model, tokenizer, Twice(), range(4), 2, "key", 12)
    texts = set()
    for group in groups:
        for trajectory in group:
            texts |= {turn.text for turn in trajectory.turns}
    assert len(texts) == 16  # 4 seeds, 2 samples, 2 turns


def test_interrupted_samples_are_cut_short(small_model):
    """What has been drawn is what an uninterrupted call draws first; the rest is empty."""
    _, tokenizer = load_config("tiny")
    model = load_weights(str(small_model)).eval()
    prompts = [[5, 6, 7], [8, 9], [5, 5, 5, 5], [6] * 5]

    def draw(interrupted):
        return sample(
            model, tokenizer, prompts, 2, 20, stop=frozenset({10**6}), batch_size=4,
            seeds=range(8), interrupted=interrupted,
        )  # fmt: skip

    asked = itertools.count()
    cut, whole = draw(lambda: next(asked) >= 6), draw(lambda: False)
    lengths = [len(s.ids) for s in cut]
    assert sorted(lengths) == [0, 0, 0, 0, 5, 5, 5, 5]
    for s, full, n in zip(cut, whole, lengths, strict=True):
        assert len(full.ids) == 20
        assert s.ids == full.ids[:n]
        assert s.logprobs == pytest.approx(full.logprobs[:n], abs=1e-5)
        assert not s.finished


def test_rates_of_the_embedded_models_training(monkeypatch):
    """Warm-up and linear decay, of AdamW and of Muon."""
    rates = {"AdamW": [], "Muon": []}
    for name, found in rates.items():
        kind = getattr(torch.optim, name)
        real = kind.step

        def step(self, *args, real=real, found=found, **kwargs):
            found.append(self.param_groups[0]["lr"])
            return real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "step", step)
    batch = {"input_ids": torch.arange(32)[None], "labels": torch.arange(32)[None]}
    losses = tiny.train.fit(
        small_llama(torch.float32), itertools.repeat(batch), 10, lr=5e-3, warmup=4
    )
    assert len(losses) == 10
    schedule = [0.25, 0.5, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates["AdamW"] == pytest.approx([3e-3 * x for x in schedule])
    assert rates["Muon"] == pytest.approx([5e-3 * x for x in schedule])


def test_embedded_models_replace_nothing_else(tmp_path):
    """The folder of a new model is emptied: one with other things in it is refused."""
    (tmp_path / "mine.txt").write_text("mine")
    for options, message in (
        ({"steps": 0}, "--steps must be at least 1"),
        ({"lr": math.nan}, r"--lr must be in \(0, 100\]"),
        ({"output_dir": ""}, "--output-dir must name a folder"),
        ({"output_dir": str(tmp_path)}, "holds other things than a model"),
        ({"output_dir": str(tmp_path / "mine.txt")}, "is a file"),
    ):
        with pytest.raises(DataError, match=message):
            tiny.train.main(tiny.train.Args(**options))
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --------------------------------------------------------------------------------------------------
# Two ranks, one launch: one validation prompt a rank; pictures where one rank has no rows


def validation_group() -> list[Trajectory]:
    """Four samples of one prompt, one of them right."""
    turns = [row.turn for row in random_rows(4, 3)]
    return [Trajectory([turn._replace(reward=float(i == 0))]) for i, turn in enumerate(turns)]


def found_by_ranks(world: World) -> dict:
    """grad_mu of one group on each rank, or of the same group twice on one; the gradient of
    demonstrated cards in pictures, which the last rank has none of."""
    from torch.distributed.fsdp import fully_shard

    model = small_llama(torch.float32)
    policy = Policy(model, False)
    if world.size > 1:
        for module in (*layers_to_shard(model), policy):
            fully_shard(module, mesh=world.mesh["shard"])
    settings = {"task": "general_points", "vision": True, "micro_batch": 2}
    args = amft.with_defaults(amft.Args(**settings))
    optimizer = torch.optim.AdamW(policy.parameters())
    learner = PolicyLearner(args, policy.train(), optimizer, world, 0)
    direction = [p.clone() for p in learner.local_params]
    groups = [validation_group()] * (2 // world.size)
    grad_mu, noise = amft.meta_gradient(learner, groups, direction)
    signal_to_noise = abs(grad_mu) / max(noise, 1e-30)

    config, tokenizer, processor = load_readers(args.model, True)
    train, *_ = amft.load_task(args, tokenizer)
    policy = amft.build(args, config, world)
    turns = [demonstrate(tokenizer, train, seed, processor).turns[0] for seed in range(3)]
    optimizer = torch.optim.AdamW(policy.parameters())
    learner = PolicyLearner(args, policy, optimizer, world, tokenizer.pad_token_id, turns[0])
    rows = [Row(turn, [0.0] * len(turn.ids), 0.01) for turn in turns]
    mine = rows if world.rank == 0 else []
    G = learner.zeros()
    learner.backward(Pass(mine, {"sft": (amft.sft_loss, 1.0)}, [(G, 1.0)]))
    norm = math.sqrt(learner.dot(G, G))
    entropy = learner.entropy([[Trajectory([row.turn])] for row in mine])
    return {"grad_mu": grad_mu, "signal_to_noise": signal_to_noise, "norm": norm, "H": entropy}


def test_two_ranks(tmp_path, process_group):
    run_well("-m", "tests.test_mended", tmp_path / "two.json", ranks=2)
    two = json.loads((tmp_path / "two.json").read_text())
    one = found_by_ranks(World(CPU, mesh=one_rank_mesh()))
    assert abs(one["grad_mu"]) > 1e-3
    for name in ("grad_mu", "norm", "H"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    for found in (one, two):  # the halves are the same group
        assert found["signal_to_noise"] > 1e3


def main(file: str) -> None:
    world = setup()
    found = found_by_ranks(world)
    if world.rank == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
