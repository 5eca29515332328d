"""amft.py's functions one by one, on numbers worked out by hand."""

import contextlib
import math
import types
from dataclasses import asdict, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

import amft
from data import DataError, check_numbers
from games.play import Trajectory, Turn
from learner import (
    PolicyLearner,
    Row,
    Tokens,
    adamw,
    add_to_targets,
    collate_rows,
    token_count,
    trained_weights,
)
from model import ModelError, World
from policy import Policy
from tests.helpers import OneRank, controller_of, small_llama

CPU = torch.device("cpu")


def args_of(**settings) -> amft.Args:
    return amft.with_defaults(amft.Args(**settings))


def turn_of(reward: float, prompt: int = 2, length: int = 3, finished: bool = True) -> Turn:
    return Turn([5] * prompt, [7] * length, [-1.0] * length, finished, "", reward)


def row_of(length: int = 3, prompt: int = 2, finished: bool = True, **fields) -> Row:
    return Row(turn_of(0.0, prompt, length, finished), [0.0] * length, **fields)


# --------------------------------------------------------------------------------------------------
# Settings

BY_TASK = dict.fromkeys(
    (
        "model", "steps", "warmup_steps", "warmup_batch", "warmup_lr", "lr", "prompts_per_step",
        "samples", "clip_ratio_high", "eta_mu", "eta_entropy", "validation_prompts", "chord_steps",
        "eval_problems",
    )
)  # fmt: skip
NOT_GIVEN = dict.fromkeys(
    ("sft_data", "suffix", "reward", "routes", "test_routes", "push_to_hub", "is_cap"),
)
OFF = dict.fromkeys(
    (
        "vision", "full_prompts", "mask_truncated", "no_meta_gradient", "no_entropy_term", "merge",
        "resume", "dry_run", "wandb", "activation_checkpointing", "cpu_offload", "compile",
        "trust_remote_code", "vllm_eager", "vllm_sleep",
    ),
    False,
)  # fmt: skip
# Of the published settings, or those that the results in docs/ were measured with
SETTINGS = {
    "task": "math", "data": "embedded", "subjects": (), "levels": (), "validation_size": 64,
    "rule": "10", "suits": "black", "actions": "absolute", "max_length": 2048,
    "output_dir": "runs/amft", "seed": 42, "method": "amft", "lr_warmup": 5,
    "betas": (0.9, 0.999), "weight_decay": 0.0, "clip": 1.0, "max_new_tokens": 96, "sampler": "own",
    "advantage": "grpo", "clip_ratio": 0.2, "dynamic_sampling": 0, "loss_aggregation": "token",
    "entropy_coefficient": 0.0, "value_coefficient": 0.1, "value_lr": 1e-3, "gae_lambda": 0.95,
    "turn_gamma": 1.0, "epochs": 1, "minibatches": 1, "mu_init": 0.5, "mu_min": 0.05,
    "mu_max": 0.95, "mu_every": 5, "meta_preconditioner": "adam", "mu_update": "shrunken",
    "entropy_sign": "printed", "sft_weight": "none", "chord_start": 0.9, "chord_end": 0.05,
    "chord_warmup": 0, "luffy_gamma": 0.1, "hpt_gate": 0, "hpt_sft": 1.0, "lora_r": 0,
    "lora_alpha": 32, "eval_every": 20, "show": 2, "save_every": 40, "keep": 3, "replicas": 1,
    "micro_batch": 32, "generation_batch": 128,
    "target_modules": (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ),
}  # fmt: skip


def test_settings_without_flags():
    assert asdict(amft.Args()) == SETTINGS | BY_TASK | NOT_GIVEN | OFF


def test_choices():
    """What a flag may be; its default is one of them, and every method has a row of METHODS."""
    found = {}
    for name, kind in get_type_hints(amft.Args).items():
        if get_origin(kind) is Literal:
            found[name] = " ".join(get_args(kind))
            assert SETTINGS[name] in get_args(kind)
    assert found == {
        "rule": "10 11_12_13",
        "suits": "black red",
        "actions": "absolute relative",
        "method": "amft sft rl sft_then_rl fixed chord luffy srft hpt gac",
        "sampler": "own vllm",
        "advantage": "grpo mean gae",
        "loss_aggregation": "token sequence",
        "meta_preconditioner": "adam none",
        "mu_update": "shrunken normalised printed",
        "entropy_sign": "printed text",
        "sft_weight": "none phi dft",
    }
    assert set(amft.METHODS) == set(found["method"].split())


# steps, prompts_per_step, samples, eval_problems, model
TASKS = [
    ({}, (80, 16, 8, 140, "tiny_bare")),
    ({"task": "math", "full_prompts": True}, (80, 16, 8, 140, "tiny_bare")),
    ({"task": "general_points"}, (70, 8, 8, 70, "tiny_games")),
    ({"task": "own.py:games"}, (70, 8, 8, 70, "tiny_games")),
    ({"task": "virl"}, (30, 4, 4, 70, "tiny_games")),
    ({"task": "virl", "vision": True}, (30, 4, 4, 70, "tiny_vision")),
    ({"task": "virl", "full_prompts": True}, (30, 4, 4, 234, "tiny_games")),
    ({"steps": 3, "prompts_per_step": 2, "samples": 5, "eval_problems": 9, "model": "m"},
     (3, 2, 5, 9, "m")),
]  # fmt: skip


@pytest.mark.parametrize("given,expected", TASKS, ids=str)
def test_defaults_by_task(given, expected):
    args = args_of(**given)
    found = (args.steps, args.prompts_per_step, args.samples, args.eval_problems, args.model)
    assert found == expected
    assert args.validation_prompts == args.prompts_per_step


# warmup_steps, warmup_batch, lr, warmup_lr
WARMUPS = [
    ({}, (5, 16, 3e-5, 3e-5)),
    ({"method": "rl"}, (0, 16, 3e-5, 3e-5)),
    ({"method": "sft_then_rl"}, (40, 16, 3e-5, 3e-5)),
    ({"method": "sft_then_rl", "steps": 9, "lr": 1e-3}, (4, 16, 1e-3, 1e-3)),
    ({"lora_r": 2}, (5, 16, 3e-4, 3e-4)),
    ({"task": "virl", "vision": True}, (20, 32, 1e-4, 1e-3)),
    ({"task": "virl", "vision": True, "lora_r": 2}, (20, 32, 1e-4, 1e-3)),
    ({"warmup_steps": 1, "warmup_batch": 3, "lr": 0.1, "warmup_lr": 0.2}, (1, 3, 0.1, 0.2)),
]


@pytest.mark.parametrize("given,expected", WARMUPS, ids=str)
def test_defaults_of_the_warm_up(given, expected):
    args = args_of(**given)
    found = (args.warmup_steps, args.warmup_batch, args.lr, args.warmup_lr)
    assert found == expected


def test_defaults_of_the_other_flags():
    assert args_of(clip_ratio=0.3).clip_ratio_high == 0.3
    assert args_of(clip_ratio=0.3, clip_ratio_high=0.4).clip_ratio_high == 0.4
    assert args_of(validation_prompts=3).validation_prompts == 3
    assert args_of().chord_steps is None
    chord = {"method": "chord", "steps": 50}
    assert args_of(**chord).chord_steps == 50
    assert args_of(**chord, warmup_steps=7, chord_warmup=3).chord_steps == 40
    assert args_of(**chord, warmup_steps=50).chord_steps == 1
    assert args_of(**chord, chord_steps=12).chord_steps == 12


