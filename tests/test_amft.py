"""amft.py: losses by hand, batches against a loop over rows, the derivative by mu against finite
differences; runs of every method, of the games, on two ranks."""

import copy
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import textwrap
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import amft
import plots
import run
from data import DataError
from games.play import Actor, Trajectory, Turn, demonstrate
from games.rules import own_function
from learner import Pass, PolicyLearner, Row, Tokens, adamw, collate_rows
from lora import Adapters
from model import EMBEDDED, World, auto_class, load_config, load_processor, load_weights
from policy import Policy, Sample, sample
from tests.helpers import (
    AMFT_RUN,
    ROOT,
    Parity,
    assert_same_weights,
    controller_of,
    final_weights,
    logged,
    one_rank_mesh,
    random_rows,
    run_here,
    run_well,
    small_llama,
)

# --------------------------------------------------------------------------------------------------
# Losses, advantages and mu by hand


def tokens_of(logprobs: torch.Tensor, **changes) -> Tokens:
    """One response [1, L] with advantages 1, its own sample, not won."""
    ones = torch.ones_like(logprobs)
    values = {
        "logprobs": logprobs,
        "entropy": ones,
        "values": None,
        "old": torch.zeros_like(logprobs),
        "advantages": ones,
        "value_targets": ones,
        "mask": ones.bool(),
        "weight": ones[:, :1],
        "demonstration": torch.tensor([[False]]),
        "right": torch.tensor([[False]]),
    }
    return Tokens(**values | changes)


P = (0.5, 0.2, 0.9)  # of three tokens
OLD_P = (0.4, 0.4, 0.9)  # ratios 1.25, 0.5, 1


def logs(probabilities) -> torch.Tensor:
    return torch.tensor([[math.log(p) for p in probabilities]], dtype=torch.float64)


def assert_loss(loss, values, slopes, args=None, **changes) -> None:
    """A loss of the three tokens, and its derivative by log pi."""
    logprobs = logs(P).requires_grad_()
    got = loss(tokens_of(logprobs, **changes), amft.with_defaults(args or amft.Args()))
    (slope,) = torch.autograd.grad(got.sum(), logprobs)
    assert got.tolist()[0] == pytest.approx(values, abs=1e-12)
    assert slope.tolist()[0] == pytest.approx(slopes, abs=1e-12)


def test_amft_losses_by_hand():
    """Each loss and its derivative by log pi, on numbers worked out apart."""
    old, two = logs(OLD_P), torch.full((1, 3), 2.0, dtype=torch.float64)
    shown, right = torch.tensor([[True]]), torch.tensor([[True]])
    # PPO, A = 1: 1.25 is cut to 1.2, no gradient; 0.5 stays
    assert_loss(amft.ppo_loss, [-1.2, -0.5, -1.0], [0.0, -0.5, -1.0], old=old)
    # A = -1: 1.25 stays; 0.5 is cut to 0.8, no gradient
    assert_loss(amft.ppo_loss, [1.25, 0.8, 1.0], [1.25, 0.0, 1.0], old=old, advantages=-two / 2)
    # LUFFY: p / (p + 0.1) with derivative p * 0.1 / (p + 0.1)^2 by log p
    shaped = [-2 * p / (p + 0.1) for p in P]
    slopes = [-2 * p * 0.1 / (p + 0.1) ** 2 for p in P]
    assert_loss(amft.luffy_loss, shaped, slopes, advantages=two, demonstration=shown)
    # own tokens by their ratio, unclipped
    unclipped = [-2.5, -1.0, -2.0]
    assert_loss(amft.luffy_loss, unclipped, unclipped, old=old, advantages=two)
    assert_loss(amft.reinforce_loss, unclipped, unclipped, old=old, advantages=two)
    # SRFT, H = 0.7: demonstrations 0.5 e^-H (-log p) + min(p A, clip(p, 0.8, 1.2) A), A = 1: p
    # itself below 1.2
    H = torch.tensor([[0.5, 0.7, 0.9]], dtype=torch.float64)
    e = math.exp(0.7)
    values = [-0.5 / e * math.log(p) - p for p in P]
    slopes = [-0.5 / e - p for p in P]
    assert_loss(amft.srft_loss, values, slopes, entropy=H, demonstration=shown, right=right)
    # own: 0.1 e^H (-log p) if right, log p if wrong
    values = [-0.1 * e * math.log(p) for p in P]
    assert_loss(amft.srft_loss, values, [-0.1 * e] * 3, entropy=H, old=old, right=right)
    assert_loss(amft.srft_loss, [math.log(p) for p in P], [1.0] * 3, entropy=H, old=old)
    # DAPO's higher upper bound: 1.25 stays below 1.3; the lower one is as before
    higher = amft.Args(clip_ratio_high=0.3)
    assert_loss(amft.ppo_loss, [-1.25, -0.5, -1.0], [-1.25, -0.5, -1.0], higher, old=old)
    values = [1.25, 0.8, 1.0]
    assert_loss(amft.ppo_loss, values, [1.25, 0, 1.0], higher, old=old, advantages=-two / 2)
    # SFT; CHORD's phi, p (1 - p), and DFT's p are constants to the gradient
    surprise = [-math.log(p) for p in P]
    assert_loss(amft.sft_loss, surprise, [-1.0] * 3)
    values = [-p * (1 - p) * math.log(p) for p in P]
    slopes = [-p * (1 - p) for p in P]
    assert_loss(amft.sft_loss, values, slopes, amft.Args(sft_weight="phi"))
    values = [-p * math.log(p) for p in P]
    assert_loss(amft.sft_loss, values, [-p for p in P], amft.Args(sft_weight="dft"))
    advantages_by_hand()


def advantages_by_hand():
    # (1, 0, 0, 1): mean 1/2, std with n - 1 = sqrt(1/3)
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    got = amft.group_advantages([1.0, 0, 0, 1], "grpo")
    assert got == pytest.approx([unit, -unit, -unit, unit])
    assert amft.group_advantages([1.0] * 4, "grpo") == [0] * 4
    assert amft.group_advantages([3.0, 0, 0], "mean") == [2, -1, -1]
    got = amft.group_advantages([3.0, 0, 0], "leave_one_out")
    assert got == pytest.approx([3, -1.5, -1.5])
    # V = (0.5, 0.2, 0.4), reward 1, lambda 0.5: deltas -0.3, 0.2, 0.6, so from the last on
    # 0.6, 0.2 + 0.3, -0.3 + 0.25
    assert amft.gae([0.5, 0.2, 0.4], 1.0, 0.5) == pytest.approx([-0.05, 0.5, 0.6])
    assert amft.gae([0.5, 0.2], 1.0, 1.0) == pytest.approx([0.5, 0.8])
    trajectory = Trajectory([Turn([], [], [], True, "", r) for r in (-1.0, -2.0, 5.0)])
    assert trajectory.returns(1.0) == [2, 3, 5]
    assert trajectory.returns(0.5) == [-0.75, 0.5, 5]


def test_controller():
    """Both forms of eq. (6), both signs, the schedules of the other methods."""
    printed = controller_of(mu_update="printed", mu_init=0.5)
    by_entropy = printed.move(1, None, 0.3)["mu_change/entropy"]
    assert by_entropy == pytest.approx(5e-4 * 0.2)
    printed.move(20, 0.1, 0.5)
    assert printed.mu == pytest.approx(0.5 + 5e-4 * 0.2 + 1e-4 * 0.1)
    text = controller_of(mu_update="printed", entropy_sign="text")
    by_entropy = text.move(1, None, 0.3)["mu_change/entropy"]
    assert by_entropy == pytest.approx(-5e-4 * 0.2)
    ours = controller_of(mu_every=5, no_entropy_term=True)
    changes = []
    for k, gradient in enumerate((3.0, 0.0, -4.0, 5.0, -100.0), 1):
        changes.append(ours.move(5 * k, gradient, 0.1)["mu_change/meta_gradient"])
    assert changes == pytest.approx([0, 0, 0, 0.05 * 5 / math.sqrt(12.5), -0.15])
    assert ours.mu == pytest.approx(0.5 + sum(changes))
    entropy = controller_of(mu_every=5, mu_init=0.94)
    assert entropy.move(4, None, 0.1)["mu_change/entropy"] == 0
    entropy.state["entropy_target"] = 0.7
    by_entropy = entropy.move(5, None, 0.1)["mu_change/entropy"]
    assert by_entropy == pytest.approx(0.03)
    assert entropy.mu == 0.95


def test_when_mu_is_updated():
    """H* after the warm-up; a meta-gradient every K steps, once Adam is warm, for a learned mu."""
    args = amft.Args(warmup_steps=2, mu_every=3, mu_update="normalised")
    controller = amft.Controller(amft.with_defaults(args))
    assert [step for step in range(5) if controller.wants_target(step)] == [2, 3, 4]
    assert [step for step in range(5) if controller.moves(step)] == [2, 3, 4]
    controller.state["entropy_target"] = 0.5
    assert not any(controller.wants_target(step) for step in range(5))
    controller.state["optimizer_steps"] = 9
    assert not any(controller.gradient_due(step) for step in range(12))
    controller.state["optimizer_steps"] = 10
    assert [step for step in range(12) if controller.gradient_due(step)] == [2, 5, 8, 11]
    controller.args.warmup_steps = 3
    assert not controller.gradient_due(2)
    controller.args.no_meta_gradient = True
    assert not controller.gradient_due(5)
    controller = amft.Controller(amft.Args(), learns="no")
    controller.state |= {"entropy_target": 0.5, "optimizer_steps": 10}
    assert not controller.moves(4)
    assert not controller.gradient_due(4)


def test_when_the_entropy_counts():
    """By its weight, which --mu-update shrunken does not give it: then H* is not measured."""
    for settings, counts in (
        ({}, False),
        ({"eta_entropy": 0.1}, True),
        ({"eta_entropy": 0.1, "no_entropy_term": True}, False),
        ({"mu_update": "normalised"}, True),
        ({"mu_update": "normalised", "eta_entropy": 0.0}, False),
        ({"mu_update": "printed"}, True),
    ):
        controller = amft.Controller(amft.Args(warmup_steps=2, mu_every=1, **settings))
        assert controller.uses_entropy == counts
        assert controller.wants_target(2) == counts
        controller.state["entropy_target"] = 0.7
        assert (controller.move(3, None, 0.3)["mu_change/entropy"] > 0) == counts


def test_prompts_follow_each_other():
    """Of the warm-up and of the steps after it, over all ranks: none twice, none left out."""
    settings = {"warmup_steps": 2, "warmup_batch": 6, "prompts_per_step": 4, "steps": 5}
    args = amft.with_defaults(amft.Args(**settings))
    seeds = []
    for step in range(5):
        of_step = []
        for rank in (0, 1):
            actor = Actor.__new__(Actor)
            actor.world = types.SimpleNamespace(rank=rank, size=2)
            of_step += amft.training_seeds(args, actor, step)
        assert len(of_step) == (6 if step < 2 else 4)
        seeds += sorted(of_step)
    assert seeds == list(range(24))


