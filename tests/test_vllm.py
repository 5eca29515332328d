"""vllm_sampler.py and the truncated importance weights: by hand, and against our own sampler where
vllm is installed."""

import importlib.util
import math
import os
import random
import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import amft
import vllm_sampler
from data import DataError
from games.play import Actor
from games.rules import Result
from learner import PolicyLearner
from lora import Adapters
from model import ModelError, World, load_config, load_weights
from policy import Policy, Sample, never, sample
from tests.helpers import (
    AMFT_RUN,
    OneRank,
    logged,
    random_rows,
    run_here,
    run_well,
    small_llama,
)
from vllm_sampler import VllmSampler, engine_bytes, engine_metrics, truncated_weights

CPU = torch.device("cpu")
INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vllm is not installed (docs/amft.md)")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def group():
    """A process group for this file: the engine's groups are made in it and go with it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def args_of(**settings) -> amft.Args:
    return amft.with_defaults(amft.Args(sampler="vllm", method="rl", **settings))


# --------------------------------------------------------------------------------------------------
# Importance weights


def test_truncated_weights_by_hand():
    """pi / pi_engine of 1.5, 4 and 1/4 under a cap of 2; one too large for a float."""
    differences = [math.log(1.5), math.log(4), math.log(0.25), 1e4]
    assert truncated_weights(differences, 2.0) == pytest.approx([1.5, 2.0, 0.25, 2.0])
    assert truncated_weights(differences[:3], 0.5) == pytest.approx([0.5, 0.5, 0.25])


def test_metrics_by_hand():
    """k3 of log-ratios 0, ln 2 and -ln 2: 0, 1 - ln 2 and ln 2 - 1/2; one of three is over 1.5."""
    differences = [0.0, math.log(2), -math.log(2)]
    metrics = engine_metrics(differences, 1.5, OneRank())
    assert metrics == pytest.approx({"engine/kl": 0.5 / 3, "engine/cut": 1 / 3})
    assert engine_metrics([], 2.0, OneRank()) == {}


class TwoRanks(OneRank):
    """The other rank has one token, of log-ratio 0."""

    def sum(self, *values) -> list:
        return [x + y for x, y in zip(values, (1, 0.0, 0), strict=True)]


def test_metrics_of_all_ranks():
    """A weight at the cap is not cut; k3 of a log-ratio above 50 counts as that of 50; a rank with
    no tokens has the others' numbers."""
    assert engine_metrics([math.log(2)], 2.0, OneRank())["engine/cut"] == 0
    assert engine_metrics([1e4], 2.0, OneRank())["engine/kl"] == math.exp(50) - 10001
    metrics = engine_metrics([math.log(2)], 1.5, TwoRanks())
    assert metrics == pytest.approx({"engine/kl": (1 - math.log(2)) / 2, "engine/cut": 0.5})
    assert engine_metrics([], 1.5, TwoRanks()) == {"engine/kl": 0, "engine/cut": 0}


def logprobs_alone(model, row) -> torch.Tensor:
    """log pi of a row's response, without batch and padding."""
    ids = torch.tensor([row.turn.prompt + row.turn.ids])
    logits = model(input_ids=ids).logits[0, len(row.turn.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row.turn.ids)[:, None])[:, 0]


def learner_of(**settings) -> PolicyLearner:
    args = args_of(micro_batch=3, **settings)
    policy = Policy(small_llama(), value_head=False)
    optimizer = torch.optim.AdamW([{"params": list(policy.parameters()), "lr": 0, "peak": 0}])
    return PolicyLearner(args, policy, optimizer, World(CPU), 0)


def test_correction_against_a_loop(group):
    """pi_old becomes the policy's, the weights are of the engine's, and the gradient of the step is
    that of - sum w A log pi, row by row. Demonstrations stay as they are."""
    learner = learner_of(is_cap=1.2)
    rows = random_rows(7)
    shown = random_rows(1, seed=1, demonstration=True)[0]
    engine = [list(row.turn.old_logprobs) for row in rows]
    learner.correct([*rows, shown])
    assert shown.importance == [] and set(shown.turn.old_logprobs) == {0.0}

    loss, cut = 0.0, 0
    for row, of_engine in zip(rows, engine, strict=True):
        logprobs = logprobs_alone(learner.policy.lm, row)
        weights = (logprobs.detach() - torch.tensor(of_engine)).exp().clamp(max=1.2)
        cut += (weights == 1.2).sum().item()
        assert row.importance == pytest.approx(weights.tolist(), rel=1e-6)
        assert row.turn.old_logprobs == pytest.approx(logprobs.tolist(), rel=1e-6)
        loss = loss - (weights * torch.tensor(row.advantages) * logprobs).sum()
    tokens = sum(len(row.turn.ids) for row in rows)
    assert 0 < cut < tokens
    expected = torch.autograd.grad(loss / tokens, learner.params)
    got = amft.train_on(learner, 0.0, [], rows, schedule=0.0, with_D=False).G
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e.detach(), rtol=1e-4, atol=1e-7)  # weights are fp32