def test_what_may_differ_on_resume():
    """Nothing that changes the mathematics, the seed or the data."""
    assert set(amft.FREE) == {
        "resume", "output_dir", "wandb", "push_to_hub", "save_every", "keep", "eval_every", "show",
        "replicas", "micro_batch", "generation_batch", "activation_checkpointing", "cpu_offload",
        "compile", "dry_run", "merge", "steps", "vllm_eager", "vllm_sleep",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What is refused

# Flags, the values at the ends that are taken, and those just outside
ENDS = [
    ("steps prompts_per_step warmup_batch samples max_new_tokens epochs minibatches mu_every",
     (1, 10**9), (0, 10**9 + 1)),
    ("validation_prompts validation_size eval_problems save_every keep max_length replicas",
     (1, 10**9), (0, 10**9 + 1)),
    ("micro_batch generation_batch chord_steps lr_warmup", (1, 10**9), (0, 10**9 + 1)),
    ("warmup_steps chord_warmup hpt_gate show dynamic_sampling lora_r",
     (0, 10**9), (-1, 10**9 + 1)),
    ("lora_alpha", (1e-9, 1e6), (0, 1e6 + 1)),
    ("eval_every", (-1, 0, 10**9), (-2, 10**9 + 1)),
    ("lr warmup_lr value_lr", (1e-9, 100.0), (0.0, -1.0, 100.1)),
    ("clip clip_ratio clip_ratio_high luffy_gamma",
     (1e-9, 1e300), (0.0, -1.0, math.inf, math.nan)),
    ("entropy_coefficient value_coefficient hpt_sft eta_mu eta_entropy",
     (0.0, 1000.0), (-1e-9, 1000.1)),
    ("weight_decay", (0.0, 10.0), (-1e-9, 10.1)),
    ("mu_init mu_min mu_max gae_lambda turn_gamma chord_start chord_end",
     (0.0, 1.0), (-1e-9, 1.0 + 1e-9)),
    ("betas", ((0.0, 0.999), (0.999, 0.0)), ((0.9, 1.0), (1.0, 0.9), (-0.1, 0.9))),
    ("seed", (-8 * 10**18, 0, 8 * 10**18), (-(10**19), 10**19)),
    ("levels", ((1, -5), (10**18,)), ((1, 10**19), (-(10**19), 1))),
]  # fmt: skip


@pytest.mark.parametrize("names,taken,refused", ENDS, ids=str)
def test_ends_of_the_intervals(names, taken, refused):
    for name in names.split():
        for value in taken:
            check_numbers(replace(amft.Args(), **{name: value}), amft.NUMBERS)
        for value in refused:
            args = replace(amft.Args(), **{name: value})
            with pytest.raises(DataError, match=f"--{name.replace('_', '-')} must be"):
                check_numbers(args, amft.NUMBERS)


def refusal(ranks: int, settings: dict) -> str:
    """What check says; empty where nothing is wrong."""
    try:
        amft.check(args_of(**settings), ranks)
    except DataError as e:
        return str(e)
    return ""


STILL = (
    "nothing moves mu without --eta-mu, the meta-gradient and an entropy term (which --eta-entropy "
    "0.05 gives a weight): --method fixed is that"
)
NO_WEIGHT = (
    "--entropy-sign: the entropy term has no weight here, which --eta-entropy 0.05 or --mu-update "
    "normalised gives it"
)
FOUR = {"prompts_per_step": 4, "validation_prompts": 4, "warmup_batch": 4}
REFUSED = [
    (1, {"no_meta_gradient": True}, STILL),
    (1, {"no_meta_gradient": True, "eta_entropy": 0.1, "no_entropy_term": True}, STILL),
    (1, {"eta_mu": 0.0}, STILL),
    (1, {"entropy_sign": "text"}, NO_WEIGHT),
    (1, {"task": "virl", "levels": (1,)}, "--levels is read beside --task math alone"),
    (1, {"task": "virl", "suits": "red"}, "--suits is read beside --task general_points alone"),
    (1, {"task": "general_points", "routes": "a.json"},
     "--routes is read beside --task virl alone"),
    (1, {"gae_lambda": 0.5}, "--gae-lambda is read beside --advantage gae alone"),
    (1, {"lora_alpha": 8}, "--lora-alpha is read beside --lora-r alone"),
    (3, {"replicas": 2}, "--replicas 2 does not divide the 3 ranks"),
    (2, FOUR | {"prompts_per_step": 3},
     "--prompts-per-step 3 cannot be shared equally by 2 ranks"),
    (2, FOUR | {"validation_prompts": 3},
     "--validation-prompts 3 cannot be shared equally by 2 ranks"),
    (2, FOUR | {"warmup_batch": 3}, "--warmup-batch 3 cannot be shared equally by 2 ranks"),
    (1, {"samples": 1},
     "--samples must be at least 2: a response is judged against the others of its prompt"),
    (1, {"validation_prompts": 1},
     "--validation-prompts must be at least 2, for an estimate of the noise"),
    (1, {"validation_prompts": 17, "validation_size": 16},
     "--validation-prompts 17 are more than --validation-size 16"),
    (1, FOUR | {"method": "rl", "minibatches": 5},
     "--minibatches 5 are more than the 4 prompts of a rank"),
    (2, FOUR | {"method": "rl", "minibatches": 3},
     "--minibatches 3 are more than the 2 prompts of a rank"),
    (1, {"vision": True, "validation_size": 99},
     "--vision is for the games: --task general_points or virl"),
    (1, {"mu_min": 0.6},
     "0 <= --mu-min <= --mu-init <= --mu-max <= 1 is needed, not 0.6, 0.5, 0.95"),
    (1, {"mu_max": 0.4},
     "0 <= --mu-min <= --mu-init <= --mu-max <= 1 is needed, not 0.05, 0.5, 0.4"),
    (1, {"mu_min": 0.0},
     "a learned mu needs both losses: --mu-min above 0 and --mu-max below 1, not 0.0 and 0.95"),
    (1, {"method": "gac", "mu_max": 1.0},
     "a learned mu needs both losses: --mu-min above 0 and --mu-max below 1, not 0.05 and 1.0"),
    (1, {"steps": 4, "warmup_steps": 5}, "--warmup-steps must be between 0 and --steps, not 5"),
    (2, FOUR | {"method": "gac", "prompts_per_step": 2},
     "--method gac compares two halves of a rank's prompts: --prompts-per-step must be at least 4"),
    (1, {"epochs": 2},
     "--method amft takes one optimizer step per rollout: mu is learned from that one step"),
    (1, {"method": "gac", "minibatches": 2},
     "--method gac takes one optimizer step per rollout: mu is learned from that one step"),
    (1, {"method": "srft", "epochs": 2},
     "--method srft: the loss of wrong samples has no lower bound, so --epochs must be 1"),
    (1, {"sft_data": "x", "task": "virl"},
     "--sft-data is for --task math and methods with an SFT loss of its own prompts, not "
     "--task virl --method amft"),
    (1, {"sft_data": "x", "method": "hpt"},
     "--sft-data is for --task math and methods with an SFT loss of its own prompts, not "
     "--task math --method hpt"),
    (1, {"reward": "a:b", "task": "virl"},
     "--reward is for --task math: virl has the reward of its rules"),
    (1, {"task": "chess"}, "--task chess: math, general_points, virl or FILE.py:FUNCTION"),
    (1, {"lora_r": 2, "cpu_offload": True},
     "--lora-r goes with neither --cpu-offload nor --compile"),
    (1, {"lora_r": 2, "compile": True}, "--lora-r goes with neither --cpu-offload nor --compile"),
    (1, {"merge": True}, "--merge is for adapters: give --lora-r"),
    (1, {"method": "hpt", "advantage": "gae"},
     "--method hpt has advantages of its own: leave --advantage at grpo"),
    (1, {"method": "srft", "advantage": "mean"},
     "--method srft has advantages of its own: leave --advantage at grpo"),
    (1, {"method": "sft", "dynamic_sampling": 1},
     "--dynamic-sampling is for samples: --method sft draws none"),
    (1, {"method": "rl", "mu_init": 0.6},
     "--mu-init is read by --method amft, gac, fixed alone, not rl"),
    (1, {"method": "srft", "sft_weight": "phi"},
     "--sft-weight is read by --method amft, gac, fixed, chord, sft, sft_then_rl, hpt alone, "
     "not srft"),
    (1, {"method": "hpt", "clip_ratio_high": 0.3},
     "--clip-ratio-high is read by --method amft, gac, fixed, chord, rl, sft_then_rl, srft alone, "
     "not hpt"),
]  # fmt: skip


@pytest.mark.parametrize("ranks,settings,message", REFUSED, ids=str)
def test_what_is_refused(ranks, settings, message):
    assert refusal(ranks, settings) == message


TAKEN = [
    (1, {}),
    (4, {"replicas": 2}),
    (2, FOUR),
    (1, {"method": "sft", "samples": 1}),
    (1, {"samples": 2, "validation_prompts": 2}),
    (1, {"method": "gac", "validation_prompts": 1}),
    (1, {"validation_prompts": 16, "validation_size": 16}),
    (1, {"task": "virl", "validation_prompts": 65}),
    (1, FOUR | {"method": "rl", "minibatches": 4}),
    (2, FOUR | {"method": "rl", "minibatches": 2, "epochs": 3}),
    (1, {"task": "virl", "vision": True}),
    (1, {"mu_min": 0.5}),
    (1, {"mu_max": 0.5}),
    (1, {"method": "fixed", "mu_min": 0.0, "mu_max": 1.0, "mu_init": 1.0}),
    (1, {"method": "fixed", "mu_min": 0.0, "mu_init": 0.0}),
    (1, {"steps": 5, "warmup_steps": 5}),
    (2, FOUR | {"method": "gac"}),
    (1, FOUR | {"method": "srft", "minibatches": 2}),
    (1, {"sft_data": "x", "method": "fixed"}),
    (1, {"reward": "a:b"}),
    (1, {"task": "own.py:games"}),
    (1, {"lora_r": 2, "merge": True}),
    (1, {"cpu_offload": True, "compile": True}),
    (1, {"method": "rl", "advantage": "gae"}),
    (1, {"method": "chord", "advantage": "mean", "dynamic_sampling": 2}),
    (1, {"method": "luffy", "luffy_gamma": 0.2}),
    (1, {"method": "hpt", "hpt_gate": 2, "hpt_sft": 0.3, "sft_weight": "dft"}),
    (1, {"method": "sft", "sft_weight": "dft"}),
    (1, {"method": "sft_then_rl", "sft_weight": "dft", "clip_ratio_high": 0.3}),
    (1, {"method": "gac", "sft_weight": "dft", "clip_ratio_high": 0.3, "mu_init": 0.4}),
    (1, {"method": "srft", "clip_ratio_high": 0.3}),
]


@pytest.mark.parametrize("ranks,settings", TAKEN, ids=str)
def test_what_is_taken(ranks, settings):
    assert refusal(ranks, settings) == ""


def test_flags_of_one_method():
    """Each is refused with every other one, and none by its own."""
    flags = {
        "chord": {"chord_start": 0.8, "chord_end": 0.1, "chord_steps": 7, "chord_warmup": 2},
        "luffy": {"luffy_gamma": 0.2},
        "hpt": {"hpt_gate": 1, "hpt_sft": 0.5},
        "amft": {
            "meta_preconditioner": "none", "mu_update": "printed", "eta_mu": 0.1,
            "eta_entropy": 0.1, "entropy_sign": "text", "no_meta_gradient": True,
            "no_entropy_term": True,
        },
    }  # fmt: skip
    for owner, values in flags.items():
        for name, value in values.items():
            for method in amft.METHODS:
                moved = {"eta_entropy": 0.05} if method == "amft" else {}
                said = refusal(1, moved | {"method": method, name: value})
                flag = f"--{name.replace('_', '-')}"
                message = f"{flag} is read by --method {owner} alone, not {method}"
                assert said == ("" if method == owner else message)


# --------------------------------------------------------------------------------------------------
# Rows, their weights and their advantages


def tokens_of(**changes) -> Tokens:
    """Two responses, of three and of two tokens."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    values = {
        "logprobs": torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.8, 1.0]])),
        "entropy": torch.tensor([[0.3, 0.6, 0.9], [0.2, 1.0, 0.0]]),
        "values": torch.tensor([[1.0, 3.0, -1.0], [0.5, 0.0, 0.0]]),
        "old": torch.log(torch.tensor([[0.4, 0.4, 0.9], [0.5, 0.5, 1.0]])),
        "advantages": torch.tensor([[2.0, 2.0, 2.0], [-3.0, -3.0, 0.0]]),
        "value_targets": torch.tensor([[0.0, 1.0, 1.0], [1.5, 2.0, 0.0]]),
        "mask": mask,
        "weight": torch.tensor([[0.25], [0.5]]),
        "demonstration": torch.tensor([[False], [False]]),
        "right": torch.tensor([[False], [True]]),
    }
    return Tokens(**values | changes)


def test_entropy_is_no_part_of_srfts_gradient():
    """It weighs the samples and is itself a constant."""
    tokens = tokens_of()
    entropy = tokens.entropy.requires_grad_()
    logprobs = tokens.logprobs.requires_grad_()
    amft.srft_loss(tokens, args_of(method="srft")).sum().backward()
    assert entropy.grad is None
    assert logprobs.grad.abs().sum() > 0


def test_losses_that_mu_does_not_weigh():
    errors = torch.tensor([[0.5, 2.0, 2.0], [0.5, 2.0, 0.0]])  # (V - target)^2 / 2
    entropy = torch.tensor([[0.3, 0.6, 0.9], [0.2, 1.0, 0.0]])
    torch.testing.assert_close(amft.value_loss(tokens_of(), amft.Args()), errors)
    torch.testing.assert_close(amft.entropy_bonus(tokens_of(), amft.Args()), -entropy)
    value, bonus = (amft.value_loss, 0.3), (amft.entropy_bonus, 0.1)
    settings = {"entropy_coefficient": 0.1, "value_coefficient": 0.3}
    assert amft.auxiliary_losses(amft.Args()) == {}
    assert amft.auxiliary_losses(amft.Args(**settings)) == {"bonus": bonus}
    both = amft.auxiliary_losses(amft.Args(advantage="gae", **settings))
    assert both == {"value": value, "bonus": bonus}


def test_loss_of_the_utility():
    expected = [[-2 * math.log(p) for p in (0.5, 0.2, 0.9)], [3 * math.log(p) for p in (0.4, 0.8)]]
    found = amft.utility_loss(tokens_of(), amft.Args())
    assert found[0].tolist() == pytest.approx(expected[0], rel=1e-6)
    assert found[1].tolist() == pytest.approx([*expected[1], 0.0], rel=1e-6)


def test_entropy_of_a_short_response():
    """SRFT's H is the mean over the response's own tokens: 0.6 of both rows."""
    right = torch.tensor([[True], [True]])
    found = amft.srft_loss(tokens_of(right=right), args_of(method="srft"))
    for i, row in enumerate([(0.5, 0.2, 0.9), (0.4, 0.8)]):
        expected = [-0.1 * math.exp(0.6) * math.log(p) for p in row]
        assert found[i, : len(row)].tolist() == pytest.approx(expected, rel=1e-6)


def test_weight_of_a_token():
    """By each method's mean, with all numbers different."""
    n = amft.Counts(own=3, own_tokens=50, shown=2, shown_tokens=70, sft_tokens=11)
    row, shown = row_of(length=5), row_of(length=5, demonstration=True)
    settings = {"max_new_tokens": 9, "prompts_per_step": 12, "samples": 7, "minibatches": 4}
    args = args_of(**settings, hpt_sft=0.3)
    assert amft.token_mean(row, n, args) == 1 / 50
    assert amft.token_mean(row, n, replace(args, loss_aggregation="sequence")) == 1 / 15
    assert amft.luffy_mean(row, n, args) == 1 / 45
    assert amft.srft_mean(row, n, args) == 1 / 50
    assert amft.srft_mean(shown, n, args) == 1 / 70
    assert amft.hpt_mean(row, n, args) == 1 / (3 * 7 * 9)
    assert amft.sft_mean(row, n, args) == 1 / 11
    assert amft.hpt_sft_mean(row, n, args) == pytest.approx(0.3 / 15)
    assert row_of(length=5, prompt=4).length == 9
    assert (row.weight, row.prompt, row.demonstration, row.right) == (0, 0, False, False)


def test_weights_of_rows():
    """srft: own samples and demonstrations apart; truncated rows weigh nothing if asked so."""
    rl = [row_of(3), row_of(4, finished=False), row_of(2), row_of(5, demonstration=True)]
    sft = [row_of(6), row_of(1)]
    assert token_count(rl) == 14
    amft.set_loss_weights(args_of(method="srft"), OneRank(), sft, rl)
    assert [row.weight for row in rl] == [1 / 9, 1 / 9, 1 / 9, 1 / 5]
    assert [row.weight for row in sft] == [1 / 7, 1 / 7]
    for row in rl:
        row.weight = 0.0
    amft.set_loss_weights(args_of(method="srft", mask_truncated=True), OneRank(), sft, rl)
    assert [row.weight for row in rl] == [1 / 5, 0.0, 1 / 5, 1 / 5]
    luffy = args_of(method="luffy", mask_truncated=True, max_new_tokens=10)
    amft.set_loss_weights(luffy, OneRank(), [], rl)
    assert [row.weight for row in rl] == [1 / 30, 0.0, 1 / 30, 1 / 30]
    hpt = args_of(method="hpt", prompts_per_step=4, samples=5, max_new_tokens=10, hpt_sft=0.3)
    amft.set_loss_weights(hpt, OneRank(), sft, rl)
    assert [row.weight for row in rl] == [1 / 200] * 4
    assert [row.weight for row in sft] == pytest.approx([0.3 / 24, 0.3 / 4])


def test_counts_are_of_all_ranks():
    """Of two ranks with the same rows: half the weight."""
    world = types.SimpleNamespace(sum=lambda *values: [2 * v for v in values])
    rl, sft = [row_of(3), row_of(5)], [row_of(4)]
    amft.set_loss_weights(args_of(method="fixed"), world, sft, rl)
    assert [row.weight for row in rl + sft] == [1 / 16, 1 / 16, 1 / 8]


def test_advantages_of_few():
    for baseline in ("grpo", "mean", "leave_one_out"):
        assert amft.group_advantages([], baseline) == []
        assert amft.group_advantages([5.0], baseline) == [0.0]
    assert amft.group_advantages([5.0, 1.0], "mean") == [2, -2]
    assert amft.group_advantages([5.0, 1.0], "leave_one_out") == [4, -4]
    unit = 2 / (math.sqrt(8) + 1e-4)
    assert amft.group_advantages([5.0, 1.0], "grpo") == pytest.approx([unit, -unit])
    assert amft.gae([0.25], 1.0, 0.5) == [0.75]
    assert amft.gae([], 1.0, 0.5) == []


def test_mu_of_every_method():
    """At step 3 of 10, after two of warm-up."""
    settings = {"steps": 10, "warmup_steps": 2}
    controller = types.SimpleNamespace(mu=0.3)
    found = {}
    for name, method in amft.METHODS.items():
        args = args_of(method=name, mu_init=0.7, **settings)
        found[name] = method.mu(args, 3, controller)
    cosine = 0.05 + 0.85 * (1 + math.cos(math.pi / 8)) / 2
    nothing = dict.fromkeys(("rl", "sft_then_rl", "luffy", "srft", "hpt"), 0.0)
    learned = {"amft": 0.3, "gac": 0.3}
    assert found.pop("chord") == pytest.approx(cosine)
    assert found == nothing | learned | {"sft": 1.0, "fixed": 0.7}


def test_table_of_methods():
    """What each does with samples and demonstrations; whose mu is learned."""
    methods = amft.METHODS
    assert [m for m in methods if methods[m].weight_of_sft(0.3) == 1] == ["hpt"]
    assert {methods[m].weight_of_sft(0.3) for m in methods} == {0.3, 1.0}
    assert [m for m in methods if methods[m].fresh_optimizer] == ["sft_then_rl"]
    assert [m for m in methods if methods[m].learns_without_advantage] == ["srft"]
    learned = {m: methods[m].learns_mu for m in methods if methods[m].learns_mu != "no"}
    assert learned == {"amft": "by_reward", "gac": "by_noise"}
    shown = {m: methods[m].demonstrations for m in methods if methods[m].demonstrations != "sft"}
    assert shown == {
        "luffy": "replaces_sample",
        "srft": "beside_samples",
        "hpt": "replaces_unsolved",
    }
    assert [m for m in methods if methods[m].baseline == "mean"] == ["luffy", "hpt"]


def episode(*rewards: float, won: bool = False, length: int = 2) -> Trajectory:
    """Its turns are one token longer each time."""
    turns = [turn_of(r, length=length + i) for i, r in enumerate(rewards)]
    return Trajectory(turns, won)


# Two prompts: the first with two samples of two and one turns, of which one is won
GROUPS = [
    [episode(-1.0, 2.0, won=True), episode(0.0, length=6)],
    [episode(0.0), episode(0.0)],
]


def shown_of_prompts() -> list[Trajectory]:
    return [episode(1.0, won=True, length=9), episode(1.0, 1.0, won=True, length=10)]


def summary(rows: list[Row]) -> list[tuple]:
    """(prompt, tokens, reward to go, demonstration, right) of rows, whose advantages must be one a
    token, and all the same."""
    found = []
    for row in rows:
        assert len(row.advantages) == len(row.turn.ids)
        assert len(set(row.advantages)) == 1
        assert row.weight == 0
        found.append(
            (row.prompt, len(row.turn.ids), row.reward_to_go, row.demonstration, row.right)
        )
    return found


# With --turn-gamma 0.5
OWN_ROWS = [
    (0, 2, 0.0, False, False),
    (0, 3, 2.0, False, True),
    (0, 6, 0.0, False, False),
    (1, 2, 0.0, False, False),
    (1, 2, 0.0, False, False),
]
SHOWN_ROWS = [
    (0, 9, 1.0, True, True),
    (1, 10, 1.5, True, True),
    (1, 11, 1.0, True, True),
]


def rows_by(method: str, groups=GROUPS, **settings) -> tuple:
    args = args_of(method=method, turn_gamma=0.5, **settings)
    return amft.rows_of(args, groups, shown_of_prompts())


def advantages_in(rows: list[Row]) -> list[float]:
    return [row.advantages[0] for row in rows]


def test_rows_of_methods_with_an_sft_loss():
    sft, rl = rows_by("fixed")
    assert summary(sft) == SHOWN_ROWS
    assert summary(rl) == OWN_ROWS
    std = math.sqrt(4 / 3) + 1e-4  # of 0, 2, 0
    expected = [-2 / 3 / std, 4 / 3 / std, -2 / 3 / std, 0, 0]
    assert advantages_in(rl) == pytest.approx(expected)
    assert advantages_in(sft) == [0, 0, 0]
    _, rl = rows_by("fixed", advantage="mean")
    assert advantages_in(rl) == pytest.approx([-2 / 3, 4 / 3, -2 / 3, 0, 0])


@pytest.mark.parametrize("method", ["amft", "luffy", "srft", "hpt"])
def test_rows_of_the_warm_up(method):
    """Without samples every demonstration is a row of L_SFT, and nothing is one of L_RL."""
    sft, rl = rows_by(method, groups=[])
    assert summary(sft) == SHOWN_ROWS
    assert rl == []


@pytest.mark.parametrize("method", ["luffy", "srft"])
def test_rows_of_demonstrations_in_the_rl_loss(method):
    sft, rl = rows_by(method)
    assert sft == []
    assert summary(rl) == OWN_ROWS[:3] + SHOWN_ROWS[:1] + OWN_ROWS[3:] + SHOWN_ROWS[1:]
    centred = [-0.75, 1.25, -0.75, 0.25, -0.625, -0.625, 0.875, 0.375]
    if method == "luffy":
        assert advantages_in(rl) == pytest.approx(centred)
        return
    for place, scale in ((slice(0, 4), 2.75), (slice(4, 8), 1.6875)):  # sums of squares
        std = math.sqrt(scale / 3) + 1e-4
        expected = [a / std for a in centred[place]]
        assert advantages_in(rl[place]) == pytest.approx(expected)


def test_rows_of_unsolved_prompts():
    """hpt: a prompt with at most --hpt-gate won samples has its demonstration instead of them."""
    sft, rl = rows_by("hpt")
    assert summary(sft) == SHOWN_ROWS[1:]
    assert summary(rl) == OWN_ROWS[:3]
    assert advantages_in(rl) == pytest.approx([-2 / 3, 4 / 3, -2 / 3])
    sft, rl = rows_by("hpt", hpt_gate=1)
    assert summary(sft) == SHOWN_ROWS
    assert rl == []
    solved = [[episode(1.0, won=True)] * 2, GROUPS[0]]
    sft, rl = rows_by("hpt", groups=solved, hpt_gate=1)
    assert [row.prompt for row in sft] == [1, 1]
    assert [row.prompt for row in rl] == [0, 0]
    sft, rl = rows_by("fixed", hpt_gate=0, groups=[GROUPS[1], GROUPS[1]])
    assert len(sft) == 3
    assert len(rl) == 4


def test_batch_of_rows():
    """Each token at the place from which it is predicted; 32 tokens fit into 32, 33 need 64."""
    first = Row(
        Turn([11, 12, 13], [21, 22], [-0.5, -1.5], True, "", 1.0),
        [0.25, 0.75],
        weight=0.125,
        right=True,
        value_targets=[2.0, 3.0],
    )
    second = Row(
        Turn([14], [23, 24, 25], [0.0, 0.0, -2.0], True, "", 0.0),
        [-1.0, -2.0, -3.0],
        weight=0.5,
        demonstration=True,
    )
    batch = collate_rows([first, second], 9, CPU)
    assert batch.pop("inputs") == {}
    ids = [[11, 12, 13, 21, 22], [14, 23, 24, 25]]
    mask, old, advantages, targets = (torch.zeros(2, 31) for _ in range(4))
    mask[0, 2:4] = mask[1, 0:3] = 1
    old[0, 2:4] = torch.tensor([-0.5, -1.5])
    old[1, 2] = -2.0
    advantages[0, 2:4] = torch.tensor([0.25, 0.75])
    advantages[1, :3] = torch.tensor([-1.0, -2.0, -3.0])
    targets[0, 2:4] = torch.tensor([2.0, 3.0])
    expected = {
        "ids": torch.tensor([row + [9] * (32 - len(row)) for row in ids]),
        "mask": mask.bool(),
        "old": old,
        "advantages": advantages,
        "value_targets": targets,
        "weight": torch.tensor([[0.125], [0.5]]),
        "demonstration": torch.tensor([[False], [True]]),
        "right": torch.tensor([[True], [False]]),
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name
    first.importance = [0.5, 2.0]  # of an engine's sample, beside a demonstration
    importance = torch.ones(2, 31)
    importance[0, 2:4] = torch.tensor([0.5, 2.0])
    assert torch.equal(collate_rows([first, second], 9, CPU)["importance"], importance)
    for length, padded in ((30, 32), (31, 64)):
        assert collate_rows([row_of(length)], 0, CPU)["ids"].shape == (1, padded)


# --------------------------------------------------------------------------------------------------
# Passes

EVEN, ODD, SILENT = (row_of(prompt=n, weight=0.5) for n in (1, 2, 3))
EVEN.prompt, ODD.prompt = 4, 3
EVEN.advantages, ODD.advantages = [1.0, 0.0, 0.0], [-1.0, -1.0, -1.0]
SFT_ROWS, LEARNING, RL_ROWS = [EVEN, ODD], [ODD, EVEN, EVEN], [ODD, SILENT, EVEN, EVEN]


def passes_by(method: str, D=None, halves=None, mu: float = 0.25, **settings) -> list[tuple]:
    args = args_of(method=method, **settings)
    found = amft.passes_of(args, mu, SFT_ROWS, RL_ROWS, "G", D, halves)
    return [(work.rows, work.losses, work.targets) for work in found]


def test_passes_of_a_step():
    """G = (1 - mu) g_RL + mu g_SFT + g_aux."""
    sft = (SFT_ROWS, {"sft": (amft.sft_loss, 0.25)}, [("G", 1.0)])
    losses = {"rl": (amft.ppo_loss, 0.75)}
    assert passes_by("fixed") == [
        sft,
        (LEARNING, losses, [("G", 1.0)]),
        ([SILENT], losses, []),  # is only measured
    ]
    for settings in ({"entropy_coefficient": 0.01}, {"advantage": "gae"}):
        beside = losses | amft.auxiliary_losses(amft.Args(**settings))
        together = (RL_ROWS, beside, [("G", 1.0)])
        assert passes_by("fixed", **settings) == [sft, together, ([], beside, [])]
    sft = (SFT_ROWS, {"sft": (amft.sft_loss, 1.0)}, [("G", 1.0)])
    losses = {"rl": (amft.reinforce_loss, 1.0)}
    rl = (LEARNING, losses, [("G", 1.0)])
    assert passes_by("hpt", mu=0.0) == [sft, rl, ([SILENT], losses, [])]


def test_passes_of_a_step_that_is_differentiated():
    """And D = g_SFT - g_RL; halves: of even prompts less those of odd ones."""
    sft_loss, rl_loss = {"sft": (amft.sft_loss, 1.0)}, {"rl": (amft.ppo_loss, 1.0)}
    sft_targets, rl_targets = [("D", 1.0), ("G", 0.25)], [("D", -1.0), ("G", 0.75)]
    silent = ([SILENT], rl_loss, [])
    passes = [(SFT_ROWS, sft_loss, sft_targets), (LEARNING, rl_loss, rl_targets), silent]
    assert passes_by("amft", "D") == passes
    auxiliary = (RL_ROWS, {"bonus": (amft.entropy_bonus, 0.01)}, [("G", 1.0)])
    assert passes_by("amft", "D", entropy_coefficient=0.01) == [*passes, auxiliary]
    found = passes_by("gac", "D", ("hs", "hr"), entropy_coefficient=0.01)
    assert found == [
        ([EVEN], sft_loss, [*sft_targets, ("hs", 1.0)]),
        ([ODD], sft_loss, [*sft_targets, ("hs", -1.0)]),
        ([EVEN, EVEN], rl_loss, [*rl_targets, ("hr", 1.0)]),
        ([ODD], rl_loss, [*rl_targets, ("hr", -1.0)]),
        silent,
        auxiliary,
    ]


def test_gradients_go_to_all_targets():
    a, b = [torch.zeros(2), torch.ones(2)], [torch.zeros(2), torch.zeros(2)]
    add_to_targets([(a, 2.0), (b, -0.5)], 1, torch.tensor([3.0, -4.0]))
    assert [x.tolist() for x in a] == [[0, 0], [7, -7]]
    assert [x.tolist() for x in b] == [[0, 0], [-1.5, 2]]


# --------------------------------------------------------------------------------------------------
# What the learner measures


def measured(tokens: Tokens, clip_ratio: float = 0.2) -> dict:
    learner = types.SimpleNamespace(args=amft.Args(clip_ratio=clip_ratio))
    sums = dict.fromkeys(("entropy", "tokens", "clipped", "kl"), 10.0)
    PolicyLearner.measure(learner, tokens, sums)
    return {name: value - 10 for name, value in sums.items()}


def test_what_is_measured_of_samples():
    """Ratios 1.25, 0.5, 1 and 0.8, 1.6; the mean of ratio - 1 - log ratio is that of the KL."""
    kl = [r - 1 - math.log(r) for r in (1.25, 0.5, 1.0, 0.8, 1.6)]
    expected = {"entropy": 3.0, "tokens": 5, "clipped": 3, "kl": sum(kl)}
    assert measured(tokens_of(), 0.23) == pytest.approx(expected, rel=1e-5)
    assert measured(tokens_of(), 0.55)["clipped"] == 1
    first = {"entropy": 1.8, "tokens": 3, "clipped": 2, "kl": sum(kl[:3])}
    shown = torch.tensor([[False], [True]])
    assert measured(tokens_of(demonstration=shown)) == pytest.approx(first, rel=1e-5)
    masked = torch.tensor([[0.25], [0.0]])
    assert measured(tokens_of(weight=masked)) == pytest.approx(first, rel=1e-5)


def test_sums_with_the_tokens_weights():
    """0.25 (1 + 0 + 1) and 0.5 (1 + 1): the second row has two tokens; then an engine's samples."""
    loss = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 100.0]])
    assert tokens_of().weighted_sum(loss).item() == 1.5
    importance = torch.tensor([[4.0, 1.0, 1.0], [0.5, 1.0, 1.0]])
    assert tokens_of(importance=importance).weighted_sum(loss).item() == 2.0