def mu_at(step: int, **settings) -> float:
    """A method's mu at a step after the warm-up."""
    args = amft.with_defaults(amft.Args(**settings))
    return amft.METHODS[args.method].mu(args, step, amft.Controller(args))


def test_schedules_of_mu():
    steps = (5, 6, 9)
    assert [mu_at(step, method="sft_then_rl", steps=10) for step in steps] == [0, 0, 0]
    assert amft.with_defaults(amft.Args(method="sft_then_rl", steps=10)).warmup_steps == 5
    assert mu_at(5) == 0.5
    assert mu_at(3, method="rl") == 0
    assert mu_at(0, method="chord") == pytest.approx(0.9)
    assert mu_at(40, method="chord") == pytest.approx(0.475)  # half of the run
    assert mu_at(80, method="chord") == pytest.approx(0.05)
    assert mu_at(500, method="chord", chord_steps=1000) == pytest.approx(0.475)
    after_warmup = {"method": "chord", "warmup_steps": 20}
    assert mu_at(50, **after_warmup) == pytest.approx(0.475)
    rising = {"method": "chord", "chord_warmup": 10, "chord_steps": 20}
    found = [mu_at(step, **rising) for step in (4, 9, 10, 20, 30)]
    assert found == pytest.approx([0.45, 0.9, 0.9, 0.475, 0.05])
    weighted = {"method": "chord", "sft_weight": "phi"}  # of its schedule independent
    assert mu_at(40, **weighted) == pytest.approx(0.475)
    constant = {"method": "chord", "chord_start": 0.1, "chord_end": 0.1}
    assert [mu_at(step, **constant) for step in (0, 30)] == pytest.approx([0.1, 0.1])


def test_a_flag_that_a_method_does_not_read_is_refused():
    for method, flags in (
        ("amft", {"luffy_gamma": 0.2}),
        ("amft", {"chord_steps": 7}),
        ("rl", {"mu_init": 0.3}),
        ("rl", {"sft_weight": "dft"}),
        ("fixed", {"eta_mu": 0.3}),
        ("gac", {"no_entropy_term": True}),
        ("luffy", {"clip_ratio_high": 0.3}),
        ("luffy", {"advantage": "mean"}),
        ("luffy", {"sft_data": "x"}),
        ("sft", {"dynamic_sampling": 1}),
    ):
        args = amft.with_defaults(amft.Args(method=method, **flags))
        with pytest.raises(DataError):
            amft.check(args, 1)
    for method, flags in (
        ("amft", {"mu_init": 0.3, "eta_mu": 0.3}),
        ("chord", {"chord_steps": 7, "sft_weight": "phi"}),
        ("rl", {"clip_ratio_high": 0.3, "advantage": "mean", "dynamic_sampling": 2}),
    ):
        amft.check(amft.with_defaults(amft.Args(method=method, **flags)), 1)


def test_running_means():
    """With the weights 1, b, b^2 ... from the newest on, made to sum to 1."""
    numbers, state, b = [3.0, -1.0, 4.0, 1.5], {}, 0.7
    running = amft.Running(state, b)
    for n in range(1, 5):
        weights = [b ** (n - 1 - i) for i in range(n)]
        weights = [w / sum(weights) for w in weights]
        expected = sum(w * x for w, x in zip(weights, numbers[:n], strict=True))
        assert running.add(x=numbers[n - 1])["x"] == pytest.approx(expected)
        assert running.variance_of_mean() == pytest.approx(sum(w * w for w in weights))
    again = amft.Running(json.loads(json.dumps(state)), b)  # from a checkpoint
    assert again.add(x=2.0) == running.add(x=2.0)


def test_the_shrunken_update():
    """It acts from the first meta-gradient, less the more of it is noise, never over eta_mu."""
    settings = {"mu_update": "shrunken", "no_entropy_term": True, "eta_mu": 0.2}
    sure, unsure = controller_of(**settings), controller_of(**settings)
    assert sure.first_steps == 2
    for k in range(1, 9):
        sure.move(k, -3.0, 0.1, noise=0.1)
        unsure.move(k, -3.0, 0.1, noise=30.0)
        if k == 1:  # noise^2 is (0.1^2 + 3^2) / 2 with the one estimate more, so SNR^2 is 2
            assert sure.mu == pytest.approx(0.5 - 0.2 * 2 / 3, abs=1e-3)
    assert sure.mu == 0.05
    assert unsure.mu > 0.4
    flipping = controller_of(**settings)
    for k in range(1, 41):
        flipping.move(k, 3.0 * (-1) ** k, 0.1, noise=1.0)
    assert abs(flipping.mu - 0.5) < 0.25
    scaled = controller_of(**settings)  # no unit of the meta-gradient
    scaled.move(1, -3e6, 0.1, noise=0.1e6)
    assert scaled.mu == pytest.approx(0.5 - 0.2 * 2 / 3, abs=1e-3)


def test_gac_goes_to_the_least_error():
    """mu* has the least error of all mu as an estimate of grad J; steps of at most 0.05."""
    noise = {"variance/rl": 3.0, "variance/sft": 1.0, "disagreement": 6.0}
    controller = amft.Controller(amft.Args(method="gac"), "by_noise")
    path = []
    for _ in range(12):
        controller.balance(noise)
        path.append(controller.mu)
    assert path[:3] == pytest.approx([0.45, 0.4, 0.35])

    def error(mu: float) -> float:
        return (1 - mu) ** 2 * 3.0 + mu**2 * (1.0 + 6.0)

    best = min((k / 1000 for k in range(1001)), key=error)
    assert path[-1] == pytest.approx(best, abs=1e-3)


def test_gac_sees_the_noise_of_its_gradients(process_group):
    """The halves' difference, and |g_SFT - g_RL|^2 without the noise, against gradients by hand."""
    learner = amft_learner(small_llama(), method="gac")
    rl, sft = random_rows(6, 1), random_rows(4, 2, demonstration=True)
    for i, row in enumerate(rl):
        row.prompt = i // 2
    for i, row in enumerate(sft):
        row.prompt = i
    step = amft.train_on(learner, 0.3, sft, rl, schedule=1.0, with_D=True)
    found = amft.gradient_noise(learner, step)
    plain = PlainLosses(learner, rl, sft)
    flat = {}
    for name, rows in (("rl", rl), ("sft", sft)):
        for parity in (0, 1):
            half = [row for row in rows if row.prompt % 2 == parity]
            other = {"rl": [], "sft": []} | {name: half}
            loss = getattr(PlainLosses(learner, other["rl"], other["sft"]), f"{name}_loss")()
            scale = response_tokens(half) / response_tokens(rows)  # means over all tokens
            flat[name, parity] = scale * torch.cat([g.flatten() for g in plain.gradient(loss)])
    variance = {
        name: (flat[name, 0] - flat[name, 1]).square().sum().item() for name in ("rl", "sft")
    }
    assert found["variance/rl"] == pytest.approx(variance["rl"], rel=1e-4)
    assert found["variance/sft"] == pytest.approx(variance["sft"], rel=1e-4)
    apart = flat["sft", 0] + flat["sft", 1] - flat["rl", 0] - flat["rl", 1]
    square = apart.square().sum().item() - variance["rl"] - variance["sft"]
    assert found["disagreement"] == pytest.approx(max(0.0, square), rel=1e-3, abs=1e-9)
    expected = 0.7 * (flat["rl", 0] + flat["rl", 1]) + 0.3 * (flat["sft", 0] + flat["sft", 1])
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in step.G]), expected, rtol=1e-4, atol=1e-7
    )


def test_dynamic_sampling():
    """Equal groups make way, in so many rounds at most; all that was drawn is counted."""

    def group(rewards) -> list:
        return [Trajectory([Turn([], [], [], True, "", r)]) for r in rewards]

    good = {2: (1, 1), 3: (0, 1), 4: (0, 0), 1_000_002: (1, 0), 1_000_004: (1, 1)}
    actor = types.SimpleNamespace(
        rollout=lambda game, seeds, samples, key: [group(good.get(s, (0, 0))) for s in seeds],
        stop=types.SimpleNamespace(agreed=lambda: False),
        world=types.SimpleNamespace(sum=lambda *x: list(x)),
    )
    for rounds, kept, count in (
        (0, [2, 3, 4], 6),
        (1, [1_000_002, 3, 1_000_004], 10),
        (2, [1_000_002, 3, 3_000_004], 12),
    ):
        args = amft.Args(dynamic_sampling=rounds)
        seeds, groups, drawn = amft.rollout(args, actor, None, [2, 3, 4], 2, 0)
        assert seeds == kept
        assert drawn == count
        assert not amft.equally_good(groups[1])


# --------------------------------------------------------------------------------------------------
# Batches against a loop over rows


def amft_learner(model, optimizer=None, adapters=None, **settings) -> PolicyLearner:
    """Of one rank. Without an optimizer its steps change nothing."""
    args = amft.with_defaults(amft.Args(**{"micro_batch": 3, "samples": 4} | settings))
    policy = Policy(model, args.advantage == "gae").to(next(model.parameters()).dtype).train()
    policy.adapters = adapters
    if optimizer is None:
        params = adapters.phi if adapters else list(policy.parameters())
        still = {"params": params, "lr": 0.0, "peak": 0.0}
        optimizer = torch.optim.AdamW([still])
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    return PolicyLearner(args, policy, optimizer, world, 0)


def response_tokens(rows: list) -> int:
    return sum(len(row.turn.ids) for row in rows)