def test_without_correction(group):
    """--is-cap 0, and our own sampler: nothing is changed."""
    for settings in ({"is_cap": 0.0}, {"sampler": "own"}):
        learner = learner_of()
        for name, value in settings.items():
            setattr(learner.args, name, value)
        rows = random_rows(3)
        before = [row.turn for row in rows]
        assert learner.correct(rows) == {}
        assert [row.turn for row in rows] == before
        assert all(row.importance == [] for row in rows)


def test_utility_is_corrected(group):
    """grad U of the controller: the weights scale each token of the validation samples."""
    learner = learner_of(is_cap=5.0)
    derivative = [torch.ones_like(p) for p in learner.params]
    plain, shifted = [], []
    for shift, groups in ((0.0, plain), (math.log(2), shifted)):
        for pair in range(2):
            trajectories = []
            for row in random_rows(2, seed=pair):
                old = (logprobs_alone(learner.policy.lm, row).detach() - shift).tolist()
                turn = row.turn._replace(old_logprobs=old, reward=float(len(trajectories)))
                trajectories.append(amft.Trajectory([turn]))
            groups.append(trajectories)
    once, twice = (
        amft.meta_gradient(learner, groups, derivative)[0] for groups in (plain, shifted)
    )
    assert abs(once) > 0
    assert twice == pytest.approx(2 * once, rel=1e-6)


# --------------------------------------------------------------------------------------------------
# What is refused, counted and wired


def with_vllm(monkeypatch, installed: bool) -> None:
    real = importlib.util.find_spec

    def find_spec(name, *rest):
        if name == "vllm":
            return True if installed else None
        return real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_missing_vllm_is_one_line(monkeypatch, capsys):
    with_vllm(monkeypatch, installed=False)
    assert run_here(amft, "--sampler", "vllm") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "pip install vllm" in lines[0]


REFUSED = [
    ({"sampler": "vllm", "vision": True, "task": "general_points"}, "--vision"),
    ({"sampler": "vllm", "vllm_sleep": True}, "GPU"),
    ({"is_cap": 2.0}, "--sampler vllm"),
    ({"vllm_eager": True}, "--sampler vllm"),
    ({"vllm_sleep": True}, "--sampler vllm"),
]


@pytest.mark.parametrize("flags,word", REFUSED, ids=str)
def test_refused(flags, word, monkeypatch):
    with_vllm(monkeypatch, installed=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match=word):
        amft.check(amft.with_defaults(amft.Args(**flags)), ranks=1)


def test_taken(monkeypatch):
    with_vllm(monkeypatch, installed=True)
    for flags in ({}, {"is_cap": 0.0}, {"vllm_eager": True}, {"lora_r": 4}, {"advantage": "gae"}):
        args = args_of(**flags)
        amft.check(args, ranks=2)
        assert args.is_cap == flags.get("is_cap", 2.0)
    assert amft.with_defaults(amft.Args()).is_cap is None