def test_rows_without_a_gradient():
    rows = [row_of(2, weight=w) for w in (0.5, 0.5, 0.0, 0.0)]
    rows[0].advantages = [0.0, -1.0]
    rows[2].advantages = [1.0, 1.0]
    for method, learning in (("rl", [0]), ("srft", [0, 1])):
        found, silent = amft.split_silent(rows, amft.METHODS[method])
        assert [rows.index(row) for row in found] == learning
        assert [rows.index(row) for row in silent] == [i for i in range(4) if i not in learning]


def test_micro_batches(monkeypatch):
    """By length, as many as the rank with most rows has: fillers weigh nothing."""
    learner = PolicyLearner.__new__(PolicyLearner)
    learner.args, learner.world, learner.pad_id = amft.Args(micro_batch=2), OneRank(), 0
    learner.filler = Turn([8, 8], [8, 8, 8], [0.0] * 3, True, "", 0.0)
    rows = [row_of(length, weight=0.5) for length in (7, 2, 5, 3, 6)]
    others, asked = [0], []

    def all_reduce(count, how):
        asked.append((int(count), how))
        count.fill_(max(int(count), others[0]))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for others[0], fillers in ((0, 0), (3, 0), (5, 2)):
        batches = learner.batches(rows)
        lengths = [batch["mask"].sum(1).tolist() for batch in batches]
        assert lengths == [[2, 3], [5, 6], [7]] + [[3]] * fillers
        for batch in batches[3:]:
            assert batch["weight"].tolist() == [[0.0]]
            assert batch["ids"][0, :5].tolist() == [8] * 5
            assert batch["advantages"].abs().sum() == 0
    assert asked == [(3, torch.distributed.ReduceOp.MAX)] * 3
    others[0] = 0
    assert learner.batches([]) == []
    assert len(learner.batches(rows[:4])) == 2