class PlainLosses:
    """Each method's loss of rows, one by one and unpadded, by its own normalisation."""

    def __init__(self, learner: PolicyLearner, rl: list, sft: list):
        self.args, self.policy = learner.args, learner.policy
        self.rl, self.sft = rl, sft
        self.kept = [row for row in rl if row.turn.finished or not self.args.mask_truncated]

    def outputs(self, row) -> types.SimpleNamespace:
        """Of the response tokens."""
        ids, n = torch.tensor([row.turn.prompt + row.turn.ids]), len(row.turn.prompt)
        out = self.policy.lm(ids, output_hidden_states=True, use_cache=False)
        logprobs = out.logits[0, n - 1 : -1].log_softmax(-1)
        old = torch.tensor(row.turn.old_logprobs, dtype=torch.float64)
        logp = logprobs.gather(1, ids[0, n:, None]).squeeze(1)
        return types.SimpleNamespace(
            logp=logp,
            ratio=(logp - old).exp(),
            entropy=-(logprobs.exp() * logprobs).sum(-1),
            hidden=out.hidden_states[-1][0, n - 1 : -1],
        )

    def sft_loss(self) -> torch.Tensor:
        losses = [torch.zeros((), dtype=torch.float64)]
        for row in self.sft:
            logp = self.outputs(row).logp
            if self.args.method == "hpt":
                losses.append(0.3 / self.args.prompts_per_step * -logp.mean())
            else:
                weight = 1
                if self.args.method == "chord":
                    weight = (logp.exp() * (1 - logp.exp())).detach()
                losses.append((-weight * logp).sum() / response_tokens(self.sft))
        return sum(losses)

    def rl_loss(self) -> torch.Tensor:
        return sum(self.rl_loss_of(row, self.outputs(row)) for row in self.kept)

    def rl_loss_of(self, row, out) -> torch.Tensor:
        args, a = self.args, row.advantages[0]
        upper = 1 + (self.args.clip_ratio_high or 0.2)
        clipped = -torch.minimum(out.ratio * a, out.ratio.clamp(0.8, upper) * a)
        if args.method == "luffy":
            f = out.ratio
            if row.demonstration:
                f = out.logp.exp() / (out.logp.exp() + 0.1)
            return -(f * a).sum() / len(self.rl) / args.max_new_tokens
        if args.method == "hpt":
            places = args.prompts_per_step * args.samples * args.max_new_tokens
            return -(out.ratio * a).sum() / places
        if args.method == "srft":
            H = out.entropy.mean().detach()
            if row.demonstration:
                loss = 0.5 * torch.exp(-H) * -out.logp + clipped
            elif row.right:
                loss = 0.1 * torch.exp(H) * -out.logp
            else:
                loss = out.logp
            alike = [r for r in self.rl if r.demonstration == row.demonstration]
            return loss.sum() / response_tokens(alike)
        if args.loss_aggregation == "sequence":
            return clipped.mean() / len(self.kept)
        return clipped.sum() / response_tokens(self.kept)

    def auxiliary_loss(self) -> torch.Tensor:
        """PPO's value loss and entropy bonus."""
        losses = [torch.zeros((), dtype=torch.float64)]
        if self.args.advantage == "gae":
            for row in self.kept:
                out = self.outputs(row)
                v = self.policy.value(out.hidden).squeeze(-1)
                targets = torch.tensor(row.value_targets, dtype=torch.float64)
                value_loss = 0.5 * (v - targets).square().sum()
                bonus = self.args.entropy_coefficient * out.entropy.sum()
                loss = self.args.value_coefficient * value_loss - bonus
                losses.append(loss / response_tokens(self.kept))
        return sum(losses)

    def gradient(self, loss: torch.Tensor) -> list[torch.Tensor]:
        params = list(self.policy.parameters())
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in params]
        return list(torch.autograd.grad(loss, params, materialize_grads=True))


@pytest.mark.parametrize(
    "method,options",
    [
        ("rl", {}),
        ("rl", {"loss_aggregation": "sequence", "mask_truncated": True}),
        ("rl", {"advantage": "gae", "entropy_coefficient": 0.05}),
        ("luffy", {}),
        ("srft", {}),
        ("hpt", {"hpt_sft": 0.3}),
        ("chord", {"sft_weight": "phi"}),
        ("rl", {"advantage": "mean", "clip_ratio_high": 0.3}),
    ],
    ids=str,
)
def test_amft_batch_equals_rows(method, options, process_group):
    """G and D of padded batches in micro-batches, by each method's normalisation, equal a plain
    loop over unpadded rows; rows with advantage 0 too, which are not sent through backward."""
    learner = amft_learner(small_llama(), method=method, **options)
    own = random_rows(7, 1)
    for row in own[2:5]:
        row.advantages = [0.0] * len(row.turn.ids)
    shown = random_rows(3, 2, demonstration=True)
    rl, sft = own, shown
    if method in ("luffy", "srft"):
        rl, sft = own + shown, []
    plain = PlainLosses(learner, rl, sft)
    g_rl, g_sft, g_auxiliary = (
        plain.gradient(loss) for loss in (plain.rl_loss(), plain.sft_loss(), plain.auxiliary_loss())
    )
    mu = 0.4
    mu_sft = 1.0 if method == "hpt" else mu
    names = [name for name, _ in learner.policy.named_parameters()]
    for with_D in (False, True):
        taken = amft.train_on(learner, mu, sft, rl, schedule=1.0, with_D=with_D)
        assert taken.finite
        assert taken.steps == 1
        assert taken.sums["tokens"] == response_tokens([row for row in own if row.weight])
        rest = {"rtol": 1e-5, "atol": 1e-7}  # the batch holds weights in float32
        for i, name in enumerate(names):
            expected = (1 - mu) * g_rl[i] + mu_sft * g_sft[i] + g_auxiliary[i]
            torch.testing.assert_close(taken.G[i], expected, **rest, msg=f"G, {name}")
            if with_D:
                expected = g_sft[i] - g_rl[i]
                torch.testing.assert_close(taken.D[i], expected, **rest, msg=f"D, {name}")
    assert taken.norm == pytest.approx(math.sqrt(learner.dot(taken.G, taken.G)))
    if learner.args.advantage == "gae":
        errors = []
        for row in rl:
            v = learner.policy.value(plain.outputs(row).hidden).squeeze(-1)
            errors.append((v - torch.tensor(row.value_targets)).square() / 2)
        assert taken.sums["value"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


def test_advantages_of_the_value_head(process_group):
    """GAE row by row, whitened over all tokens; the value head's target is A + V before that."""
    learner = amft_learner(small_llama(), method="rl", advantage="gae", gae_lambda=0.7)
    rows, plain = random_rows(7, 1), []
    for i, row in enumerate(rows):
        row.reward_to_go = float(i % 3)
    amft.estimate_advantages(learner, rows)
    losses = PlainLosses(learner, rows, [])
    for row in rows:
        values = learner.policy.value(losses.outputs(row).hidden).squeeze(-1).tolist()
        advantages = amft.gae(values, row.reward_to_go, 0.7)
        targets = [a + v for a, v in zip(advantages, values, strict=True)]
        assert row.value_targets == pytest.approx(targets, abs=1e-6)
        plain.append(torch.tensor(advantages, dtype=torch.float64))
    mean, std = torch.cat(plain).mean(), torch.cat(plain).std(correction=0)
    for row, advantages in zip(rows, plain, strict=True):
        assert row.advantages == pytest.approx(((advantages - mean) / std).tolist(), abs=1e-5)


def test_the_value_head_has_its_own_rate(process_group):
    """At every point of the schedule."""
    settings = {"method": "rl", "advantage": "gae", "lr": 1e-3, "value_lr": 0.02}
    learner = amft_learner(small_llama(), **settings)
    learner.optimizer = adamw(learner.args, learner.policy)
    head = {id(p) for p in learner.policy.value.parameters()}
    for schedule in (0.5, 1.0):
        learner.take_step([torch.ones_like(p) for p in learner.local_params], schedule)
        for group in learner.optimizer.param_groups:
            of_head = {id(p) in head for p in group["params"]}
            assert group["lr"] == schedule * (0.02 if of_head == {True} else 1e-3)
            assert len(of_head) == 1


def flat(buffers: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([b.flatten() for b in buffers])


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_of_shards(lora, process_group):
    """FSDP2 takes their mean over the shard group, a sum is wanted; of adapters each rank has all,
    from its own rows."""
    found = []
    for size in (1, 2):
        model = small_llama()
        learner = amft_learner(model, adapters=with_adapters(model) if lora else None)
        learner.world = replace(learner.world, size=size)
        rows = random_rows(4, 1)
        amft.set_loss_weights(learner.args, learner.world, [], rows)
        G = learner.zeros()
        sums = learner.backward(Pass(rows, {"rl": (amft.ppo_loss, 0.5)}, [(G, 2.0)]))
        found.append((flat(G), sums))
    (one, sums), (two, same_sums) = found
    assert one.abs().max() > 0
    torch.testing.assert_close(two, one if lora else 2 * one)
    assert sums == same_sums


def test_rows_that_are_only_measured(process_group, monkeypatch):
    """No backward, and no graph for one, where no row has an advantage."""
    learner = amft_learner(small_llama(), method="rl")
    rows, forward, graphs = random_rows(5, 1), learner.forward, []
    for row in rows:
        row.advantages = [0.0] * len(row.turn.ids)
    amft.set_loss_weights(learner.args, learner.world, [], rows)
    monkeypatch.setattr("learner.each_gradient", lambda *_: pytest.fail("a backward pass"))

    def watched(batch, entropy_gradient):
        graphs.append(torch.is_grad_enabled())
        return forward(batch, entropy_gradient)

    learner.forward = watched
    sums = learner.backward(Pass(rows, {"rl": (amft.ppo_loss, 1.0)}, []))
    assert graphs == [False, False]
    assert sums["tokens"] == response_tokens(rows)


def test_sums_over_ranks(monkeypatch):
    """Of shards, products alone; of adapters, which every rank has whole, gradients alone."""
    calls = []

    def all_reduce(x, group=None):
        calls.append((x.tolist(), group))
        x.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    mesh = types.SimpleNamespace(get_group=lambda name: name)
    a, b = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([4.0, -1.0])]
    b.append(torch.tensor([[5.0]]))
    for shards, replicated, product in ((1, False, 17), (2, False, 34), (2, True, 17)):
        calls.clear()
        world = types.SimpleNamespace(shards=shards, mesh=mesh, sum_over_replicas=calls.append)
        learner = types.SimpleNamespace(world=world, replicated=replicated)
        assert PolicyLearner.dot(learner, a, b) == product
        assert calls == ([(17.0, "shard")] if product == 34 else [])
        calls.clear()
        gradient = [torch.arange(4.0)[1:]]
        PolicyLearner.sum_over_ranks(learner, gradient)
        assert calls == ([([0, 1, 2, 3], None)] if replicated else [gradient])


def test_a_clipped_step(process_group):
    """G stays as it was; AdamW sees min(1, C / |G|) G at the rate of the schedule."""
    for clip, schedule in ((0.5, 0.25), (5.0, 1.0), (6.0, 2.0)):
        model, plain = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        plain.load_state_dict(model.state_dict())
        learner = types.SimpleNamespace(
            args=amft.Args(clip=clip),
            params=list(model.parameters()),
            optimizer=with_peak(torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0)),
            dot=lambda a, b: sum((x * y).sum().item() for x, y in zip(a, b, strict=True)),
        )
        G = [torch.tensor([[3.0, 0.0]]), torch.tensor([-4.0])]
        assert PolicyLearner.take_step(learner, G, schedule) == (5.0, True)
        assert flat(G).tolist() == [3, 0, -4]
        assert all(p.grad is None for p in model.parameters())
        reference = torch.optim.AdamW(plain.parameters(), lr=0.1 * schedule, eps=1.0)
        for p, g in zip(plain.parameters(), G, strict=True):
            p.grad = g * min(1.0, clip / 5)
        reference.step()
        assert_same_weights(model.state_dict(), plain.state_dict())
        start = copy.deepcopy(model.state_dict())
        for wrong in (math.nan, math.inf):
            G[1][0] = wrong
            assert PolicyLearner.take_step(learner, G, 1.0) == (math.inf, False)
        assert_same_weights(model.state_dict(), start)
        nothing = [torch.zeros_like(p) for p in model.parameters()]
        assert PolicyLearner.take_step(learner, nothing, 1.0) == (0.0, True)