def test_flags_of_a_gpu_and_of_no_correction(monkeypatch):
    """--vllm-sleep where there is a GPU is taken; --is-cap 0 is a flag that was given."""
    with_vllm(monkeypatch, installed=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vllm_sampler.check_flags(args_of(vllm_sleep=True))
    with pytest.raises(DataError, match="--sampler vllm"):
        vllm_sampler.check_flags(amft.Args(is_cap=0.0))


def test_memory_of_the_engine():
    """Keys and values of whole blocks of 32 tokens, and two blocks more; the dry run counts them
    and the weights, in the rollouts alone where the engine sleeps."""
    config, _ = load_config("tiny_bare")  # 5 layers, 4 heads of 32 numbers
    token = 2 * 5 * 4 * 32 * 2
    assert engine_bytes(config, 8, 33, 100, 2) == (8 * 64 + 64) * token
    assert engine_bytes(config, 2, 33, 1000, 2) == (1024 + 64) * token  # one of the longest fits
    world = World(CPU)
    n = sum(p.numel() for p in load_weights("tiny_bare").parameters())
    cache = engine_bytes(config, 128, 100, 2048 + 96, 4)
    awake = amft.needs(args_of(), config, world, 100)
    assert awake.device["vLLM"] == 4 * n and awake.device["its cache"] == cache
    assert "cache of rollouts" not in awake.evaluation
    asleep = amft.needs(args_of(vllm_sleep=True), config, world, 100)
    assert "vLLM" not in asleep.device
    assert asleep.evaluation["vLLM"] == 4 * n and asleep.evaluation["its cache"] == cache


def adapters_on(model, device=CPU) -> Adapters:
    """With B other than 0."""
    adapters = Adapters(
        model,
        r=4,
        alpha=8,
        dropout=0.0,
        target_modules=TARGETS,
        rank_stabilised=False,
        seed=0,
        device=device,
    )
    generator = torch.Generator().manual_seed(0)
    for B in adapters.phi[1::2]:
        B.copy_(0.05 * torch.randn(B.shape, generator=generator))
    adapters.train_phi()
    return adapters


def test_pushed_weights_have_the_adapters():
    """A model with the pushed weights and no adapter computes what the adapted one does."""
    model, plain = small_llama(torch.float32), small_llama(torch.float32)
    adapters = adapters_on(model)
    pusher = types.SimpleNamespace(adapters=adapters, dtype=torch.float32)
    weights = dict(VllmSampler.merged(pusher, model))
    plain.load_state_dict(weights, strict=False)
    assert weights.keys() == dict(model.named_parameters()).keys()
    ids = torch.arange(2, 20)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    difference = (plain(ids).logits - small_llama(torch.float32)(ids).logits).abs().max()
    assert difference > 0.1


class Recorder:
    """In place of an engine: what it was told."""

    def __init__(self, *args, **settings):
        self.settings, self.told = settings, []

    def weights_changed(self, *_):
        self.told.append("changed")

    def rest(self, *_):
        self.told.append("rest")


def test_engine_is_told_of_steps_and_of_training(monkeypatch):
    monkeypatch.setattr(amft, "VllmSampler", Recorder)
    policy = Policy(small_llama(torch.float32), value_head=False)
    optimizer = torch.optim.AdamW(policy.parameters())
    args = args_of(generation_batch=7, max_length=50, max_new_tokens=6, vllm_eager=True)
    engine = amft.vllm_engine(args, policy.config, policy, optimizer, longest=30)
    expected = {"sequences": 7, "longest": 30, "max_length": 56, "eager": True, "sleeps": False}
    assert expected.items() <= engine.settings.items()
    policy.lm(torch.tensor([[1, 2]]))  # as sampling does
    assert engine.told == []
    ids = torch.tensor([[1, 2, 3]])
    policy(ids, torch.ones(1, 2, dtype=torch.bool))[0].sum().backward()
    assert engine.told == ["rest"]
    optimizer.step()
    assert engine.told == ["rest", "changed"]


# --------------------------------------------------------------------------------------------------
# A stand-in for the engine, where vllm need not be installed


class StandIn:
    """An engine whose model is small_llama, started at zeros: it draws by the weights that are
    pushed, one request a step, the last first."""

    off = 0.0  # what its log-probabilities are wrong by

    def __init__(self, args):
        self.args, self.told, self.requests, self.hows = args, [], {}, {}
        self.model = small_llama(torch.float32)
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
        shutdown = types.SimpleNamespace(atexit=True)
        self.engine_core = types.SimpleNamespace(
            _finalizer=shutdown, shutdown=lambda: self.told.append("shutdown")
        )

    @classmethod
    def from_engine_args(cls, args):
        """Also what the real one does to the process."""
        torch.manual_seed(0)
        random.seed(0)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_num_threads = print
        warnings.warn("of torch and Triton", stacklevel=1)
        return cls(args)

    def collective_rpc(self, name, kwargs):
        self.told.append(name)
        self.model.load_state_dict(dict(kwargs["weights_iterator"]), strict=False)

    def apply_model(self, function):
        self.told.append("apply")
        assert function is vllm_sampler._pack_again

    def reset_prefix_cache(self):
        self.told.append("reset")

    def sleep(self, level):
        self.told.append(f"sleep {level}")

    def wake_up(self):
        self.told.append("wake up")

    def add_request(self, name, prompt, how):
        self.requests[name] = prompt["prompt_token_ids"]
        self.hows[name] = how

    def abort_request(self, names):
        self.told.append(("abort", sorted(names)))
        for name in names:
            del self.requests[name]

    @torch.no_grad()
    def step(self):
        name, prompt = self.requests.popitem()
        how, ids, logprobs = self.hows[name], [], []
        generator = torch.Generator().manual_seed(how.seed)
        while len(ids) < how.max_tokens and not set(ids[-1:]) & set(how.stop_token_ids):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            token = logits.argmax().item()
            if how.temperature:
                p = (logits / how.temperature).softmax(-1)
                token = torch.multinomial(p, 1, generator=generator).item()
            ids.append(token)
            logprob = logits.log_softmax(-1)[token].item() + self.off
            logprobs.append({token: types.SimpleNamespace(logprob=logprob)})
        output = types.SimpleNamespace(token_ids=tuple(ids), logprobs=logprobs)
        return [types.SimpleNamespace(request_id=name, outputs=[output])]


@pytest.fixture
def stand_in(monkeypatch):
    """start(): a VllmSampler with a StandIn; `vllm` is a module of such parts meanwhile."""
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # as it is after the test
    for key in vllm_sampler.SETTINGS:
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    parts = {
        "vllm": {"EngineArgs": types.SimpleNamespace, "SamplingParams": types.SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": types.SimpleNamespace(FINAL_ONLY="final")},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.llm_engine": {"LLMEngine": StandIn},
    }
    for name, names in parts.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)

    def start(**changes) -> VllmSampler:
        config, _ = load_config("tiny_bare")
        settings = {"dtype": torch.float32, "sequences": 8, "longest": 33, "max_length": 100}
        return VllmSampler("tiny_bare", config, **settings | changes)

    return start


TOKENIZER = types.SimpleNamespace(eos_token_id=5)
PROMPTS = [[7, 8, 9], [3], [40, 41]]


@pytest.mark.filterwarnings("ignore:of torch and Triton")
def test_how_the_engine_is_made(stand_in, monkeypatch):
    """It has room for the sequences and no more positions than the model; dummy weights, and
    log-probabilities untempered; the user's own settings of the environment stay."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    config, _ = load_config("tiny_bare")  # 5 layers, 4 heads of 32 numbers
    token = 2 * 5 * 4 * 32
    positions = config.max_position_embeddings
    expected = {
        "model": str(vllm_sampler.resolve("tiny_bare")), "skip_tokenizer_init": True,
        "trust_remote_code": False, "dtype": "float32", "load_format": "dummy",
        "generation_config": "vllm", "logprobs_mode": "raw_logprobs", "max_model_len": 100,
        "max_num_seqs": 8, "block_size": 32, "kv_cache_memory_bytes": (8 * 64 + 64) * token * 4,
        "enforce_eager": False, "enable_sleep_mode": False, "distributed_executor_backend": "uni",
        "disable_log_stats": True,
    }  # fmt: skip
    sampler = stand_in()
    assert vars(sampler.engine.args) | expected == vars(sampler.engine.args)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"  # in this process
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    assert sampler.engine.engine_core._finalizer.atexit is False

    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    other = {"dtype": torch.bfloat16, "sequences": 2, "eager": True, "sleeps": True}
    other |= {"max_length": positions + 1, "trust_remote_code": True}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_sampler, "settings_kept", nullcontext)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        args = vars(stand_in(**other).engine.args)
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)
        alone = stand_in(**other | {"eager": False}).engine.args
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
    assert alone.distributed_executor_backend == "uni"
    assert (alone.enforce_eager, alone.enable_sleep_mode) == (False, True)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
    expected = {
        "dtype": "bfloat16", "max_model_len": positions, "max_num_seqs": 2, "block_size": None,
        "kv_cache_memory_bytes": (positions + 64) * token * 2, "enforce_eager": True,
        "enable_sleep_mode": True, "distributed_executor_backend": "external_launcher",
        "trust_remote_code": True,
    }  # fmt: skip
    assert positions % 32 == 0
    assert args | expected == args


def test_models_without_a_number_of_positions(stand_in):
    text = types.SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=2, head_dim=4, hidden_size=8
    )
    text.get_text_config = lambda: text
    sampler = VllmSampler(
        "tiny", text, dtype=torch.float32, sequences=1, longest=3, max_length=5000
    )
    assert sampler.engine.args.max_model_len == 5000


def test_an_engine_that_does_not_start_is_one_line(stand_in, monkeypatch):
    def fail(_):
        raise RuntimeError("no kernel\nof this kind")

    monkeypatch.setattr(StandIn, "from_engine_args", fail)
    with pytest.raises(ModelError, match="^--sampler vllm cannot run tiny_bare: .*no kernel") as e:
        stand_in()
    assert "\n" not in str(e.value)


def test_the_engine_leaves_the_process_as_it_was(stand_in):
    """Generators, threads, how they are set, and no warnings."""
    torch.manual_seed(5)
    random.seed(5)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    states = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stand_in()
        assert torch.set_num_threads is set_threads
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def of_model(model, prompts, samples, per_prompt: int) -> None:
    """The samples' log-probabilities are the model's."""
    assert len(samples) == len(prompts) * per_prompt
    assert farthest(model, prompts, samples, per_prompt) < 1e-4


def test_weights_are_pushed_when_they_are_old(stand_in):
    """Before the first draw and after a step; then packed again, and what is cached of old ones is
    thrown away. What the engine computes is compared once."""
    sampler, lm = stand_in(), small_llama(torch.float32)
    engine, push = sampler.engine, ["reload_weights", "apply", "reset"]
    of_model(lm, PROMPTS, sampler.sample(lm, TOKENIZER, PROMPTS, 2, 4), 2)
    assert engine.told == [*push, ("abort", []), ("abort", [])]  # one of the comparison
    assert engine.hows["0"].max_tokens == 4
    engine.told.clear()
    of_model(lm, PROMPTS, sampler.sample(lm, TOKENIZER, PROMPTS, 1, 4), 1)
    assert engine.told == [("abort", [])]
    engine.told.clear()
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    sampler.weights_changed("what a hook", "is given")
    of_model(lm, PROMPTS, sampler.sample(lm, TOKENIZER, PROMPTS, 2, 4), 2)
    assert engine.told == [*push, ("abort", [])]


def test_the_engine_sleeps_where_asked(stand_in):
    """At most once, with its weights thrown away; the next draw wakes it up and pushes."""
    sampler, lm = stand_in(), small_llama(torch.float32)
    sampler.sample(lm, TOKENIZER, PROMPTS, 1, 2)
    sampler.engine.told.clear()
    sampler.rest("what a hook", "is given")
    assert (sampler.engine.told, sampler.stale) == ([], False)
    sampler = stand_in(sleeps=True)
    sampler.sample(lm, TOKENIZER, PROMPTS, 1, 2)
    for _ in range(2):
        sampler.engine.told.clear()
        sampler.rest()
        sampler.rest()
        assert sampler.engine.told == ["sleep 2"]
        sampler.sample(lm, TOKENIZER, PROMPTS, 1, 2)
        assert sampler.engine.told[:3] == ["sleep 2", "wake up", "reload_weights"]
        sampler.sample(lm, TOKENIZER, PROMPTS, 1, 2)
        assert sampler.engine.told.count("reload_weights") == 1


def test_weights_of_other_names_are_one_line(stand_in, monkeypatch):
    lm = small_llama(torch.float32)
    for kind in (KeyError, AttributeError, ValueError, AssertionError):

        def refuse(*_, kind=kind, **__):
            raise kind("model.elsewhere")

        monkeypatch.setattr(StandIn, "collective_rpc", refuse)
        with pytest.raises(ModelError, match="LlamaForCausalLM does not take .*elsewhere"):
            stand_in().sample(lm, TOKENIZER, PROMPTS)


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 0.01), (torch.bfloat16, 0.5)])
def test_an_engine_that_computes_something_else(dtype, limit, stand_in, monkeypatch):
    """Its log-probability of the likeliest token after eight others may differ by rounding."""
    lm = small_llama(torch.float32)
    for off in (-0.8, 0.8, -1.2, 1.2, math.nan):
        sampler = stand_in(dtype=dtype)
        monkeypatch.setattr(StandIn, "off", off * limit)
        if abs(off) < 1:
            sampler.sample(lm, TOKENIZER, PROMPTS, 1, 2)
            assert sampler.checked
        else:
            with pytest.raises(ModelError, match="does not take this model's weights"):
                sampler.sample(lm, TOKENIZER, PROMPTS, 1, 2)
            assert not sampler.checked


def test_what_the_engine_is_asked_for(stand_in):
    """Each prompt n times with its own seed; without end tokens of the engine's; one
    log-probability a token, whatever the order in which it answers."""
    sampler, lm = stand_in(), small_llama(torch.float32)
    drawn = sampler.sample(
        lm, TOKENIZER, PROMPTS, 2, 6, 0.5, 0.9, stop=frozenset([-1, 30, 9]),
        seeds=[4, 1, 2, 3, -1, 2**62 + 7],
    )  # fmt: skip
    of_model(lm, PROMPTS, drawn, 2)
    hows = [sampler.engine.hows[str(i)] for i in range(6)]
    assert [how.seed for how in hows] == [4, 1, 2, 3, 2**62 - 1, 7]
    for how in hows:
        assert vars(how) == {
            "temperature": 0.5, "top_p": 0.9, "seed": how.seed, "max_tokens": 6,
            "stop_token_ids": [9, 30], "ignore_eos": True, "logprobs": 0, "detokenize": False,
            "output_kind": "final",
        }  # fmt: skip


def test_an_answer_ends_with_a_stop_token(stand_in):
    sampler, lm = stand_in(), small_llama(torch.float32)
    stop = frozenset(range(32))
    drawn = sampler.sample(lm, TOKENIZER, PROMPTS, 4, 3, stop=stop, seeds=range(12))
    assert {s.finished for s in drawn} == {True, False}
    for s in drawn:
        assert s.finished == (s.ids[-1] in stop)
        assert all(token not in stop for token in s.answer)
        assert s.finished or len(s.ids) == 3


def test_draws_that_are_not_specified(stand_in):
    """As of policy.sample: 256 tokens of one response, the model's own distribution, its end
    token; seeds are the generator's, one a response."""
    sampler, lm = stand_in(), small_llama(torch.float32)
    sampler.sample(lm, TOKENIZER, [[3]])
    how = sampler.engine.hows["0"]
    assert (how.max_tokens, how.temperature, how.top_p) == (256, 1, 1)
    assert how.stop_token_ids == [5]
    found = []
    for seed in (1, 1, 2):
        sampler.engine.hows.clear()
        generator = torch.Generator().manual_seed(seed)
        sampler.sample(lm, TOKENIZER, [[3], [4]], 2, 2, generator=generator)
        found.append([how.seed for how in sampler.engine.hows.values()])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 4
    assert max(found[0]) > 2**32


def test_interrupted_draws_are_empty(stand_in, monkeypatch):
    """What has ended is kept; the rest is empty, and the engine forgets it. The bar counts what has
    ended, and is there where it has a title."""
    bars = []

    class Bar:
        def __init__(self, total, desc, disable, unit):
            bars.append([total, desc, disable, 0])

        def update(self, count=1):
            bars[-1][3] += count

        def close(self):
            bars[-1].append("closed")

    monkeypatch.setattr(vllm_sampler, "tqdm", Bar)
    sampler, lm, asked = stand_in(), small_llama(torch.float32), iter(range(9))
    whole = sampler.sample(lm, TOKENIZER, PROMPTS, 2, 4, seeds=range(6), progress="title")
    cut = sampler.sample(
        lm, TOKENIZER, PROMPTS, 2, 4, seeds=range(6), interrupted=lambda: next(asked) >= 2
    )
    assert cut == [Sample([], [], False)] * 4 + whole[4:]  # the last ones are the first to end
    assert sampler.engine.told[-1] == ("abort", ["0", "1", "2", "3"])
    assert bars == [
        [1, None, True, 1, "closed"],  # of the comparison
        [6, "title", False, 6, "closed"],
        [6, None, True, 2, "closed"],
    ]


def test_an_engine_is_closed(stand_in):
    sampler = stand_in()
    engine = sampler.engine
    sampler.close()
    assert engine.told == ["shutdown"]
    assert not hasattr(sampler, "engine")


def test_pushed_weights_have_the_engines_type():
    """Those with an adapter: W + scale B A is added in fp32."""
    lm = small_llama(torch.bfloat16)
    adapters = adapters_on(lm)
    pusher = types.SimpleNamespace(adapters=adapters, dtype=torch.bfloat16)
    weights = dict(VllmSampler.merged(pusher, lm))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    names = [f"{layer}.weight" for layer in adapters.layers]
    own = dict(lm.named_parameters())
    for name, A, B in zip(names, adapters.phi[::2], adapters.phi[1::2], strict=True):
        change = weights[name].double() - own[name].double()
        expected = 8 / 4 * B.double() @ A.double()
        torch.testing.assert_close(change, expected, rtol=0, atol=2e-3, msg=name)
    plain = types.SimpleNamespace(adapters=None, dtype=torch.bfloat16)
    for name, w in VllmSampler.merged(plain, lm):
        assert torch.equal(w, own[name])


def test_a_tied_head_is_packed_again():
    """Only one that the engine multiplies by a packed copy of."""
    packed = []
    method = types.SimpleNamespace(process_weights_after_loading=packed.append)
    plain = types.SimpleNamespace(quant_method=method)
    copied = types.SimpleNamespace(quant_method=method, cpu_linear=None)
    for head in (None, plain, copied):
        vllm_sampler._pack_again(types.SimpleNamespace(lm_head=head))
    vllm_sampler._pack_again(types.SimpleNamespace())
    assert packed == [copied]


# --------------------------------------------------------------------------------------------------
# The engine itself


@pytest.fixture(scope="module")
def engine(group):
    config, _ = load_config("tiny_bare")
    engine = VllmSampler(
        "tiny_bare",
        config,
        dtype=torch.float32,
        sequences=64,
        longest=160,
        max_length=256,
        eager=True,
    )
    yield engine
    engine.close()


@pytest.fixture
def model(engine):
    """The embedded model, which the engine is told of."""
    engine.weights_changed()
    engine.adapters = None
    return load_weights("tiny_bare").eval()


def prompts_of(lengths=(3, 40, 70, 33), seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 400, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def logits_after(model, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """[len(ids), V]: log pi before each token of a response."""
    x = torch.tensor([prompt + ids])
    return model(input_ids=x, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def farthest(model, prompts, samples, per_prompt: int) -> float:
    """The largest difference between the engine's log-probabilities and the model's."""
    worst = 0.0
    for i, s in enumerate(samples):
        logprobs = logits_after(model, prompts[i // per_prompt], s.ids)
        expected = logprobs.gather(1, torch.tensor(s.ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(s.logprobs)).abs().max().item())
    return worst


@needs_vllm
def test_greedy_equals_ours(engine, model):
    """But where our two best tokens are as good as equal, from which on the texts differ."""
    _, tokenizer = load_config("tiny_bare")
    prompts = prompts_of((3, 5, 31, 32, 33, 64, 90, 17))
    ours = sample(model, tokenizer, prompts, 2, 40, temperature=0)
    theirs = engine.sample(model, tokenizer, prompts, 2, 40, temperature=0)
    same = 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.ids == b.ids:
            assert a.finished == b.finished
            same += 1
            continue
        t = next(t for t, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y)
        first, second = logits_after(model, prompts[i // 2], a.ids)[t].topk(2).values
        assert first - second < 1e-3
    assert same >= 12
    assert farthest(model, prompts, theirs, 2) < 1e-3


@needs_vllm
def test_draws(engine, model):
    """Log-probabilities are of the untempered model; a seed gives the same tokens again, whatever
    else is in the batch; a response ends with a stop token or at the limit."""
    _, tokenizer = load_config("tiny_bare")
    prompts, seeds = prompts_of(), list(range(12))
    for temperature in (1.0, 0.7):
        drawn = engine.sample(model, tokenizer, prompts, 3, 30, temperature, seeds=seeds)
        assert farthest(model, prompts, drawn, 3) < 1e-3
        alone = engine.sample(model, tokenizer, prompts[1:2], 3, 30, temperature, seeds=seeds[3:6])
        assert [s.ids for s in alone] == [s.ids for s in drawn[3:6]]
        assert len({tuple(s.ids) for s in drawn[:3]}) > 1
    for s in engine.sample(model, tokenizer, prompts, 4, 12, stop=frozenset([25, 26, 27])):
        assert s.finished == (s.ids[-1] in (25, 26, 27))
        assert not {25, 26, 27} & set(s.answer)
        assert s.finished or len(s.ids) == 12
        assert len(s.logprobs) == len(s.ids)


@needs_vllm
def test_draws_have_the_model_s_frequencies(engine, model):
    """1,500 first tokens: the frequency of the likely ones lies within 4.5 standard deviations."""
    _, tokenizer = load_config("tiny_bare")
    prompt, count = prompts_of((20,), seed=3), 1500
    drawn = engine.sample(model, tokenizer, prompt, count, 1, seeds=range(count))
    frequency = torch.bincount(torch.tensor([s.ids[0] for s in drawn]), minlength=768) / count
    p = logits_after(model, prompt[0], [0])[0].exp()
    likely = p > 0.01
    assert likely.sum() > 1
    deviations = (frequency - p).abs() / (p * (1 - p) / count).sqrt()
    assert deviations[likely].max() < 4.5


@needs_vllm
def test_log_probabilities_follow_the_weights(engine, model):
    """Each weight of a layer, the last norm's, and those of the embedding with the output head that
    is tied to it; nothing is kept of a prompt that was read with the old ones. Without a word of
    the optimizer the engine stays as it is."""
    _, tokenizer = load_config("tiny_bare")
    prompts = prompts_of((70, 40))
    assert farthest(model, prompts, engine.sample(model, tokenizer, prompts, 2, 20), 2) < 1e-3
    for name, p in model.named_parameters():
        if "layers" in name and "layers.2." not in name:
            continue
        with torch.no_grad():
            p.add_(torch.randn_like(p), alpha=0.02 if p.ndim > 1 else 0.3)
        old = engine.sample(model, tokenizer, prompts, 1, 8, temperature=0)
        assert farthest(model, prompts, old, 1) > 1e-2, name
        engine.weights_changed()
        new = engine.sample(model, tokenizer, prompts, 1, 8, temperature=0)
        assert farthest(model, prompts, new, 1) < 1e-3, name


@needs_vllm
def test_adapters_are_pushed(engine, model):
    _, tokenizer = load_config("tiny_bare")
    prompts = prompts_of((30,))
    engine.adapters = adapters_on(model)
    drawn = engine.sample(model, tokenizer, prompts, 2, 20)
    assert farthest(model, prompts, drawn, 2) < 1e-3
    assert farthest(load_weights("tiny_bare"), prompts, drawn, 2) > 1e-2


@needs_vllm
def test_interrupted(engine, model):
    """What is unfinished is empty, and the engine goes on with other requests after it."""
    _, tokenizer = load_config("tiny_bare")
    asked = iter(range(1000))
    prompts, stop = prompts_of(), frozenset([-1])

    def after_five() -> bool:
        return next(asked) >= 5

    cut = engine.sample(model, tokenizer, prompts, 2, 40, stop=stop, interrupted=after_five)
    assert [s.ids for s in cut] == [[]] * 8
    whole = engine.sample(model, tokenizer, prompts, 2, 9, stop=stop, interrupted=never)
    assert [len(s.ids) for s in whole] == [9] * 8


class Ones:
    """Rewarded by the share of the character 1 in the answer."""

    def reset(self, seed):
        return seed

    def prompt(self, state):
        return [{"role": "user", "content": f"{state} + {state}"}]

    def step(self, state, text):
        reward = text.count("1") / max(1, len(text))
        return Result(reward, done=True, won=reward > 0, message="")


@needs_vllm
def test_reinforcement_learning_learns(engine, model):
    """Twenty steps of GRPO by the engine's samples: it always has the newest weights, and the
    reward rises."""
    _, tokenizer = load_config("tiny_bare")
    args = args_of(samples=8, prompts_per_step=4, max_new_tokens=12)
    policy = Policy(model, value_head=False)
    weights = {"params": list(policy.parameters()), "lr": 5e-4, "peak": 5e-4}
    optimizer = torch.optim.AdamW([weights])
    optimizer.register_step_post_hook(engine.weights_changed)
    world = World(CPU)
    learner = PolicyLearner(args, policy, optimizer, world, tokenizer.pad_token_id)
    actor = Actor(
        policy,
        policy.lm,
        tokenizer,
        None,
        world,
        seed=0,
        max_new_tokens=args.max_new_tokens,
        batch_size=64,
        stop=types.SimpleNamespace(is_requested=never),
        sampler=engine.sample,
    )
    rewards = []
    for step in range(20):
        groups = actor.rollout(Ones(), range(4 * step, 4 * step + 4), 8, step)
        of_step = [trajectory.turns[0].reward for group in groups for trajectory in group]
        rewards.append(sum(of_step) / len(of_step))
        _, rows = amft.rows_of(args, groups, [group[0] for group in groups])
        metrics = learner.correct(rows)
        assert metrics["engine/kl"] < 1e-6 and metrics["engine/cut"] == 0
        amft.train_on(learner, 0.0, [], rows, schedule=1.0, with_D=False)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards


def rename(model, pairs: list) -> None:
    """The model's parameters go by these names from now on."""

    def named_parameters(*args, **kwargs):
        return iter(pairs)

    model.named_parameters = named_parameters


@needs_vllm
def test_weights_left_out_are_noticed(engine, model):
    """A model that names a weight otherwise than the engine does."""
    _, tokenizer = load_config("tiny_bare")
    norm = model.model.norm.weight
    with torch.no_grad():
        norm.mul_(2.0)
    rename(model, [(name, p) for name, p in model.named_parameters() if p is not norm])
    engine.checked = False
    with pytest.raises(ModelError, match="does not take this model's weights"):
        engine.sample(model, tokenizer, prompts_of((5,)), 1, 2)
    rename(model, [("model.elsewhere.weight", norm)])
    engine.weights_changed()
    with pytest.raises(ModelError, match="does not take this model's weights"):
        engine.sample(model, tokenizer, prompts_of((5,)), 1, 2)


@needs_vllm
def test_two_ranks_have_an_engine_each(tmp_path):
    """AMFT with PPO's value head on two ranks that share the weights: each rank's engine has the
    whole of them at every step, and mu moves."""
    flags = ["--sampler", "vllm", "--vllm-eager", "--advantage", "gae"]
    run_well("amft.py", *AMFT_RUN, *flags, "--output-dir", tmp_path / "r", ranks=2)
    rows = logged(tmp_path / "r")[2:]  # after the warm-up
    assert len(rows) == 12
    assert any("grad_mu" in row for row in rows)
    for row in rows:
        assert row["engine/kl"] < 1e-6 and row["engine/cut"] == 0