def test_value_estimates_that_are_all_right():
    """Advantages that are all the same become 0, not nan."""
    learner = PolicyLearner.__new__(PolicyLearner)
    learner.args, learner.world = amft.Args(micro_batch=2, gae_lambda=1.0), OneRank()
    rows = [row_of(length, reward_to_go=1.0) for length in (3, 1, 2)]
    learner.batches = lambda rows: [None, None]
    one, two, three = ([True] * n + [False] * (3 - n) for n in (1, 2, 3))
    masks = [[one, two], [three, one]]  # the last row is a filler

    def forward(batch):
        mask = torch.tensor(masks.pop(0))
        return types.SimpleNamespace(values=torch.full(mask.shape, 0.25), mask=mask)

    learner.forward = forward
    amft.estimate_advantages(learner, rows)
    assert [row.value_targets for row in rows] == [[1.0] * 3, [1.0], [1.0] * 2]
    assert [row.advantages for row in rows] == [[0.0] * 3, [0.0], [0.0] * 2]


def test_trained_weights_by_name():
    """All that has a gradient; with adapters these, and what stands beside the frozen model."""
    policy = Policy(small_llama(torch.float32), True)
    names = [name for name, _ in policy.named_parameters()]
    assert [name for name, _ in trained_weights(policy)] == names
    policy.lm.model.layers[0].requires_grad_(False)
    kept = [name for name in names if ".layers.0." not in name]
    assert [name for name, _ in trained_weights(policy)] == kept
    policy.lm.requires_grad_(False)
    phi = [torch.zeros(2), torch.ones(3)]
    policy.adapters = types.SimpleNamespace(phi=phi)
    found = dict(trained_weights(policy))
    assert list(found) == ["phi.0", "phi.1", "value.weight", "value.bias"]
    assert found["phi.0"] is phi[0]
    assert found["phi.1"] is phi[1]