class Passes(PolicyLearner):
    """Takes no gradients, and steps until `fails`; each pass says 6 for its loss."""

    def __init__(self, fails: int = 99, **settings):
        self.args = amft.with_defaults(amft.Args(**settings))
        self.world = types.SimpleNamespace(sum=lambda *x: list(x), sum_over_replicas=self.summed)
        self.replicated = False
        self.local_params = [torch.zeros(2)]
        self.fails, self.seen, self.buffers = fails, [], 0

    def summed(self, buffer) -> None:
        self.buffers += 1

    def backward(self, work) -> dict:
        if not work.targets:
            assert work.rows == []
            return {}
        self.seen.append((*work.losses, [row.prompt for row in work.rows]))
        sums = {"sft": 0.0, "rl": 0.0, "value": 1.0, "tokens": 5}
        return sums | {name: 6.0 for name in work.losses}

    def take_step(self, G, schedule: float) -> tuple:
        self.schedule = schedule
        return 2.5, sum(name == "sft" for name, _ in self.seen) < self.fails


def rows_of_prompts(*prompts: int) -> list:
    rows = random_rows(len(prompts))
    for row, prompt in zip(rows, prompts, strict=True):
        row.prompt = prompt
    return rows


def test_minibatches_of_every_epoch():
    """Those of whole prompts, each pass over them in the same order; losses are means."""
    sft, rl = rows_of_prompts(0, 1, 2, 3, 4), rows_of_prompts(0, 0, 1, 4)
    batches = [
        ("sft", [0, 3]), ("rl", [0, 0]), ("sft", [1, 4]), ("rl", [1, 4]), ("sft", [2]), ("rl", []),
    ]  # fmt: skip
    learner = Passes(method="fixed", epochs=2, minibatches=3)
    step = amft.train_on(learner, 0.5, sft, rl, schedule=0.25, with_D=False)
    assert learner.seen == batches * 2
    assert (step.steps, step.finite, step.norm) == (6, True, 2.5)
    assert step.sums == {"sft": 6.0, "rl": 6.0, "value": 2.0, "tokens": 60}
    assert (step.D, step.halves) == (None, None)
    assert learner.schedule == 0.25
    assert learner.buffers == 6
    learner = Passes(fails=3, method="fixed", epochs=2, minibatches=3)
    step = amft.train_on(learner, 0.5, sft, rl, schedule=1.0, with_D=False)
    assert learner.seen == batches
    assert (step.steps, step.finite) == (2, False)
    assert step.sums == {"sft": 6.0, "rl": 6.0, "value": 2.0, "tokens": 30}


@pytest.mark.parametrize("method,buffers", [("amft", 2), ("gac", 4)])
def test_buffers_of_a_step(method, buffers):
    """G and D, and for gac two of halves: each is summed over the ranks."""
    sft, rl = rows_of_prompts(0, 1), rows_of_prompts(0, 1, 1)
    for with_D in (False, True):
        learner = Passes(method=method)
        step = amft.train_on(learner, 0.5, sft, rl, schedule=1.0, with_D=with_D)
        assert learner.buffers == (buffers if with_D else 1)
        assert (step.D is not None) == with_D
        assert (step.halves is not None) == (with_D and method == "gac")


def test_disagreement_is_not_negative():
    """|D|^2 = 25 less both variances, 4 and 9, or 20 and 9."""
    learner = types.SimpleNamespace(
        dot=lambda a, b: sum((x * y).sum().item() for x, y in zip(a, b, strict=True))
    )
    D = [torch.tensor([3.0, 4.0])]
    of_rl = [torch.tensor([0.0, 3.0])]
    for of_sft, apart in (([2.0, 0.0], 12), ([4.0, 2.0], 0)):
        halves = [torch.tensor(of_sft)], of_rl
        step = amft.Step([], D, 1.0, 1, True, {}, halves)
        variance = sum(x * x for x in of_sft)
        expected = {"variance/rl": 9, "variance/sft": variance, "disagreement": apart}
        assert amft.gradient_noise(learner, step) == expected


def groups_of_turns() -> list[list[Trajectory]]:
    """Three validation prompts with 2, 3 and 2 samples, some of two turns."""
    turns = [row.turn for row in random_rows(9, 4)]
    rewards = (1.0, 0.0, -1.0, 2.0, 0.5, 0.0, 3.0, 1.0, 1.0)
    turns = [t._replace(reward=r) for t, r in zip(turns, rewards, strict=True)]
    return [
        [Trajectory(turns[:1]), Trajectory(turns[1:2])],
        [Trajectory(turns[2:4]), Trajectory(turns[4:5]), Trajectory(turns[5:6])],
        [Trajectory(turns[6:8]), Trajectory(turns[8:9])],
    ]


def test_entropy_of_responses(process_group):
    """The mean over all tokens of all turns, row by row."""
    learner, groups = amft_learner(small_llama()), groups_of_turns()
    plain, entropies = PlainLosses(learner, [], []), []
    for trajectory in itertools.chain(*groups):
        for turn in trajectory.turns:
            entropies.append(plain.outputs(Row(turn, [])).entropy)
    expected = torch.cat(entropies).mean().item()
    assert learner.entropy(groups) == pytest.approx(expected, rel=1e-6)
    assert learner.entropy([]) == 0
    batches, filler = learner.batches, collate_rows(random_rows(1), 0, torch.device("cpu"))
    learner.batches = lambda rows: [*batches(rows), filler]
    assert learner.entropy(groups) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank,size", [(0, 1), (1, 2), (1, 3)])
def test_gradient_of_the_utility_by_halves(rank, size, process_group):
    """Against a loop over the samples: the prompts of even and of odd number over all ranks, each
    half a mean over its samples; the log-probability of all turns, by the episode's return."""
    # the discount is for the value head's targets: U is the reward itself
    learner, groups = amft_learner(small_llama(), turn_gamma=0.5), groups_of_turns()
    learner.world = replace(learner.world, rank=rank, size=size, replicas=size)
    direction = [torch.ones_like(p) for p in learner.local_params]
    plain, halves = PlainLosses(learner, [], []), {0: [], 1: []}
    returns = [(1, 0), (1, 0.5, 0), (4, 1)]
    advantages = [(1, -1), (0.75, 0, -0.75), (3, -3)]  # against the mean of the others
    for i, group in enumerate(groups):
        for trajectory, R, A in zip(group, returns[i], advantages[i], strict=True):
            assert trajectory.returns()[0] == R
            rows = [Row(turn, []) for turn in trajectory.turns]
            logprob = sum(plain.outputs(row).logp.sum() for row in rows)
            halves[(rank + i * size) % 2].append(A * logprob)
    slopes = []
    for terms in halves.values():
        slope = 0.0
        if terms:
            slope = flat(plain.gradient(sum(terms) / len(terms))).sum().item()
        slopes.append(slope)
    found, noise = amft.meta_gradient(learner, groups, direction)
    assert found == pytest.approx((slopes[0] + slopes[1]) / 2, rel=1e-5)
    assert noise == pytest.approx(abs(slopes[0] - slopes[1]) / 2, rel=1e-5)


def test_filler_of_a_learner(process_group):
    """A turn of the task, or one token."""
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    policy = Policy(small_llama(), False)
    for turn in (None, Turn([1, 2], [3], [0.0], True, "", 1.0)):
        learner = PolicyLearner(amft.Args(), policy, None, world, 5, turn)
        assert learner.filler == (turn or Turn([5], [5], [0.0], True, "", 0.0))
        assert not learner.replicated


# --------------------------------------------------------------------------------------------------
# The derivative of a step


def with_peak(optimizer):
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


class Restart:
    """What is trained and the optimizer as they were, as often as wanted."""

    def __init__(self, params, optimizer):
        self.params, self.optimizer = params, optimizer
        self.values = [p.detach().clone() for p in params]
        self.state = copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def __call__(self) -> None:
        for p, value in zip(self.params, self.values, strict=True):
            p.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self.state))