def test_optimizer():
    settings = {"lr": 0.25, "value_lr": 0.5, "betas": (0.8, 0.7), "weight_decay": 0.3}
    for value_head in (True, False):
        policy = Policy(small_llama(torch.float32), value_head)
        optimizer = adamw(args_of(**settings), policy)
        groups = optimizer.param_groups
        rates = [(group["lr"], group["peak"]) for group in groups]
        assert rates == [(0.25, 0.25), (0.5, 0.5)][: len(groups)]
        for group in groups:
            assert group["betas"] == (0.8, 0.7)
            assert group["weight_decay"] == 0.3
            assert group["fused"]
        assert len(groups) == (2 if value_head else 1)
        first = {id(p) for p in groups[0]["params"]}
        assert first == {id(p) for p in policy.lm.parameters()}
        if value_head:
            second = {id(p) for p in groups[1]["params"]}
            assert second == {id(p) for p in policy.value.parameters()}


# --------------------------------------------------------------------------------------------------
# The derivative of a step


def stepped(G: list, eps: float, rates=(0.5,), steps: int = 1) -> tuple:
    """(AdamW with a parameter for each rate after steps along G, its parameters)."""
    params = [torch.nn.Parameter(torch.ones(len(G[0]), dtype=torch.float64)) for _ in rates]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.75), eps=eps, weight_decay=0.1)
    for _ in range(steps):
        for p, g in zip(params, G, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer, params


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_derivative_of_the_first_step():
    """theta - alpha g / (|g| + eps): by g it is -alpha eps / (|g| + eps)^2; -alpha / eps at 0."""
    G, D = [numbers(3.0, -1.0, 0.0)] * 2, [numbers(2.0, 5.0, 7.0), numbers(-1.0, 1.0, 1.0)]
    optimizer, params = stepped(G, eps=0.5, rates=(0.25, 2.0))
    expected = []
    for d, lr in zip(D, (0.25, 2.0), strict=True):
        slopes = numbers(0.5 / 3.5**2, 0.5 / 1.5**2, 1 / 0.5)
        expected.append(-lr * slopes * d)
    found = [d.clone() for d in D]
    amft.step_derivative(optimizer, params, G, found, 4.0, 1.0, 5.0, "adam")
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    found = [d.clone() for d in D]
    amft.step_derivative(optimizer, params, G, found, 4.0, 1.0, 5.0, "none")
    for got, d, lr in zip(found, D, (0.25, 2.0), strict=True):
        torch.testing.assert_close(got, -lr * d)


@pytest.mark.parametrize("clip,steps", [(9.0, 3), (2.0, 1), (2.0, 3)])
def test_derivative_of_a_later_step(clip, steps):
    """Against the difference of AdamW's own steps, clipped or not, after others along 3 c G."""
    g, d = numbers(3.0, -4.0), numbers(1.0, 2.0)

    def after(mu: float) -> torch.Tensor:
        G = g + mu * d
        G = G * min(1.0, clip / G.norm().item())
        optimizer, params = stepped([g * 0.3], eps=0.2, steps=steps - 1)
        params[0].grad = G
        optimizer.step()
        return params[0].detach(), optimizer, params

    h = 1e-6
    expected = (after(h)[0] - after(-h)[0]) / (2 * h)
    _, optimizer, params = after(0.0)
    found = [d.clone()]
    amft.step_derivative(optimizer, params, [g], found, 5.0, -5.0, clip, "adam")
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-9)


def test_derivative_without_a_gradient():
    """|G| = 0 is not clipped, and divides nothing."""
    optimizer, params = stepped([numbers(0.0, 0.0)], eps=0.5)
    found = [numbers(1.0, -2.0)]
    amft.step_derivative(optimizer, params, [numbers(0.0, 0.0)], found, 0.0, 0.0, 1.0, "adam")
    torch.testing.assert_close(found[0], numbers(-1.0, 2.0))