def with_adapters(model, r: int = 2) -> Adapters:
    """Adapters of the frozen model in its dtype, B not 0."""
    adapters = Adapters(
        model.requires_grad_(False), r=r, alpha=3.0, dropout=0.0, seed=0, rank_stabilised=False,
        target_modules=("q_proj", "o_proj", "down_proj"), device=torch.device("cpu"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    kind = next(model.parameters()).dtype
    adapters.phi = [
        0.3 * torch.randn(p.shape, generator=generator, dtype=kind) for p in adapters.phi
    ]
    adapters.train_phi()
    return adapters


@pytest.mark.parametrize(
    "preconditioner,clip,lora",
    [("adam", 1e9, False), ("adam", 0.5, False), ("none", 1e9, False), ("adam", 0.5, True)],
)
def test_meta_gradient_against_finite_differences(preconditioner, clip, lora, process_group):
    """< grad U(theta_t), d theta_t / d mu > equals the central difference of U(theta_t(mu)) to
    1e-4, U being an enumerated expectation."""
    model = small_llama(vocab_size=7)
    adapters = with_adapters(model) if lora else None
    params = adapters.phi if lora else list(model.parameters())
    optimizer = with_peak(torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1))
    settings = {"clip": clip, "meta_preconditioner": preconditioner}
    learner = amft_learner(model, optimizer, adapters, **settings)
    generator = torch.Generator().manual_seed(3)

    def noise(size: float) -> list[torch.Tensor]:
        shapes = [p.shape for p in learner.params]
        return [
            size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        ]

    for _ in range(11):
        learner.take_step(noise(0.3), 1.0)
    g_rl, g_sft, g_aux = noise(0.3), noise(0.3), noise(0.1)
    rewards = torch.randn(2, 49, generator=generator, dtype=torch.float64)
    responses = torch.cartesian_prod(torch.arange(7), torch.arange(7))  # all of two tokens

    def utility() -> torch.Tensor:
        """E[R] over two prompts, all 49 responses enumerated."""
        means = []
        for prompt, reward in zip(([1, 2, 3], [4, 5]), rewards, strict=True):
            ids = torch.cat([torch.tensor(prompt).expand(49, -1), responses], 1)
            logits = model(ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
            picked = logits.log_softmax(-1).gather(2, responses[..., None])
            means.append((picked.sum((1, 2)).exp() * reward).sum())
        return sum(means) / 2

    restart = Restart(learner.params, optimizer)

    def step(mu: float) -> amft.Step:
        restart()
        G = [(1 - mu) * r + mu * s + a for r, s, a in zip(g_rl, g_sft, g_aux, strict=True)]
        D = [s - r for r, s in zip(g_rl, g_sft, strict=True)]
        if preconditioner == "none":
            with torch.no_grad():
                for p, g in zip(learner.params, G, strict=True):
                    p.sub_(g, alpha=3e-3)
            return amft.Step(G, D, math.sqrt(learner.dot(G, G)), 1, True, {})
        norm, finite = learner.take_step(G, 1.0)
        return amft.Step(G, D, norm, 1, finite, {})

    taken = step(0.4)
    assert (taken.norm > clip) == (clip < 1)
    derivative = amft.derivative_by_mu(learner, taken)
    ours = learner.dot(torch.autograd.grad(utility(), learner.params), derivative)
    h, values = 1e-4, []
    for mu in (0.4 + h, 0.4 - h):
        step(mu)
        with torch.no_grad():
            values.append(utility().item())
    assert ours == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)
    assert abs(ours) > 1e-6


def test_the_gradient_of_adapters_is_that_of_the_merged_weights(process_group):
    """W + s B A has dL/dA = s B' dL/dW and dL/dB = s dL/dW A'; of G and of D."""
    rl, sft = random_rows(5, 1), random_rows(3, 2, demonstration=True)
    model = small_llama()
    adapters = with_adapters(model)
    learner = amft_learner(model, adapters=adapters)
    found = amft.train_on(learner, 0.4, sft, rl, schedule=1.0, with_D=True)
    merged = small_llama()
    layers, scale = dict(merged.named_modules()), 3.0 / 2
    with torch.no_grad():
        for i, name in enumerate(adapters.layers):
            A, B = adapters.phi[2 * i : 2 * i + 2]
            layers[name].weight += scale * (B @ A)
    whole = amft_learner(merged)
    expected = amft.train_on(whole, 0.4, sft, rl, schedule=1.0, with_D=True)
    names = [name for name, _ in whole.policy.named_parameters()]
    for ours, theirs in ((found.G, expected.G), (found.D, expected.D)):
        for i, name in enumerate(adapters.layers):
            A, B = (p.detach() for p in adapters.phi[2 * i : 2 * i + 2])
            dW = theirs[names.index(f"lm.{name}.weight")]
            torch.testing.assert_close(ours[2 * i], scale * (B.T @ dW), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(ours[2 * i + 1], scale * (dW @ A.T), rtol=1e-6, atol=1e-9)
    assert found.norm == pytest.approx(learner.dot(found.G, found.G) ** 0.5)


def test_adapters_on_two_ranks_and_merged(tmp_path):
    """With a value head and a meta-gradient: a checkpoint taken one step further by two ranks; the
    merged weights answer as base and adapter do; the frozen base has not moved."""
    settings = [
        *AMFT_RUN, "--steps", "3", "--save-every", "2", "--warmup-steps", "1", "--eval-every",
        "-1", "--advantage", "gae", "--mu-update", "shrunken", "--lora-r", "4", "--merge",
    ]  # fmt: skip
    first, second = tmp_path / "1", tmp_path / "2"
    assert run_here(amft, *settings, "--output-dir", first) == 0
    shutil.copytree(first, second, symlinks=True)
    shutil.rmtree(second / "step-000003")
    run_well("amft.py", *settings, "--output-dir", second, "--resume", ranks=2)
    one, two = logged(first), logged(second)
    assert one[:2] == two[:2]
    for key in ("grad_norm", "loss/rl", "loss/sft", "loss/value", "entropy", "grad_mu", "mu"):
        relative = 1e-3 if key == "grad_mu" else 1e-4
        assert one[2][key] == pytest.approx(two[2][key], rel=relative, abs=1e-7), key
    a, b = (load_file(x / "checkpoint" / "adapter_model.safetensors") for x in (first, second))
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], rtol=1e-5, atol=3e-5, msg=name)
    base, merged = (
        load_file(x / "model.safetensors") for x in (EMBEDDED["tiny_bare"], first / "merged")
    )
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        change = 0.0
        if f"{layer}.lora_A.weight" in a:
            A, B = (a[f"{layer}.lora_{x}.weight"].double() for x in "AB")
            change = (32 / 4) * (B @ A)
            assert change.abs().max() > 0
        expected = (weight.double() + change).float()
        torch.testing.assert_close(merged[name].float(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_that_does_not_depend_on_mu(process_group):
    """A clipped step along mu g_SFT is the same for every mu: no meta-gradient is taken, as its
    rounding would become the scale of the next."""
    model = small_llama()
    optimizer = with_peak(torch.optim.AdamW(model.parameters(), lr=1e-3))
    learner = amft_learner(model, optimizer)
    restart = Restart(learner.params, optimizer)
    g_sft = [torch.randn_like(p) for p in learner.params]
    g_rl = [torch.randn_like(p) for p in learner.params]

    def after(mu: float, scale: float, clip: float) -> tuple:
        """(whether the step depends on mu, the weights after it), with scale x g_RL."""
        learner.args.clip = clip
        restart()
        pairs = list(zip(g_sft, g_rl, strict=True))
        G = [mu * s + (1 - mu) * scale * r for s, r in pairs]
        D = [s - scale * r for s, r in pairs]
        norm, _ = learner.take_step(G, 1.0)
        derivative = amft.derivative_by_mu(learner, amft.Step(G, D, norm, 1, True, {}))
        weights = torch.cat([p.detach().flatten().clone() for p in learner.params])
        return derivative is not None, weights

    for scale, clip, expected in ((0.0, 0.5, False), (0.0, 1e9, True), (1e-3, 0.5, True)):
        (first, a), (second, b) = after(0.3, scale, clip), after(0.6, scale, clip)
        assert first == expected, (scale, clip)
        assert second == expected, (scale, clip)
        change = (a - b).abs().max().item()
        if not expected:
            assert change < 1e-9
        elif scale:
            assert change > 1e-7
    assert not amft.depends_on_mu(0.0, 0.0, 0.0, 0.5, "adam")


def test_the_derivative_takes_no_memory(process_group):
    """It is written over D, and G is given back before the validation's gradient is taken."""
    model = small_llama()
    optimizer = with_peak(torch.optim.AdamW(model.parameters(), lr=1e-3))
    learner = amft_learner(model, optimizer)
    G, D = ([torch.randn_like(p) for p in learner.params] for _ in range(2))
    norm, _ = learner.take_step(G, 1.0)
    step = amft.Step(G, D, norm, 1, True, {})
    assert amft.derivative_by_mu(learner, step) is D
    assert step.G is None
    assert step.D is None


def test_utility_gradient_is_unbiased(process_group):
    """Over all pairs of samples of a prompt, weighted by their probability, the estimate of grad_mu
    U is the exact inner product."""
    model = small_llama(vocab_size=5)
    learner = amft_learner(model, samples=2)
    generator = torch.Generator().manual_seed(5)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in learner.params
    ]
    prompt, rewards = [1, 2, 3], [0.0, 1.0, 0.5, -1.0, 2.0]
    p = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].softmax(-1)
    utility = (p * torch.tensor(rewards, dtype=torch.float64)).sum()
    exact = learner.dot(torch.autograd.grad(utility, learner.params), direction)
    expected = 0.0
    for pair in itertools.product(range(5), repeat=2):
        group = [Trajectory([Turn(prompt, [y], [0.0], True, "", rewards[y])]) for y in pair]
        alike = [group, group]  # the two halves
        estimate, _ = amft.meta_gradient(learner, alike, direction)
        expected += (p[pair[0]] * p[pair[1]]).item() * estimate
    assert expected == pytest.approx(exact, rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def embedded_task():
    """amft.load_task's answer to the default problems, which take seconds to make."""
    _, tokenizer = load_config("tiny_bare")
    return amft.load_task(amft.with_defaults(amft.Args(validation_size=8)), tokenizer)


def losses_in(row: dict) -> set[str]:
    """The parts of the loss that are not 0 in a row of metrics."""
    return {name for name in ("rl", "sft") if row[f"loss/{name}"] != 0}


BOTH, SFT, RL = {"rl", "sft"}, {"sft"}, {"rl"}


@pytest.mark.parametrize(
    "method,first,second",
    [
        ("amft", BOTH, BOTH),
        ("sft", SFT, SFT),
        ("rl", RL, RL),
        ("sft_then_rl", SFT, RL),
        ("fixed", BOTH, BOTH),
        ("chord", BOTH, BOTH),
        ("luffy", RL, RL),
        ("srft", RL, RL),
        ("hpt", BOTH, BOTH),
        ("gac", BOTH, BOTH),
    ],
)
def test_every_method_runs(method, first, second, tmp_path, embedded_task, monkeypatch):
    """Two steps of each method through the whole script: the parts of the loss that belong to it
    are there, and no other."""
    monkeypatch.setattr(amft, "load_task", lambda *_: embedded_task)
    settings = [
        "--method", method, "--steps", "2", "--prompts-per-step", "8", "--samples", "4",
        "--max-new-tokens", "32", "--validation-size", "8", "--eval-every", "-1", "--show", "0",
        "--warmup-steps", str(int(method == "sft_then_rl")),
    ]  # fmt: skip
    assert run_here(amft, *settings, "--output-dir", tmp_path / "r") == 0
    rows = logged(tmp_path / "r")
    for row in rows:
        assert math.isfinite(row["grad_norm"])
        assert row["grad_norm"] > 0
    assert [losses_in(row) for row in rows] == [first, second]
    sampled = {"sft": [0, 0], "sft_then_rl": [0, 32], "luffy": [24, 24]}  # luffy: 3 of 4 are own
    assert [row["samples/train"] for row in rows] == sampled.get(method, [32, 32])


def test_sft_then_rl_starts_afresh(tmp_path, embedded_task, monkeypatch):
    """After the SFT: no moments of it, and the rate rises again."""
    monkeypatch.setattr(amft, "load_task", lambda *_: embedded_task)
    made = []

    def capture(*args):
        made.append(adamw(*args))
        return made[-1]

    monkeypatch.setattr(amft, "adamw", capture)
    settings = [
        "--method", "sft_then_rl", "--steps", "5", "--warmup-steps", "3", "--warmup-lr", "2e-5",
        "--lr", "1e-5", "--lr-warmup", "2", "--warmup-batch", "4", "--prompts-per-step", "8",
        "--samples", "4", "--max-new-tokens", "32", "--eval-every", "-1", "--show", "0",
    ]  # fmt: skip
    assert run_here(amft, *settings, "--output-dir", tmp_path / "r") == 0
    rates = [row["lr"] for row in logged(tmp_path / "r")]
    assert rates == pytest.approx([1e-5, 2e-5, 2e-5, 0.5e-5, 1e-5])
    (optimizer,) = made
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_reward_of_ones_own(tmp_path, capsys):
    """docs/amft.md's example, run; what is wrong with one is said in one line."""
    page = (ROOT / "docs" / "amft.md").read_text()
    code = page.split("In `reward.py`:\n\n")[1].split("\n    python amft.py")[0]
    own = tmp_path / "reward.py"
    own.write_text(textwrap.dedent(code) + WRONG_REWARDS)
    settings = [
        "--method", "rl", "--steps", "1", "--prompts-per-step", "4", "--samples", "4",
        "--max-new-tokens", "32", "--eval-problems", "4", "--show", "2", "--validation-size", "8",
    ]  # fmt: skip
    flags = "--reward", f"{own}:short", "--output-dir", tmp_path / "r"
    assert run_here(amft, *settings, *flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "samples.jsonl").open()]
    assert any(row["noted"]["right"] for row in rows)
    for row in rows:
        saved = max(0.0, 1 - len(row["response"]) / 400)
        right = row["noted"]["right"]
        assert row["reward"] == pytest.approx((0.5 + 0.5 * saved) if right else 0.0)
    for name, message in (
        ("word", "could not convert string to float"),
        ("nothing", "KeyError: 'reward'"),
        ("nan", "gives nan"),
        ("fails", "ZeroDivisionError"),
        ("missing", "has no attribute 'missing'"),
        ("number", "is no function"),
    ):
        capsys.readouterr()
        assert run_here(amft, *settings, "--reward", f"{own}:{name}") == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if "--reward" in line]
        assert message in line
    args = amft.with_defaults(amft.Args(task="virl", reward=f"{own}:short"))
    with pytest.raises(DataError, match="--reward"):
        amft.check(args, 1)