def test_when_a_step_depends_on_mu():
    depends = amft.depends_on_mu
    assert not depends(2.0, 0.0, 0.0, 1.0, "adam")
    assert not depends(2.0, 0.0, 0.0, 1.0, "none")
    assert not depends(2.0, 6.0, 9.0, 1.0, "adam")  # parallel
    assert not depends(2.0, -6.0, 9.0, 1.0, "adam")
    assert depends(2.0, 6.0, 9.0, 1.0, "none")
    assert depends(2.0, 6.0, 9.0, 2.0, "adam")  # not clipped
    assert depends(2.0, 6.0, 9.0, 3.0, "adam")
    assert depends(2.0, 0.0, 9.0, 1.0, "adam")
    # sin^2 of the angle 2e-10 or 0.5e-10, of vectors long and short
    for norm, size in ((2.0, 3.0), (200.0, 0.03)):
        for sine_squared, expected in ((2e-10, True), (0.5e-10, False)):
            product = norm * size * math.sqrt(1 - sine_squared)
            assert depends(norm, product, size**2, 0.1, "adam") == expected


# --------------------------------------------------------------------------------------------------
# The controller of mu


def changes(by_gradient: float, by_entropy: float) -> dict:
    return {"mu_change/meta_gradient": by_gradient, "mu_change/entropy": by_entropy}


def test_controller_at_the_start():
    for update, rates in (
        ("normalised", (0.05, 0.05, 10)),
        ("shrunken", (0.2, 0.0, 2)),
        ("printed", (1e-4, 5e-4, 10)),
    ):
        controller = amft.Controller(amft.Args(mu_update=update, mu_init=0.4))
        found = (controller.eta_mu, controller.eta_entropy, controller.first_steps)
        assert found == rates
        given = amft.Controller(amft.Args(mu_update=update, eta_mu=0.0, eta_entropy=0.7))
        assert (given.eta_mu, given.eta_entropy) == (0.0, 0.7)
    assert controller.state == {
        "mu": 0.4, "squares": [], "window": {}, "noise": {}, "entropy_target": None,
        "optimizer_steps": 0,
    }  # fmt: skip


def test_every_change_of_mu_is_told():
    """Both terms at once, with each --mu-update; the first gradient's SNR is 4 / 5 x 1 here."""
    printed = controller_of(mu_update="printed", eta_mu=0.01, eta_entropy=0.1)
    # SNR of one estimate: noise^2 is (1.5^2 + 4) / 2 with the one more, so 2 / 1.7678
    snr = 2 / math.sqrt((2.25 + 4) / 2)
    found = printed.move(3, 2.0, 0.3, noise=1.5)
    assert found == pytest.approx({"grad_mu_snr_window": snr} | changes(0.02, 0.02))
    assert printed.mu == pytest.approx(0.54)
    assert printed.state["squares"] == [4.0]
    settings = {"eta_entropy": 0.05, "entropy_sign": "text", "mu_every": 3}
    shrunken = controller_of(mu_update="shrunken", **settings)
    found = shrunken.move(3, 2.0, 0.3, noise=1.5)
    by_gradient = 0.2 * snr**2 / (1 + snr**2)
    expected = {"grad_mu_snr_window": snr} | changes(by_gradient, -0.05 * 0.2)
    assert found == pytest.approx(expected)
    assert shrunken.mu == pytest.approx(0.5 + by_gradient - 0.01)
    normalised = controller_of(mu_every=3)
    for gradient in (0.0, None):  # says nothing, and does not count
        assert normalised.move(3, gradient, 0.3) == pytest.approx(changes(0.0, 0.01))
    assert normalised.state["squares"] == []
    assert normalised.state["window"] == {}
    assert normalised.move(4, None, 0.3) == changes(0.0, 0.0)


def test_the_window_of_the_shrunken_update():
    """Two gradients, 2 and then -1: weights 0.7 and 1 on their sum 1.7."""
    controller = controller_of(mu_update="shrunken", no_entropy_term=True)
    controller.move(1, 2.0, 0.5, noise=1.5)
    before = controller.mu
    found = controller.move(2, -1.0, 0.5, noise=0.5)
    mean = (0.7 * 2 - 1) / 1.7
    square = (0.7 * 4 + 1) / 1.7
    noise = (0.7 * 2.25 + 0.25) / 1.7
    n = 1.7**2 / (0.7**2 + 1)  # independent numbers with the variance of the mean
    variance = (n * noise + square) / (n + 1)
    snr = mean / math.sqrt(variance / n)
    by_gradient = 0.2 * snr**2 / (1 + snr**2) * mean / math.sqrt(square)
    assert found == pytest.approx({"grad_mu_snr_window": snr} | changes(by_gradient, 0.0))
    assert controller.mu == pytest.approx(before + by_gradient)


def test_the_normalised_update_is_bounded():
    for sign in (1, -1):
        controller = controller_of(no_entropy_term=True)
        for _ in range(2):
            assert controller.move(1, 1.0, 0.5)["mu_change/meta_gradient"] == 0
        found = controller.move(1, 2.5 * sign, 0.5)["mu_change/meta_gradient"]
        assert found == pytest.approx(0.05 * 2.5 * sign)
        found = controller.move(1, 100.0 * sign, 0.5)["mu_change/meta_gradient"]
        assert found == pytest.approx(0.15 * sign)


def test_gradients_that_are_not_finite():
    """Move nothing and are forgotten."""
    for update in ("normalised", "shrunken", "printed"):
        for grad_mu, noise in ((math.nan, 0.1), (math.inf, 0.1), (-1e200, 0.1), (1.0, math.nan)):
            controller = controller_of(mu_update=update, no_entropy_term=True)
            controller.move(1, grad_mu, 0.5, noise)
            assert (controller.mu, controller.state["squares"]) == (0.5, [])
            assert controller.state["window"] == {}


def test_gradients_that_are_next_to_nothing():
    """Their squares are 0 in floating point."""
    for update in ("normalised", "shrunken", "printed"):
        controller = controller_of(mu_update=update, no_entropy_term=True)
        for step in range(3):
            controller.move(step, 1e-200, 0.5)
        assert controller.mu == pytest.approx(0.5, abs=1e-9)


def test_bounds_of_mu():
    controller = controller_of(mu_update="printed", mu_min=0.2, mu_max=0.7, eta_mu=1.0)
    controller.move(1, 0.1, 0.5)
    assert controller.mu == pytest.approx(0.6)
    controller.move(2, 0.2, 0.5)
    assert controller.mu == 0.7
    controller.move(3, -0.9, 0.5)
    assert controller.mu == 0.2


def test_steps_of_gac():
    """To s_RL / (s_RL + s_SFT + disagreement) of the running means, by at most 0.05."""
    controller = amft.Controller(amft.Args(method="gac", mu_init=0.5), "by_noise")
    first = {"variance/rl": 6.0, "variance/sft": 1.0, "disagreement": 5.0}
    assert controller.balance(first) == pytest.approx(first)
    assert controller.mu == pytest.approx(0.5)  # 6 / 12
    second = {"variance/rl": 10.0, "variance/sft": 3.0, "disagreement": 5.0}
    means = {
        "variance/rl": (0.9 * 6 + 10) / 1.9,
        "variance/sft": (0.9 + 3) / 1.9,
        "disagreement": 5.0,
    }
    assert controller.balance(second) == pytest.approx(means)
    best = means["variance/rl"] / sum(means.values())
    assert 0 < best - 0.5 < 0.05
    assert controller.mu == pytest.approx(best)
    for noise, expected in (
        ({"variance/rl": 1e9, "variance/sft": 0.0, "disagreement": 0.0}, best + 0.05),
        ({"variance/rl": 0.0, "variance/sft": 1e12, "disagreement": 0.0}, best),
    ):
        controller.balance(noise)
        assert controller.mu == pytest.approx(expected)
    silent = amft.Controller(amft.Args(method="gac"), "by_noise")
    silent.balance(dict.fromkeys(first, 0.0))
    assert silent.mu == pytest.approx(0.45)


def test_whose_gradients_are_needed():
    """gac: of every step after the warm-up, from the first on; no H* but for amft."""
    args = args_of(method="gac", warmup_steps=2, mu_every=3)
    controller = amft.Controller(args, "by_noise")
    assert [controller.gradient_due(step) for step in range(4)] == [False, False, True, True]
    assert not controller.wants_target(2)
    controller.state["entropy_target"] = 0.5
    assert not controller.moves(2)
    assert not amft.Controller(args, "no").wants_target(2)
    assert not amft.Controller(args, "no").gradient_due(5)


# --------------------------------------------------------------------------------------------------
# Before the weights are read