def test_a_game_of_ones_own(tmp_path, capsys):
    """docs/games.md's example: its expert wins, it is trained on; a wrong name is one line."""
    page = (ROOT / "docs" / "games.md").read_text()
    code = page.split("In `higher.py`:\n\n")[1].split("\n    python amft.py")[0]
    (tmp_path / "higher.py").write_text(textwrap.dedent(code))
    task = f"{tmp_path / 'higher.py'}:games"
    train, _, _ = own_function(task, "--task")()
    _, tokenizer = load_config("tiny_games")
    tries = []
    for seed in range(20):
        episode = demonstrate(tokenizer, train, seed)
        assert episode.won
        tries.append(len(episode.turns))
    assert max(tries) == 5
    assert not train.step(train.reset(0), "no number").won
    settings = [*GAME_RUN, "--method", "amft", "--max-new-tokens", "8", "--output-dir"]
    assert run_here(amft, *settings, tmp_path / "r", "--task", task) == 0
    assert [row["samples/train"] for row in logged(tmp_path / "r")] == [0, 4]
    for wrong, message in ((f"{tmp_path}/none.py:games", "none.py"), ("chess", "general_points")):
        capsys.readouterr()
        assert run_here(amft, *settings, tmp_path / "r", "--task", wrong) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "--task" in x]
        assert message in line


WRONG_REWARDS = """

def word(prompt, response, row):
    return "good"


def nothing(prompt, response, row):
    return {"score": 1.0}


def nan(prompt, response, row):
    return float("nan")


def fails(prompt, response, row):
    return 1 / 0


number = 3
"""


def test_a_finished_run_goes_on(tmp_path, embedded_task, monkeypatch):
    """With --resume and more --steps it equals a run of so many steps from the start."""
    monkeypatch.setattr(amft, "load_task", lambda *_: embedded_task)
    settings = [
        "--warmup-steps", "1", "--mu-every", "2", "--prompts-per-step", "8", "--samples", "4",
        "--max-new-tokens", "32", "--eval-every", "-1", "--show", "0", "--validation-size", "8",
    ]  # fmt: skip
    short, long = tmp_path / "short", tmp_path / "long"
    assert run_here(amft, *settings, "--steps", "3", "--output-dir", short) == 0
    assert run_here(amft, *settings, "--steps", "5", "--output-dir", short, "--resume") == 0
    assert run_here(amft, *settings, "--steps", "5", "--output-dir", long) == 0
    assert [row["step"] for row in logged(short)] == [1, 2, 3, 4, 5]
    assert_same_weights(final_weights(short), final_weights(long))


def test_the_warm_up_has_its_own_rate(small_model, tmp_path, embedded_task, monkeypatch):
    """--warmup-lr takes the same steps as that --lr does."""
    monkeypatch.setattr(amft, "load_task", lambda *_: embedded_task)
    found = []
    for rates in (["--lr", "1e-3", "--warmup-lr", "2e-3"], ["--lr", "2e-3"]):
        folder = tmp_path / f"r{len(found)}"
        flags = ["--model", small_model, "--steps", "2", "--warmup-steps", "2", "--method", "sft"]
        flags += ["--lr-warmup", "1", "--prompts-per-step", "4", "--validation-prompts", "4"]
        flags += ["--validation-size", "8", "--eval-every", "-1", "--show", "0", *rates]
        assert run_here(amft, *flags, "--output-dir", folder) == 0
        assert [row["lr"] for row in logged(folder)] == [2e-3, 2e-3]
        found.append(final_weights(folder))
    assert_same_weights(*found)


def test_amft_two_ranks_equal_one(tmp_path):
    """The same checkpoint taken one step further, a step with a meta-gradient, by one rank, by two
    that share its shards, and by two replicas."""
    settings = [
        *AMFT_RUN, "--steps", "11", "--save-every", "10", "--mu-every", "11",
        "--eval-every", "-1", "--advantage", "gae", "--entropy-coefficient", "0.01",
    ]  # fmt: skip
    assert run_here(amft, *settings, "--output-dir", tmp_path / "1") == 0
    one, a = logged(tmp_path / "1"), final_weights(tmp_path / "1")
    assert [row["mu"] for row in one[:3]] == [1.0, 1.0, 0.5]  # two steps of warm-up
    for replicas in (1, 2):
        folder = tmp_path / f"2 of {replicas}"
        shutil.copytree(tmp_path / "1", folder, symlinks=True)
        shutil.rmtree(folder / "step-000011")
        more = ["--output-dir", folder, "--resume", "--replicas", replicas]
        run_well("amft.py", *settings, *more, ranks=2)
        two, b = logged(folder), final_weights(folder)
        assert one[:10] == two[:10]
        assert len(two) == 11
        for key in (
            "grad_norm", "loss/rl", "loss/sft", "loss/value", "entropy", "reward/mean",
            "response_length", "grad_mu", "mu",
        ):  # fmt: skip
            relative = 1e-3 if key == "grad_mu" else 1e-4
            assert one[10][key] == pytest.approx(two[10][key], rel=relative, abs=1e-7), key
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=3e-5, msg=name)


GAME_RUN = [
    "--steps", "2", "--warmup-steps", "1", "--prompts-per-step", "2", "--samples", "2",
    "--warmup-batch", "2", "--eval-problems", "2", "--show", "1", "--micro-batch", "4",
    "--save-every", "2", "--eta-entropy", "0.05",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["virl on two ranks", "vision"])
def test_games_run(kind, tmp_path, capsys):
    """Ranks with different numbers of turns keep step; pictures go through rollout, loss and
    checkpoint."""
    folder = tmp_path / "r"
    if kind == "vision":
        task = ["--task", "general_points", "--vision", "--max-new-tokens", "48"]
        assert run_here(amft, *GAME_RUN, *task, "--output-dir", folder) == 0
        assert "recognition" in capsys.readouterr().out
        checkpoint = str(folder / "checkpoint")
        config, _ = load_config(checkpoint)
        assert load_processor(checkpoint).image_processor is not None
        loaded = auto_class(config).from_pretrained(checkpoint)
        assert loaded.num_parameters() > 1e6
    else:
        task = ["--task", "virl", "--max-new-tokens", "64"]
        run_well("amft.py", *GAME_RUN, *task, "--output-dir", folder, ranks=2)
    rows = logged(folder)
    assert len(rows) == 2
    assert math.isfinite(rows[-1]["loss/rl"])
    assert rows[-1]["grad_norm"] > 0
    assert rows[-1]["entropy_target"] > 0
    assert (folder / "dynamics.png").exists()


# --------------------------------------------------------------------------------------------------
# The loop, step by step


class Watched:
    """What a run of amft.py does."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.rollouts, self.tokens, self.shown, self.steps, self.lengths = [], [], [], [], []
        self.rows, self.results, self.entropies, self.gradients, self.laps = [], [], [], [], []
        self.estimated = 0
        games = [Parity(name) for name in ("train", "shown", "validation", "test")]
        task = *games[:3], {"test": (games[3], 2)}, "halves"
        patch.setattr(amft, "load_task", lambda *_: task)
        patch.setattr(plots, "figure", lambda *_: None)
        for owner, name in (
            (Actor, "rollout"),
            (Actor, "demonstrate"),
            (PolicyLearner, "entropy"),
            (amft, "train_on"),
            (amft, "meta_gradient"),
            (amft, "estimate_advantages"),
        ):
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name: str, function):
        keep = getattr(self, f"of_{name}")

        def call(this, *args, **kwargs):
            answer = function(this, *args, **kwargs)
            keep(answer, *args, **kwargs)
            return answer

        return call

    def of_rollout(self, groups, game, seeds, samples, key, to_the_end=False) -> None:
        self.rollouts.append((game.name, list(seeds), samples, str(key), to_the_end))
        self.tokens.append(amft.tokens_sampled(groups))

    def of_demonstrate(self, trajectory, game, seed) -> None:
        self.shown.append((game.name, seed))

    def of_train_on(self, result, mu, sft, rl, schedule, with_D) -> None:
        self.steps.append((mu, len(sft), len(rl), schedule, with_D))
        self.rows.append(sum(row.length for row in sft + rl))
        self.results.append(result)

    def of_entropy(self, entropy, groups) -> None:
        self.entropies.append(entropy)

    def of_meta_gradient(self, found, groups, derivative) -> None:
        self.gradients.append(found)

    def of_estimate_advantages(self, nothing, rows) -> None:
        self.estimated += 1

    def run(self, model, folder, *flags) -> list[dict]:
        """The rows of its metrics, with the times."""
        settings = [
            "--model", model, "--prompts-per-step", "4", "--samples", "3", "--max-new-tokens", "8",
            "--validation-prompts", "2", "--validation-size", "5", "--lr", "1e-3", "--show", "1",
            "--eval-every", "-1", "--output-dir", folder,
        ]  # fmt: skip
        assert run_here(amft, *settings, *flags) == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def watched(monkeypatch) -> Watched:
    return Watched(monkeypatch)


LEARNED = [
    "--steps", "6", "--warmup-steps", "2", "--warmup-batch", "2", "--warmup-lr", "4e-3",
    "--lr-warmup", "4", "--mu-every", "2", "--eta-entropy", "0.05", "--eval-every", "4",
]  # fmt: skip


def seeds_of(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_the_steps_of_amft(watched, small_model, tmp_path, capsys):
    """Two steps of warm-up, four of both losses, of which every second has a meta-gradient."""
    rows = watched.run(small_model, tmp_path / "r", *LEARNED)
    assert watched.rollouts == [
        ("validation", seeds_of(0, 5), 3, "target", False),
        ("train", seeds_of(4, 4), 3, "2", False),
        ("train", seeds_of(8, 4), 3, "3", False),
        ("validation", [4, 5], 3, "3/validation", True),
        ("train", seeds_of(12, 4), 3, "4", False),
        ("train", seeds_of(16, 4), 3, "5", False),
        ("validation", [6, 7], 3, "5/validation", True),
    ]
    assert watched.shown == [("shown", seed) for seed in range(20)]
    mus = [row["mu"] for row in rows]
    assert mus[:4] == [1, 1, 0.5, 0.5]
    expected = [(1, 2, 0, 1.0, False), (1, 2, 0, 2.0, False)]
    for mu, schedule, with_D in zip(mus[2:], (0.75, 1, 1, 1), (0, 1, 0, 1), strict=True):
        expected.append((mu, 4, 12, pytest.approx(schedule), with_D))
    assert watched.steps == expected
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    assert [row["samples/train"] for row in rows] == [0, 0, 12, 12, 12, 12]
    assert [row["samples/validation"] for row in rows] == [0, 0, 15, 6, 0, 6]
    (target,) = watched.entropies
    for i, row in enumerate(rows):
        sums = watched.results[i].sums
        assert row["grad_norm"] == watched.results[i].norm
        assert (row["loss/sft"], row["loss/rl"]) == (sums["sft"], sums["rl"])
        if i < 2:
            assert not {"entropy_target", "grad_mu", "entropy", "reward/mean"} & row.keys()
            continue
        assert "reward/mean" in row
        assert row["entropy_target"] == target
        assert ("grad_mu" in row) == ("grad_mu_snr" in row) == (i in (3, 5))
        by_entropy = 0.05 * (target - row["entropy"]) if i in (3, 5) else 0
        assert row["mu_change/entropy"] == pytest.approx(by_entropy)
        change = row["mu_change/meta_gradient"] + by_entropy
        if i < 5:
            assert mus[i + 1] == pytest.approx(min(0.95, max(0.05, mus[i] + change)))
    assert mus[4] != 0.5
    for row, (gradient, noise) in zip(rows[3::2], watched.gradients, strict=True):
        assert row["grad_mu"] == gradient != 0
        assert row["grad_mu_snr"] == pytest.approx(abs(gradient) / noise)
    evaluated = logged(tmp_path / "r", "evaluations.jsonl")
    assert [row["step"] for row in evaluated] == [0, 2, 4, 6]
    out = capsys.readouterr().out
    size = sum(w.numel() for w in final_weights(tmp_path / "r").values())
    assert f"amft: {size / 1e6:.1f}M parameters, 1 rank(s)" in out
    for step in (0, 2, 4, 6):
        assert f"step {step}: test " in out
    assert out.count("are cut at --max-new-tokens 8") == 1
    assert out.endswith(f"; responses: {tmp_path / 'r' / 'samples.jsonl'}\n")


def test_tokens_per_second(watched, small_model, tmp_path):
    """Of what was sampled, and of all rows in all epochs; without samples there are none."""
    flags = ["--steps", "3", "--warmup-steps", "1", "--epochs", "2", "--method", "sft_then_rl"]
    rows = watched.run(small_model, tmp_path / "r", *flags, "--lr-warmup", "2")
    sampled = [0, *watched.tokens]
    assert min(watched.tokens) > 12
    for i, row in enumerate(rows):
        found = row["tokens_per_second/rollout"] * row["seconds/rollout"]
        assert found == pytest.approx(sampled[i])
        found = row["tokens_per_second/train"] * row["seconds/train"]
        assert found == pytest.approx(2 * watched.rows[i])
        assert {"seconds/rollout", "seconds/train", "seconds/mu"} < row.keys()
        assert row["samples/validation"] == 0
    assert [key for *_, key, _ in watched.rollouts] == ["1", "2"]
    # The optimizer is fresh after the warm-up, and its rate rises again
    assert watched.steps == [(1, 4, 0, 0.5, False), (0, 0, 12, 0.5, False), (0, 0, 12, 1, False)]


@pytest.mark.parametrize("method,samples,sft", [("luffy", 2, 0), ("srft", 3, 0), ("hpt", 3, 4)])
def test_samples_beside_demonstrations(method, samples, sft, watched, small_model, tmp_path):
    """luffy: one of --samples is the demonstration; hpt's gate of all samples lets none through."""
    gate = ["--hpt-gate", "3"] if method == "hpt" else []
    watched.run(small_model, tmp_path / "r", "--method", method, "--steps", "1", *gate)
    ((_, seeds, drawn, _, _),) = watched.rollouts
    assert (seeds, drawn) == ([0, 1, 2, 3], samples)
    own = {"luffy": 12, "srft": 16, "hpt": 0}[method]
    assert watched.steps == [(0, sft, own, 0.2, False)]


def test_the_steps_of_gac(watched, small_model, tmp_path):
    """mu after the first step by the noise of both gradients; with a value head."""
    flags = ["--method", "gac", "--advantage", "gae", "--steps", "3", "--warmup-steps", "1"]
    rows = watched.run(small_model, tmp_path / "r", *flags)
    assert [step[4] for step in watched.steps] == [False, True, True]
    assert watched.estimated == 2
    names = ("variance/rl", "variance/sft", "disagreement")
    assert not set(names) & rows[0].keys()
    noise = [rows[1][name] for name in names]
    assert noise[0] > 0
    assert noise[1] > 0
    change = noise[0] / sum(noise) - 0.5
    mus = [row["mu"] for row in rows]
    assert mus[:2] == [1, 0.5]
    assert mus[2] == pytest.approx(0.5 + max(-0.05, min(0.05, change)))
    assert all(row["loss/value"] > 0 for row in rows[1:])
    assert rows[0]["loss/value"] == 0


@pytest.mark.parametrize("method", ["amft", "gac"])
def test_steps_that_say_nothing_of_mu(method, watched, small_model, tmp_path, monkeypatch):
    """The first is not finite, in the second all samples are cut and masked."""
    train_on = amft.train_on

    def disturbed(learner, *args, **kwargs):
        result = train_on(learner, *args, **kwargs)
        if len(watched.steps) == 1:
            result.finite, result.norm = False, math.inf
        elif len(watched.steps) == 2:
            result.sums["tokens"] = 0
        return result

    monkeypatch.setattr(amft, "train_on", disturbed)
    flags = ["--method", method, "--steps", "3", "--warmup-steps", "0", "--mu-every", "1"]
    flags += ["--eta-entropy", "0.05"] if method == "amft" else []
    rows = watched.run(small_model, tmp_path / "r", *flags)
    assert [row["skipped_steps"] for row in rows] == [1, 1, 1]
    if method == "gac":
        assert ["disagreement" in row for row in rows] == [False, True, True]
        assert rows[1]["mu"] == 0.5
        return
    assert ["entropy_target" in row for row in rows] == [False, True, True]
    assert ["entropy" in row for row in rows] == [True, False, True]
    assert [row.get("mu_change/entropy") for row in rows[:2]] == [None, 0.0]
    assert rows[2]["mu_change/entropy"] != 0
    assert [row["mu"] for row in rows] == [0.5, 0.5, 0.5]
    assert ["grad_mu" in row for row in rows] == [False, False, True]  # Adam is warm


# --------------------------------------------------------------------------------------------------
# The policy that a run starts from


def built(model, world=None, **settings) -> tuple:
    """(the policy, its arguments) on one rank."""
    args = amft.with_defaults(amft.Args(model=str(model), **settings))
    config, _ = load_config(args.model)
    return amft.build(args, config, world or World(torch.device("cpu"), mesh=one_rank_mesh())), args


def checkpointed(policy) -> bool:
    """Whether activations are recomputed."""
    return any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())


def test_policy_of_all_weights(small_model, process_group):
    policy, _ = built(small_model, advantage="gae")
    expected = load_weights(str(small_model)).state_dict()
    assert_same_weights(policy.lm.state_dict(), expected)
    assert policy.value.weight.abs().sum() == policy.value.bias.abs().sum() == 0
    assert policy.training
    assert policy.adapters is None
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    assert not checkpointed(policy)
    policy, _ = built(small_model, activation_checkpointing=True)
    assert checkpointed(policy)
    assert not hasattr(policy, "value")


def test_policy_of_adapters(small_model, process_group):
    targets = ("q_proj", "up_proj")
    settings = {"lora_r": 2, "lora_alpha": 5.0, "target_modules": targets, "seed": 9}
    policy, _ = built(small_model, advantage="gae", **settings)
    adapters = policy.adapters
    assert not any(p.requires_grad for p in policy.lm.parameters())
    assert all(p.requires_grad for p in [*policy.value.parameters(), *adapters.phi])
    assert all(p.dtype == torch.float32 for p in policy.lm.parameters())
    assert adapters.scale == 2.5
    assert adapters.dropout == 0
    assert adapters.stack is adapters.phi
    assert {name.split(".")[-1] for name in adapters.layers} == set(targets)
    again, _ = built(small_model, **settings)
    other, _ = built(small_model, **settings | {"seed": 10})
    same = [torch.equal(adapters.phi[0], policy.adapters.phi[0]) for policy in (again, other)]
    assert same == [True, False]


def test_recomputed_activations_of_adapters(small_model, process_group):
    """The same gradient, though what enters a block of the frozen base has none."""
    found = []
    for recomputed in (False, True):
        policy, _ = built(small_model, lora_r=2, activation_checkpointing=recomputed)
        assert checkpointed(policy) == recomputed
        with torch.no_grad():
            for p in policy.adapters.phi[1::2]:
                p.fill_(0.1)
        batch = collate_rows(random_rows(2), 0, torch.device("cpu"))
        logprobs, _, _ = policy(batch["ids"], batch["mask"])
        logprobs.sum().backward()
        gradients = [p.grad for p in policy.adapters.phi]
        assert all(g.abs().max() > 0 for g in gradients)
        found.append(flat(gradients))
    torch.testing.assert_close(found[1], found[0])


def test_blocks_of_a_policy(small_model, process_group, monkeypatch):
    """Compiled if asked for; sharded, the whole last, where there is more than one rank."""
    compiled, sharded = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(amft, "fully_shard", lambda module, **how: sharded.append((module, how)))
    policy, _ = built(small_model, compile=True)
    blocks = list(policy.lm.model.layers)
    assert len(blocks) == 2
    assert compiled == blocks
    assert sharded == []
    world = World(torch.device("cpu"), size=2, mesh=one_rank_mesh())
    for settings, offloads, beside in (
        ({}, False, 0),
        ({"cpu_offload": True}, True, 0),
        ({"lora_r": 2}, False, 2),
    ):
        compiled.clear()
        sharded.clear()
        policy, _ = built(small_model, world, advantage="gae", **settings)
        assert compiled == []
        assert [module for module, _ in sharded] == [*policy.lm.model.layers, policy]
        for _, how in sharded:
            assert how["mp_policy"] == MixedPrecisionPolicy()
            assert isinstance(how["offload_policy"], CPUOffloadPolicy) == offloads
            assert len(how["ignored_params"]) == beside
            assert how["mesh"].size() == 1


def test_policy_on_gpus(small_model, process_group, monkeypatch):
    """fp32 master weights with bf16 compute; a frozen base is bf16 itself. One GPU is sharded too,
    for the casts; weights are read by rank 0 alone, and its head is checked."""
    sharded, given, checked, added, trusted = [], [], [], [], []

    def reads(name: str):
        function = getattr(amft, name)

        def read(*args, trust_remote_code=False):
            trusted.append(trust_remote_code)
            return function(*args)

        monkeypatch.setattr(amft, name, read)

    reads("load_weights")
    reads("skeleton")
    monkeypatch.setattr(amft, "fully_shard", lambda module, **how: sharded.append((module, how)))
    monkeypatch.setattr(amft, "materialize", lambda *args: given.append(args))
    monkeypatch.setattr(amft, "check_head", lambda *args: checked.append(args))
    monkeypatch.setattr(amft, "add_adapters", lambda *args: added.append(args))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for rank, settings, dtype, where in (
        (0, {}, torch.float32, cuda),
        (1, {"advantage": "gae"}, torch.float32, cuda),
        (0, {"cpu_offload": True}, torch.float32, cpu),
        (0, {"lora_r": 2, "trust_remote_code": True}, torch.bfloat16, cuda),
    ):
        sharded.clear()
        trusted.clear()
        world = World(cuda, rank=rank, mesh=one_rank_mesh())
        policy, args = built(small_model, world, **settings)
        assert [module for module, _ in sharded] == [*policy.lm.model.layers, policy]
        assert all(how["mp_policy"] == mixed for _, how in sharded)
        assert all(how["ignored_params"] == set() for _, how in sharded)
        target, source, device = given.pop()
        assert target is policy
        assert device == where
        assert (source is None) == (rank == 1)
        assert {p.dtype for p in policy.lm.parameters()} == {dtype}
        assert source is None or {p.dtype for p in source.lm.parameters()} == {dtype}
        assert checked.pop() == (policy, world)
        assert added == ([(args, policy, cuda)] if args.lora_r else [])
        assert trusted == [args.trust_remote_code] * (1 if rank else 2)