class Recorder:
    """A function that keeps how it was called, and gives back what it is told to."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.answer


def test_task_of_problems(monkeypatch):
    tests = {"one": [0] * 3, "two": [0] * 5}
    problems = Recorder(("train", "validation", tests, "9 problems"))
    shown = Recorder([0] * 7)
    monkeypatch.setattr(amft, "load_problems", problems)
    monkeypatch.setattr(amft, "load_demonstrations", shown)
    options = {
        "max_length": 99, "subjects": ("a",), "levels": (2,), "seed": 5, "suffix": "s",
        "reward": "f.py:g",
    }  # fmt: skip
    args = args_of(data="d", validation_size=11, eval_problems=13, **options)
    counted = {"one": ([0] * 3, 3), "two": ([0] * 5, 5)}
    expected = ("train", "train", "validation", counted, "9 problems")
    assert amft.load_task(args, "tokenizer") == expected
    given = {"validation": 11, "test": 13} | options
    assert problems.calls == [(("d", "tokenizer"), given)]
    assert shown.calls == []
    found = amft.load_task(replace(args, sft_data="x"), "tokenizer")
    report = "9 problems; 7 demonstrations of other problems"
    assert found == ("train", [0] * 7, "validation", counted, report)
    assert shown.calls == [(("x", "tokenizer", tests, 99, "s"), {})]


def test_task_of_games(monkeypatch):
    games = Recorder(("train", "validation", {"a": "game a", "b": "game b"}))
    own = Recorder(games)
    monkeypatch.setattr(amft, "games_of", games)
    monkeypatch.setattr(amft, "own_function", own)
    tests = {"a": ("game a", 13), "b": ("game b", 13)}
    options = {
        "rule": "11_12_13", "suits": "red", "actions": "relative", "vision": True, "routes": "r",
        "test_routes": "t",
    }  # fmt: skip
    for full_prompts in (False, True):
        args = args_of(task="virl", full_prompts=full_prompts, eval_problems=13, **options)
        expected = ("train", "train", "validation", tests, "virl: episodes without end")
        assert amft.load_task(args, None) == expected
        assert games.calls.pop() == (("virl",), options | {"compact": not full_prompts})
    args = args_of(task="f.py:g", eval_problems=13)
    expected = ("train", "train", "validation", tests, "f.py:g: episodes without end")
    assert amft.load_task(args, None) == expected
    assert own.calls == [(("f.py:g", "--task"), {})]
    assert games.calls == [((), {})]


def test_the_longest_row(monkeypatch):
    """Of 32 demonstrations, of which a response may be shorter than the longest sample."""
    lengths = {seed: [(4, 3), (5, 2)] for seed in range(40)} | {31: [(6, 1), (2, 9)]}
    seen = []

    def demonstrate(tokenizer, game, seed, processor):
        seen.append((tokenizer, game, seed, processor))
        turns = [turn_of(0.0, prompt, length) for prompt, length in lengths[seed]]
        return Trajectory(turns)

    monkeypatch.setattr(amft, "demonstrate", demonstrate)
    config = small_llama().config
    for most, longest in ((4, 11), (5, 11), (6, 12), (90, 96)):
        args = args_of(max_new_tokens=most)
        assert amft.longest_row(args, config, "t", "p", "game") == longest
    assert seen == [("t", "game", seed, "p") for seed in range(32)] * 4
    config.max_position_embeddings = 96
    assert amft.longest_row(args, config, "t", "p", "game") == 96
    config.max_position_embeddings = 95
    message = "rows of up to 96 tokens, but the model has 95 positions: lower --max-new-tokens or"
    with pytest.raises(ModelError, match=message):
        amft.longest_row(args, config, "t", "p", "game")


def test_what_is_known_without_weights(monkeypatch, capsys):
    """The report is said; the longest row is the training game's; targets are those of adapters."""
    task = "train", "shown", "validation", "tests", "9 problems"
    readers = Recorder(("config", "tokenizer", "processor"))
    loaded, longest, targets = Recorder(task), Recorder(77), Recorder(None)
    monkeypatch.setattr(amft, "load_readers", readers)
    monkeypatch.setattr(amft, "load_task", loaded)
    monkeypatch.setattr(amft, "longest_row", longest)
    monkeypatch.setattr(amft, "skeleton", lambda config, trust_remote_code: "base")
    monkeypatch.setattr(amft, "check_targets", targets)
    args = args_of(model="m", target_modules=("a",))
    assert amft.prepare(args, World(CPU)) == (readers.answer, list(task[:4]), 77)
    assert capsys.readouterr().out == "9 problems\n"
    assert readers.calls == [(("m", False, False), {})]
    assert loaded.calls == [((args, "tokenizer"), {})]
    assert longest.calls == [((args, "config", "tokenizer", "processor", "train"), {})]
    assert targets.calls == []
    amft.prepare(replace(args, lora_r=1), World(CPU))
    assert targets.calls == [(("base", ("a",)), {})]


def test_dry_run_counts_responses_and_checkpoints(monkeypatch, capsys):
    args = args_of(prompts_per_step=6, samples=3, steps=100, save_every=40, keep=9)
    monkeypatch.setattr(amft, "prepare", lambda *_: (("config", None, None), None, 1000))
    monkeypatch.setattr(amft, "needs", Recorder("needs"))
    space = Recorder(["no room"])
    monkeypatch.setattr(amft, "check_space", space)
    world = World(CPU)
    assert amft.examine(args, world) == ["no room"]
    assert capsys.readouterr().out == "18 responses per step, at most 18,000 tokens\n"
    assert amft.needs.calls == [((args, "config", world, 1000), {})]
    amft.examine(replace(args, keep=2), world)
    amft.examine(replace(args, steps=80), world)
    kept = [call[0][3] for call in space.calls]
    assert kept == [4, 3, 3]  # and the one that is being written
    assert space.calls[0] == ((world, "needs", "runs/amft", 4), {})


@pytest.fixture
def sizes(monkeypatch):
    """A model of 1000 weights, with 50 in its adapter; other sizes by their tokens."""
    monkeypatch.setattr(amft, "parameter_count", lambda config, trust: 1000)
    monkeypatch.setattr(amft, "skeleton", lambda config, trust_remote_code: "base")
    monkeypatch.setattr(amft, "adapter_size", lambda base, r, targets: 25 * r)

    def activations(config, tokens, width, checkpointing, adapters):
        return tokens * width * (0.5 if checkpointing else 1) * (2 if adapters else 1)

    monkeypatch.setattr(amft, "activation_bytes", activations)
    monkeypatch.setattr(amft, "logit_bytes", lambda config, tokens, width: 3 * tokens * width)
    monkeypatch.setattr(amft, "cache_bytes", lambda config, tokens, width: 7 * tokens * width)


def needed(world: World, **settings) -> tuple:
    batches = {"micro_batch": 3, "prompts_per_step": 8, "samples": 4}
    needs = amft.needs(args_of(**batches | settings), "config", world, 10)
    return needs.device, needs.host, needs.training, needs.evaluation, needs.disk


def test_needs_of_one_cpu(sizes):
    device = {"weights": 4000, "Adam": 8000, "G and its clipped copy": 8000}
    training = {"activations": 120, "logits": 360}
    evaluation = {"gathered weights": 0, "cache of rollouts": 7 * 320 * 4}
    expected = (device, {}, training, evaluation, 16000)
    assert needed(World(CPU), method="rl") == expected
    found = needed(World(CPU), method="rl", cpu_offload=True, activation_checkpointing=True)
    assert found == (device, {}, training | {"activations": 60}, evaluation, 16000)
    found = needed(World(CPU), generation_batch=31)
    assert found[0] == device | {"D": 4000}
    assert found[3]["cache of rollouts"] == 7 * 310 * 4


def test_needs_of_ranks(sizes):
    """A shard of each buffer; the cache of the rank's own responses, and the whole weights."""
    device = {"weights": 2000, "Adam": 4000, "G and its clipped copy": 4000}
    world = World(CPU, rank=1, size=4, replicas=2)
    found = needed(world, method="gac")
    assert found[0] == device | {"D": 2000, "differences of halves": 4000}
    assert found[1] == {}
    assert found[3] == {"gathered weights": 4000, "cache of rollouts": 7 * 80 * 4}
    assert found[4] == 16000
    cuda = torch.device("cuda")
    evaluation = {"gathered weights": 2000, "cache of rollouts": 7 * 80 * 2}
    training = {"activations": 60, "logits": 180}
    found = needed(World(cuda, size=4, replicas=2), method="rl")
    assert found == (device, {"weights while loading": 4000}, training, evaluation, 14000)
    found = needed(World(cuda, rank=1, size=4, replicas=2), method="rl", cpu_offload=True)
    assert found == ({}, device, training, evaluation, 14000)
    found = needed(World(cuda), method="rl")
    assert found[3] == {"gathered weights": 2000, "cache of rollouts": 7 * 320 * 2}


def test_needs_of_adapters(sizes):
    """A shard of the frozen base, all of the adapter."""
    device = {"weights": 200, "Adam": 400, "G and its clipped copy": 400, "D": 200}
    found = needed(World(torch.device("cuda"), size=2), lora_r=2)
    assert found[0] == {"frozen weights": 1000} | device
    assert found[1] == {"weights while loading": 2000}
    assert found[2] == {"activations": 120, "logits": 180}
    assert found[4] == 600
    found = needed(World(CPU), lora_r=2)
    assert found[0] == {"frozen weights": 4000} | device


# --------------------------------------------------------------------------------------------------
# The parts of a step


def test_metrics_of_losses():
    sums = {"sft": 2.0, "rl": -3.0, "value": 0.75, "tokens": 8, "entropy": 4.0, "clipped": 2}
    sums["kl"] = 1.0
    losses = {"mu": 0.25, "loss/sft": 2.0, "loss/rl": -3.0}
    measures = {"entropy": 0.5, "clip_fraction": 0.25, "approx_kl": 0.125}
    found = amft.loss_metrics(args_of(method="fixed"), sums, 0.25)
    assert found == losses | {"loss/total": -1.75} | measures
    found = amft.loss_metrics(args_of(method="rl", advantage="gae"), sums | {"tokens": 0}, 0.25)
    assert found == losses | {"loss/total": -1.75, "loss/value": 0.75}
    found = amft.loss_metrics(args_of(method="hpt"), sums | {"tokens": 1}, 0.0)
    assert found["loss/total"] == -1.0
    assert found["entropy"] == 4.0


def test_tokens_of_all_turns():
    assert amft.tokens_sampled(GROUPS) == 2 + 3 + 6 + 2 + 2
    assert amft.tokens_sampled([]) == 0


def actor_of(rollout=None, play=None, agreed=(), rank: int = 0) -> types.SimpleNamespace:
    """agreed: what the stop says each time that it is asked."""
    answers = list(agreed)
    stop = types.SimpleNamespace(agreed=lambda: bool(answers) and answers.pop(0))
    world = OneRank()
    world.rank = rank
    return types.SimpleNamespace(
        rollout=rollout, play=play, stop=stop, world=world, policy="policy", mine=range,
        tokenizer="tokenizer",
    )  # fmt: skip


def test_rounds_of_dynamic_sampling():
    """Seeds of a round are a million apart; a stop, or nothing to replace, ends them."""
    calls = []

    def rollout(game, seeds, samples, key):
        calls.append((game, list(seeds), samples, key))
        groups = []
        for seed in seeds:
            rewards = (0.0, 1.0) if seed == 8 else (0.0, 0.0)
            groups.append([Trajectory([turn_of(r)]) for r in rewards])
        return groups

    args = amft.Args(dynamic_sampling=2)
    seeds, groups, drawn = amft.rollout(args, actor_of(rollout), "game", [7, 8, 9], 2, 5)
    assert calls == [
        ("game", [7, 8, 9], 2, 5),
        ("game", [1000007, 1000009], 2, "5/1"),
        ("game", [3000007, 3000009], 2, "5/2"),
    ]
    assert seeds == [3000007, 8, 3000009]
    assert drawn == 14
    assert len(groups) == 3
    calls.clear()
    stopped = actor_of(rollout, agreed=[False, True])
    seeds, _, drawn = amft.rollout(args, stopped, "game", [7, 8], 2, 5)
    assert seeds == [1000007, 8]
    assert drawn == 6
    calls.clear()
    amft.rollout(args, actor_of(rollout), "game", [8], 2, 5)
    assert len(calls) == 1


@pytest.fixture
def tests_played(monkeypatch) -> Recorder:
    """amft.py's evaluations without a policy."""
    played = Recorder("results")
    monkeypatch.setattr(amft, "play_tests", played)
    monkeypatch.setattr(amft, "gathered", contextlib.nullcontext)
    monkeypatch.setattr(amft, "sample_rows", lambda *args: ("rows of", *args))
    return played


def test_evaluation(tests_played):
    play = Recorder("groups")
    args = args_of(show=3, samples=5, seed=9)
    actor = actor_of(play=play)
    found = amft.evaluate(args, actor, "tests", "validation", 20)
    assert found == ("results", ("rows of", "groups", 20, "tokenizer"))
    assert play.calls == [(("validation", range(20, 23), 5, "9/show/20"), {})]
    assert tests_played.calls == [((play, "tests", actor.world, actor.stop), {})]
    amft.evaluate(args, actor_of(play=play, rank=1), "tests", "validation", 20)
    assert play.calls[1] == (("validation", [], 5, "9/show/20"), {})


def test_evaluation_that_is_stopped(tests_played):
    play = Recorder("groups")
    stopped = actor_of(play=play, agreed=[True])
    assert amft.evaluate(args_of(), stopped, "tests", "validation", 20) == (None, [])
    assert len(play.calls) == 1
    tests_played.answer = None
    assert amft.evaluate(args_of(), actor_of(play=play), "tests", "validation", 0) == (None, [])
    assert len(play.calls) == 1


def test_samples_for_the_target_entropy():
    """math: all problems set apart; games: four times a meta-gradient's prompts."""
    groups = [[0] * 3, [0] * 2]
    learner = types.SimpleNamespace(entropy=lambda given: 0.25 if given is groups else None)
    for settings, count in (
        ({"validation_size": 11, "validation_prompts": 3}, 11),
        ({"task": "virl", "validation_size": 11, "validation_prompts": 3}, 12),
    ):
        rollout = Recorder(groups)
        args = args_of(samples=6, **settings)
        found = amft.target_entropy(args, actor_of(rollout), learner, "game")
        assert found == (0.25, 5)
        assert rollout.calls == [(("game", range(count), 6, "target"), {})]
        stopped = actor_of(rollout, agreed=[True])
        assert amft.target_entropy(args, stopped, learner, "game") == (None, 0)


def test_prompts_of_a_step():
    """The warm-up's first, then those of the steps after it; each rank every other one."""
    actor = types.SimpleNamespace(mine=lambda count, start=0: (count, start))
    args = args_of(warmup_steps=2, warmup_batch=5, prompts_per_step=3, steps=9)
    found = [amft.training_seeds(args, actor, step) for step in range(5)]
    assert found == [(5, 0), (5, 5), (3, 10), (3, 13), (3, 16)]


def test_words_of_the_command_line(monkeypatch):
    """Defaults by task are filled in before anything is checked."""
    monkeypatch.setattr(amft.tyro, "cli", lambda kind: kind(task="virl"))
    started = Recorder(7)
    monkeypatch.setattr(amft, "start", started)
    assert amft.cli() == 7
    (((name, args, *functions), _),) = started.calls
    assert name == "amft.py"
    assert args == args_of(task="virl")
    assert functions == [amft.check, amft.examine, amft.main]


# --------------------------------------------------------------------------------------------------
# Of several ranks, of an engine, and after the end


def test_the_cosine_stays_at_its_end():
    """A run that is taken further than --chord-steps."""
    args = args_of(method="chord", chord_warmup=2, chord_steps=20, warmup_steps=3)
    found = [amft.METHODS["chord"].mu(args, step, None) for step in (25, 26, 35, 45, 99)]
    assert found == pytest.approx([0.05] * 5)


def test_dynamic_sampling_waits_for_other_ranks():
    """A rank without equal groups plays along, with nothing, as long as another has some."""
    calls = []

    def rollout(game, seeds, samples, key):
        calls.append((list(seeds), key))
        return [[Trajectory([turn_of(r)]) for r in (0.0, 1.0)] for _ in seeds]

    actor, left = actor_of(rollout), [2, 1, 0, 0]
    actor.world.sum = lambda count: [count + left.pop(0)]
    found = amft.rollout(amft.Args(dynamic_sampling=4), actor, "game", [7, 8], 2, 5)
    assert found == ([7, 8], found[1], 4)
    assert calls == [([7, 8], 5), ([], "5/1"), ([], "5/2")]


def test_needs_of_an_engine(sizes, monkeypatch):
    """Each rank has a whole one, whatever the shards: in the GPU, even where the policy is in CPU
    memory; its cache has --max-length and the response beside it."""
    asked = []

    def engine(config, *numbers):
        asked.append(numbers)
        return 77

    monkeypatch.setattr(amft, "engine_bytes", engine)
    world = World(torch.device("cuda"), rank=1, size=4)
    flags = {"sampler": "vllm", "method": "rl", "generation_batch": 6, "max_length": 30}
    flags |= {"max_new_tokens": 8}
    engine = {"vLLM": 2000, "its cache": 77}
    policy = {"weights": 1000, "Adam": 2000, "G and its clipped copy": 2000}
    gathered_weights = {"gathered weights": 2000}
    found = needed(world, **flags)
    assert (found[0], found[1], found[3]) == (policy | engine, {}, gathered_weights)
    found = needed(world, **flags, cpu_offload=True)
    assert (found[0], found[1], found[3]) == (engine, policy, gathered_weights)
    found = needed(world, **flags, vllm_sleep=True)
    assert (found[0], found[1], found[3]) == (policy, {}, gathered_weights | engine)
    assert asked == [(6, 10, 38, 2)] * 3


def test_needs_at_the_edges(sizes):
    """Copies of the weights need no gathering; rank 1 is an adapter too."""
    found = needed(World(CPU, size=2, replicas=2), method="rl")
    assert found[3]["gathered weights"] == 0
    assert found[0]["weights"] == 4000
    found = needed(World(CPU), lora_r=1)
    assert found[0] == {
        "frozen weights": 4000, "weights": 100, "Adam": 200, "G and its clipped copy": 200,
        "D": 100,
    }  # fmt: skip
    assert found[2]["activations"] == 240
    assert found[4] == 300


@pytest.mark.parametrize("trusted", [False, True])
def test_trust_in_a_models_code(trusted, monkeypatch):
    """--trust-remote-code, and nothing else, goes to all that reads a model."""
    told = []

    def reads(answer):
        def read(*args, trust_remote_code=None, **settings):
            told.append(args[2] if len(args) == 3 else trust_remote_code)
            return answer

        return read

    monkeypatch.setattr(amft, "load_readers", reads(("config", "tokenizer", "processor")))
    monkeypatch.setattr(amft, "load_task", Recorder(("train", "shown", "v", "tests", "report")))
    monkeypatch.setattr(amft, "longest_row", Recorder(7))
    monkeypatch.setattr(amft, "skeleton", reads("base"))
    monkeypatch.setattr(amft, "check_targets", Recorder(None))
    monkeypatch.setattr(amft, "adapter_size", Recorder(50))
    count = Recorder(1000)
    monkeypatch.setattr(amft, "parameter_count", count)
    for name in ("activation_bytes", "logit_bytes", "cache_bytes"):
        monkeypatch.setattr(amft, name, Recorder(1))
    args = args_of(model="m", lora_r=2, trust_remote_code=trusted)
    amft.prepare(args, World(CPU))
    amft.needs(args, "config", World(CPU), 10)
    assert told == [trusted] * 3
    assert count.calls == [(("config", trusted), {})]


def test_engine_of_a_run(monkeypatch):
    """The policy's model and adapters; in bf16 on a GPU alone."""
    engines = []

    class Engine:
        def __init__(self, *args, **settings):
            engines.append((args, settings))

        def rest(self, *_):
            pass

        weights_changed = rest

    monkeypatch.setattr(amft, "VllmSampler", Engine)
    policy = Policy(small_llama(torch.float32), value_head=False)
    policy.adapters = "adapters"
    expected = {
        "sequences": 7, "longest": 30, "max_length": 56, "eager": False, "sleeps": True,
        "adapters": "adapters", "trust_remote_code": True,
    }  # fmt: skip
    settings = {"sampler": "vllm", "model": "m", "generation_batch": 7, "max_length": 50}
    settings |= {"max_new_tokens": 6, "vllm_sleep": True, "trust_remote_code": True}
    for cuda, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        optimizer = torch.optim.SGD(policy.parameters())
        amft.vllm_engine(args_of(**settings), "config", policy, optimizer, longest=30)
        assert engines.pop() == (("m", "config"), expected | {"dtype": dtype})