# --------------------------------------------------------------------------------------------------
# What is logged, and what other ranks add to it


@pytest.mark.parametrize(
    "method,options",
    [
        ("fixed", {}),
        ("fixed", {"loss_aggregation": "sequence"}),
        ("srft", {}),
        ("hpt", {"hpt_sft": 0.3}),
    ],
    ids=str,
)
def test_logged_losses(method, options, process_group):
    """The means themselves, not as mu weighs them, whether or not the step is differentiated."""
    learner = amft_learner(small_llama(), method=method, **options)
    own, shown = random_rows(7, 1), random_rows(3, 2, demonstration=True)
    rl, sft = (own + shown, []) if method == "srft" else (own, shown)
    plain = PlainLosses(learner, rl, sft)
    for with_D in (False, True):
        sums = amft.train_on(learner, 0.4, sft, rl, schedule=1.0, with_D=with_D).sums
        assert sums["rl"] == pytest.approx(plain.rl_loss().item(), rel=1e-5)
        assert sums["sft"] == pytest.approx(plain.sft_loss().item(), rel=1e-5)


def test_means_are_of_all_ranks(process_group, monkeypatch):
    """H and grad U where another rank has more tokens, and more samples of either half."""
    learner, groups = amft_learner(small_llama()), groups_of_turns()
    turns = [turn for group in groups for trajectory in group for turn in trajectory.turns]
    count = sum(len(turn.ids) for turn in turns)
    alone = learner.entropy(groups)
    direction = [torch.ones_like(p) for p in learner.local_params]
    # Of a half each
    slopes = [amft.meta_gradient(learner, [group], direction)[0] * 2 for group in groups]
    monkeypatch.setattr(World, "sum", lambda self, H, n: [H + 3.0, n + 5])
    assert learner.entropy(groups) == pytest.approx((alone * count + 3) / (count + 5), rel=1e-9)
    monkeypatch.setattr(World, "sum", lambda self, n: [n + 3])
    # Samples: 2 and 2 of the even prompts and 3 of the odd one, and 3 of the other rank
    first = (slopes[0] * 2 + slopes[2] * 2) / 7
    second = slopes[1] * 3 / 6
    found, noise = amft.meta_gradient(learner, groups, direction)
    assert found == pytest.approx((first + second) / 2, rel=1e-5)
    assert noise == pytest.approx(abs(first - second) / 2, rel=1e-5)


def test_inner_products_are_exact(process_group):
    """Where float32 would lose the small or overflow."""
    learner = amft_learner(small_llama(torch.float32))
    a = [torch.tensor([1e8, 1.0, -1e8]), torch.tensor([0.5])]
    assert learner.dot(a, [torch.ones(3), torch.ones(1)]) == 1.5
    huge = [torch.tensor([2e30])]
    assert learner.dot(huge, huge) == pytest.approx(4e60, rel=1e-6)


class TwoAlike(World):
    """As if a second rank had the same numbers."""

    def sum(self, *values: float) -> list[float]:
        return [2 * x for x in super().sum(*values)]


def test_counts_of_two_ranks(watched, small_model, tmp_path, monkeypatch):
    """Samples and tokens are of all ranks; the means of the log are not doubled."""
    setup = run.setup

    def two(replicas: int) -> World:
        world = setup(replicas)
        return TwoAlike(world.device, mesh=world.mesh)

    monkeypatch.setattr(run, "setup", two)
    rows = watched.run(small_model, tmp_path / "r", *LEARNED, "--eval-every", "-1")
    assert [row["samples/train"] for row in rows] == [0, 0, 24, 24, 24, 24]
    assert [row["samples/validation"] for row in rows] == [0, 0, 30, 12, 0, 12]
    of_games = iter(zip(watched.rollouts, watched.tokens, strict=True))
    sampled = [tokens for (game, *_), tokens in of_games if game == "train"]
    for i, row in enumerate(rows):
        found = row["tokens_per_second/train"] * row["seconds/train"]
        assert found == pytest.approx(2 * watched.rows[i])
        found = row["tokens_per_second/rollout"] * row["seconds/rollout"]
        assert found == pytest.approx(2 * sampled[i - 2] if i >= 2 else 0)
        assert 0 < row.get("entropy", 1) < math.log(1000)
        assert 0 <= row.get("reward/mean", 0) <= 1


# --------------------------------------------------------------------------------------------------
# What a run is made of


class Engine:
    """vLLM's place: our own sampler, which says that each token had half its probability."""

    made: list = []

    def __init__(self, *args, **settings):
        self.settings, self.calls, self.closed = settings, 0, 0
        self.made.append(self)

    def sample(self, *args, **settings) -> list[Sample]:
        self.calls += 1
        drawn = sample(*args, **settings)
        return [s._replace(logprobs=[x - math.log(2) for x in s.logprobs]) for s in drawn]

    def weights_changed(self, *_) -> None:
        pass

    def rest(self, *_) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("cap,weight", [(1.5, 1.5), (4.0, 2.0)])
def test_a_run_with_an_engine(cap, weight, watched, small_model, tmp_path, monkeypatch):
    """All samples are the engine's. pi / pi_engine is 2: it weighs every token, up to the cap, and
    the ratio of the policy to itself is 1."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "vllm" or real(name, *rest)
    )
    monkeypatch.setattr(amft, "VllmSampler", Engine)
    Engine.made, samples, train_on = [], [], amft.train_on

    def kept(learner, mu, sft, rl, *args, **settings):
        samples.extend(rl)
        return train_on(learner, mu, sft, rl, *args, **settings)

    monkeypatch.setattr(amft, "train_on", kept)
    flags = ["--sampler", "vllm", "--is-cap", cap, *LEARNED]
    rows = watched.run(small_model, tmp_path / "r", *flags)
    (engine,) = Engine.made
    assert engine.closed == 1
    plays = len(watched.rollouts) + 4 * 2  # and four evaluations: the test set, what is shown
    assert engine.calls == plays
    config, tokenizer = load_config(str(small_model))
    args = amft.Args(max_new_tokens=8)
    longest = amft.longest_row(args, config, tokenizer, None, Parity())
    assert engine.settings["longest"] == longest
    for row in rows[:2]:
        assert not {"engine/kl", "engine/cut"} & row.keys()
    for row in rows[2:]:
        assert row["engine/kl"] == pytest.approx(1 - math.log(2), abs=1e-4)
        assert row["engine/cut"] == (1 if cap < 2 else 0)
        assert row["approx_kl"] == pytest.approx(0, abs=1e-5)
        assert row["clip_fraction"] == 0
    assert len(samples) == 4 * 12
    for row in samples:
        assert row.importance == pytest.approx([weight] * len(row.turn.ids), rel=1e-4)


def test_what_plays_in_a_run(watched, small_model, tmp_path, monkeypatch):
    """The actor's settings; evaluations play the tests, and show answers to validation prompts."""
    actors, evaluations = [], []
    actor, evaluate = amft.Actor, amft.evaluate

    def made(*args, **settings):
        actors.append((args, settings))
        return actor(*args, **settings)

    def evaluated(args, actor, tests, validation, step):
        games = {name: (game.name, count) for name, (game, count) in tests.items()}
        evaluations.append((games, validation.name, step))
        return evaluate(args, actor, tests, validation, step)

    monkeypatch.setattr(amft, "Actor", made)
    monkeypatch.setattr(amft, "evaluate", evaluated)
    flags = ["--method", "rl", "--steps", "1", "--eval-every", "0", "--generation-batch", "7"]
    flags += ["--seed", "3", "--micro-batch", "5"]
    watched.run(small_model, tmp_path / "r", *flags)
    ((policy, lm, *_, processor, _), settings) = actors.pop()
    assert policy.lm is lm
    assert processor is None
    assert settings.pop("stop").requested is False
    expected = {"seed": 3, "max_new_tokens": 8, "batch_size": 7, "sampler": sample}
    assert settings == expected
    assert evaluations == [({"test": ("test", 2)}, "validation", step) for step in (0, 1)]


def test_demonstrations_of_the_prompts_sampled(watched, small_model, tmp_path, monkeypatch):
    """Also of those that have made way for others; what was drawn for it counts."""

    def others(args, actor, game, seeds, samples, step):
        seeds = [seed + 100 for seed in seeds]
        return seeds, actor.rollout(game, seeds, samples, step), 99

    monkeypatch.setattr(amft, "rollout", others)
    rows = watched.run(small_model, tmp_path / "r", "--method", "fixed", "--steps", "2")
    assert watched.shown == [("shown", seed) for seed in range(100, 108)]
    assert [row["samples/train"] for row in rows] == [99, 99]


def test_merged_at_the_end(watched, tmp_path, monkeypatch):
    """Not where a signal has ended the run before; with the tokenizer. The adapter names its base
    by a folder, as PEFT does not know the embedded models."""
    train_on = amft.train_on

    def stopped(learner, *args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_on(learner, *args, **settings)

    folder = tmp_path / "r"
    flags = ["--method", "sft", "--steps", "2", "--lora-r", "2", "--merge"]
    with monkeypatch.context() as patch:
        patch.setattr(amft, "train_on", stopped)
        assert len(watched.run("tiny_bare", folder, *flags)) == 1
    assert not (folder / "merged").exists()
    assert len(watched.run("tiny_bare", folder, *flags, "--resume")) == 2
    _, tokenizer = load_config(str(folder / "merged"))
    assert len(tokenizer) == len(load_config("tiny_bare")[1])
    config = json.loads((folder / "checkpoint" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(EMBEDDED["tiny_bare"])
    weights = load_file(folder / "merged" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_filler_of_a_run_in_pictures(tmp_path, monkeypatch):
    """A turn with its picture, as all ranks must call the vision part."""
    learners = []

    class Kept(PolicyLearner):
        def __init__(self, *args):
            super().__init__(*args)
            learners.append(self)

    monkeypatch.setattr(amft, "PolicyLearner", Kept)
    monkeypatch.setattr(plots, "figure", lambda *_: None)
    flags = ["--task", "general_points", "--vision", "--method", "sft", "--steps", "1"]
    flags += ["--prompts-per-step", "2", "--warmup-batch", "2", "--warmup-steps", "0"]
    flags += ["--validation-prompts", "2", "--eval-every", "-1", "--show", "0"]
    assert run_here(amft, *flags, "--output-dir", tmp_path / "r") == 0
    filler = learners[0].filler
    assert filler.inputs["pixel_values"].abs().sum() > 0
    assert filler.finished
    assert set(filler.old_logprobs) == {0.0}
