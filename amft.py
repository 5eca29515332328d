r"""AMFT: imitation and exploration in one stage, balanced by a learned weight; and its rivals.

    L_RL  = -E_{y ~ pi}[ min(r A, clip(r, 1 - eps, 1 + eps) A) ]                                 (1)
    L_SFT = -E_{(x, y) ~ D}[ log pi(y | x) ]                                                     (2)
    L     = (1 - mu) L_RL + mu L_SFT,   theta <- clipped AdamW(theta, grad L)                    (3)
    U     = E[reward on validation]                                                              (4)
    grad_mu U = < grad U(theta_t), d theta_t / d mu >,  of the step that was just taken          (5)
    mu    <- clip( mu + eta_mu grad_mu U + eta_H (H* - H(pi)), mu_min, mu_max )                  (6)
with r = pi / pi_old, A the advantage, H the entropy and H* that after the warm-up. Algorithm 1, a
step: (a) prompts with demonstrations, (b) own samples with rewards, (c) every K steps (4) to (6),
(d) the update (3). Here (c) comes after (d), as it differentiates the step that (d) takes.
"AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance",
arXiv 2508.06944. A later arXiv record (v3) says that the paper is under investigation and that its
authors asked to withdraw it; its public code cannot produce its results. This is an independent
implementation of the published algorithm.

What is done differently, and why:
1. The meta-gradient is real: two backward passes at theta give g_SFT and g_RL, validation rollouts
   at the new theta give grad U (a policy gradient with a leave-one-out baseline), and one inner
   product joins them. The paper's code has a placeholder there.
2. --meta-preconditioner adam (default) differentiates the clipped AdamW step that training takes;
   none is eq. (5), which is for SGD.
3. --mu-update shrunken (default) moves mu by a running mean of grad_mu U over its running RMS, less
   where that does not stand out of its noise, and without the entropy term: it follows its gradient
   in docs/studies/balance.md (there with K = 2). With the published constants eq. (6) moves mu by
   next to nothing (docs/amft.md); --mu-update printed does just that.
4. --entropy-sign printed is eq. (6); text is what the paper's words say, the opposite.
5. A step's demonstrations are those of its prompts, so that every --method sees the same prompts
   and demonstrations.
6. Rollouts are taken at temperature 1 and top-p 1: the log-probabilities are those of the
   distribution sampled from.
Everything in which the methods differ is in the table METHODS.

    python amft.py                              # laptop: embedded model and problems, 3 minutes
    torchrun --standalone --nproc_per_node 8 amft.py --model Elliott/Qwen2.5-Math-7B-16k-think \
        --data hub --lr 1e-6 --steps 500 --mu-every 20 --prompts-per-step 128 \
        --validation-size 128 --max-length 9216 --max-new-tokens 8192 --generation-batch 32 \
        --micro-batch 2 --activation-checkpointing
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank $R --master_addr $HOST --master_port 29500 \
        amft.py --replicas 2 ...
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
import tyro
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from data import DataError, check_numbers
from games import games_of
from games.play import Actor, Trajectory, demonstrate
from games.problems import load_demonstrations, load_problems
from games.rules import own_function
from learner import Pass, PolicyLearner, Row, Tokens, adamw, token_count, trained_weights
from lora import AdapterCheckpoint, Adapters, adapter_size, check_targets, write_merged
from measure import (
    equally_good,
    play_tests,
    rollout_metrics,
    rollout_warnings,
    sample_rows,
    tests_lines,
    tests_table,
)
from model import (
    World,
    activation_bytes,
    cache_bytes,
    check_head,
    check_positions,
    gathered,
    layers_to_shard,
    load_readers,
    load_weights,
    local,
    logit_bytes,
    materialize,
    parameter_count,
    resolve,
    skeleton,
    turn_off_dropout,
)
from policy import Policy, sample
from run import (
    ModelCheckpoint,
    Needs,
    Run,
    check_space,
    rate_warnings,
    start,
)
from vllm_sampler import VllmSampler, check_flags, engine_bytes


@dataclass
class Args:
    """AMFT, and under the same budget: SFT, GRPO or PPO, SFT then RL, a fixed weight, CHORD, LUFFY,
    SRFT, HPT, GAC."""

    # What is trained, on what
    task: str = "math"
    """Where prompts, demonstrations and rewards come from: math (games/problems.py),
    general_points, virl, or FILE.py:FUNCTION, which gives games of your own (docs/games.md). It
    sets the defaults that are "by task"; your own have general_points'."""
    model: str | None = None
    """tiny, tiny_bare (tiny with a habit of bare answers), a local folder in Hugging Face format,
    or a hub name. By task: tiny_bare, tiny_games (tiny after the experts' answers, with the same
    habit), tiny_vision with --vision."""
    data: str = "embedded"
    """embedded, hub (Elliott/Openr1-Math-46k-8192), or a file or folder with problem, solution and
    answer; see data.py."""
    subjects: tuple[str, ...] = ()
    """Only problems of these subjects (columns subject or type)."""
    levels: tuple[int, ...] = ()
    """Only problems of these levels."""
    sft_data: str | None = None
    """math: demonstrations of other problems than those of --data: a file or folder like it."""
    suffix: str | None = None
    """math: text after every problem. Default: a request to reason and to box the answer (none for
    embedded problems)."""
    reward: str | None = None
    """math: a reward of your own, MODULE:FUNCTION or FILE.py:FUNCTION, of (prompt, response, row):
    a number, or a dict with one as "reward". Default: 1 for a right final answer, else 0."""
    validation_size: int = 64
    """math: training problems set apart for U, the validation reward that mu's gradient is taken
    of."""
    rule: Literal["10", "11_12_13"] = "10"
    """general_points: what J, Q and K count in training; the other rule is the out-of-distribution
    test."""
    suits: Literal["black", "red"] = "black"
    """general_points with --vision: the cards in training; the others are the visual out-of-
    distribution test."""
    actions: Literal["absolute", "relative"] = "absolute"
    """virl: what turn_direction takes in training; the other is the out-of-distribution test."""
    routes: str | None = None
    """virl: a route file of the original for training, instead of the procedural city."""
    test_routes: str | None = None
    """virl: a route file for the tests."""
    vision: bool = False
    """Games in pictures, for a model of AutoModelForImageTextToText (default: tiny_vision)."""
    full_prompts: bool = False
    """Games: the originals' long prompts and routes. Without: short ones, for the embedded
    model."""
    max_length: int = 2048
    """Tokens of a prompt and its demonstration; longer ones are left out and counted."""
    output_dir: str = "runs/amft"
    """Run folder: args.json, metrics.jsonl, evaluations.jsonl, samples.jsonl, dynamics.png,
    checkpoints. A folder in use gets a number appended."""
    seed: int = 42
    """Prompts and samples are a function of (seed, step, place)."""

    # The method
    method: Literal[
        "amft", "sft", "rl", "sft_then_rl", "fixed", "chord", "luffy", "srft", "hpt", "gac"
    ] = "amft"
    """amft; sft; rl (GRPO or PPO, see --advantage); sft_then_rl (the warm-up, then rl with a fresh
    optimizer); fixed (constant mu = --mu-init); chord (2508.11408); luffy (2504.14945); srft
    (2506.19767); hpt (2509.04419); gac (mu from the gradients' noise, 2605.26184)."""
    steps: int | None = None
    """Optimizer steps (times --epochs and --minibatches), the warm-up included. By task: 80, 70,
    30."""
    warmup_steps: int | None = None
    """W, SFT steps at the beginning, counted in --steps. Default: 5 for amft, half of the steps for
    sft_then_rl, 0 for the other methods; 20 with --vision."""
    warmup_batch: int | None = None
    """Demonstrated prompts per warm-up step. Default: --prompts-per-step; 32 with --vision."""
    warmup_lr: float | None = None
    """Learning rate of the warm-up, that is of the SFT of sft_then_rl. Default: --lr; 1e-3 with
    --vision."""
    lr: float | None = None
    """alpha, AdamW (paper's code: 1e-6 for 7B models). Default: 3e-5; with --vision 1e-4, since
    tiny_vision is still learning to read; 3e-4 with --lora-r."""
    lr_warmup: int = 5
    """Steps of linearly rising learning rate; constant after it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    weight_decay: float = 0.0
    """AdamW."""
    clip: float = 1.0
    """C, limit of the gradient's norm."""

    # Reinforcement learning
    prompts_per_step: int | None = None
    """Prompts (games: deals, routes) per step, over all ranks. By task: 16, 8, 4."""
    samples: int | None = None
    """G, responses per prompt (luffy: one of them is the demonstration). By task: 8, 8, 4."""
    max_new_tokens: int = 96
    """Longest response (of a turn)."""
    advantage: Literal["grpo", "mean", "gae"] = "grpo"
    """grpo: reward against its group, in standard deviations; mean: not divided by them (Dr. GRPO,
    2503.20783); gae: PPO with a value head (the paper's)."""
    clip_ratio: float = 0.2
    """eps of the clipped surrogate."""
    clip_ratio_high: float | None = None
    """Its upper eps, for ratios above 1 (DAPO, 2503.14476: 0.28). Default: --clip-ratio."""
    dynamic_sampling: int = 0
    """Prompts whose samples are all equally good are replaced by others, in at most so many rounds
    (DAPO; 0: they stay, and teach nothing)."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """token: mean over all response tokens (DAPO's); sequence: each response first (the original
    GRPO)."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus (paper's code: 0.01)."""
    value_coefficient: float = 0.1
    """Weight of the value loss (gae)."""
    value_lr: float = 1e-3
    """Learning rate of the value head (paper's code: 5e-6 for 7B models)."""
    gae_lambda: float = 0.95
    """lambda of GAE over tokens; gamma is 1."""
    turn_gamma: float = 1.0
    """Discount over the turns of an episode (games)."""
    epochs: int = 1
    """Passes over a step's rollouts."""
    minibatches: int = 1
    """Optimizer steps per pass (LUFFY's configuration: 2)."""
    mask_truncated: bool = False
    """Leave responses that were cut at --max-new-tokens out of the loss."""
    sampler: Literal["own", "vllm"] = "own"
    """own: policy.py's; vllm: an engine of vLLM in each process, which gets the new weights before
    it draws (pip install vllm)."""
    is_cap: float | None = None
    """vllm: C of the truncated importance weights min(pi / pi_engine, C) of its samples' tokens. 0:
    none, and pi_old is the engine's. Default: 2."""

    # The controller of mu
    mu_init: float = 0.5
    """mu at the start (the paper's code has 0.8, its README 0.5); the constant of --method
    fixed."""
    mu_min: float = 0.05
    """Lowest mu."""
    mu_max: float = 0.95
    """Highest mu."""
    mu_every: int = 5
    """K, steps between meta-gradients (paper: 20; a demonstration of 80 steps wants more than
    four)."""
    meta_preconditioner: Literal["adam", "none"] = "adam"
    """d theta / d mu of the clipped AdamW step (adam), or eq. (5) as printed (none)."""
    mu_update: Literal["shrunken", "normalised", "printed"] = "shrunken"
    """shrunken: a running mean of the meta-gradient over its running RMS, shrunk by how far it
    stands out of its noise; normalised: the meta-gradient divided by its running RMS; both every K
    steps; printed: eq. (6)."""
    eta_mu: float | None = None
    """Default: 0.2 shrunken, 0.05 normalised, 1e-4 printed."""
    eta_entropy: float | None = None
    """Per nat. Default: 0 (no entropy term) shrunken, 0.05 normalised, 5e-4 printed."""
    entropy_sign: Literal["printed", "text"] = "printed"
    """printed: + eta_H (H* - H), as in eq. (6); text: the opposite, as in the paper's words. Where
    eta_H is not 0."""
    validation_prompts: int | None = None
    """Validation prompts per meta-gradient, with --samples responses each, over all ranks. Default:
    --prompts-per-step."""
    no_meta_gradient: bool = False
    """Ablation: the entropy term alone moves mu; it needs --eta-entropy, or --mu-update normalised
    or printed."""
    no_entropy_term: bool = False
    """Ablation: the meta-gradient alone moves mu (shrunken: so by default)."""

    # The other methods
    sft_weight: Literal["none", "phi", "dft"] = "none"
    """What a demonstration token's loss is multiplied by, p its probability now: 1; p (1 - p)
    (CHORD's phi); p (dynamic fine-tuning, 2508.05629)."""
    chord_start: float = 0.9
    """chord: mu at the start of its cosine; with chord_end the same, a constant."""
    chord_end: float = 0.05
    """chord: mu at its end."""
    chord_steps: int | None = None
    """chord: length of the cosine. Default: to the end of the run."""
    chord_warmup: int = 0
    """chord: steps of linearly rising mu before it."""
    luffy_gamma: float = 0.1
    """luffy: gamma of the shaping pi / (pi + gamma)."""
    hpt_gate: int = 0
    """hpt: a prompt with at most so many right samples is trained on its demonstration instead (2
    for weaker models)."""
    hpt_sft: float = 1.0
    """hpt: weight of such demonstrations (0.3 for the 1.5B model)."""

    # LoRA (0: all weights are trained)
    lora_r: int = 0
    """Rank of LoRA adapters (arXiv 2106.09685) that are trained in place of the weights; 0 for
    none. Checkpoints are then in PEFT's format."""
    lora_alpha: float = 32
    """Scale: alpha / r."""
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers with an adapter, by the last part of their names."""
    merge: bool = False
    """At the end also write the base with the adapter merged into its weights (Hugging Face format)
    to merged/ of the run folder."""

    # Evaluation, logging, checkpoints
    eval_every: int = 20
    """Steps between evaluations; also before the first, after the warm-up and after the last. 0:
    only those; -1: none."""
    eval_problems: int | None = None
    """Problems or episodes of each test set, greedy. By task: 140, 70, 70; games with --full-
    prompts 234, as in the papers."""
    show: int = 2
    """Prompts whose sampled responses are written to samples.jsonl at evaluations; the best and the
    worst are printed."""
    save_every: int = 40
    """Steps between checkpoints; also at the end and on Ctrl-C or SIGTERM."""
    keep: int = 3
    """Checkpoints kept."""
    resume: bool = False
    """Continue the newest checkpoint of --output-dir."""
    dry_run: bool = False
    """Check versions, devices, model, data, memory and disk without reading weights; exit status 1
    if the run could not finish."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb; WANDB_MODE=offline works)."""
    push_to_hub: str | None = None
    """Upload the last checkpoint to this repository of the hub (after hf auth login)."""

    # Machine
    replicas: int = 1
    """R: the ranks form R groups that shard their own copy of the model; gradients are summed over
    them."""
    micro_batch: int = 32
    """Sequences per forward and rank."""
    generation_batch: int = 128
    """Sequences generated together on a rank."""
    activation_checkpointing: bool = False
    """Recompute activations in backward."""
    cpu_offload: bool = False
    """FSDP2's offload: parameters and optimizer in CPU memory, streamed to the GPU."""
    compile: bool = False
    """torch.compile each transformer block."""
    vllm_eager: bool = False
    """vllm: neither compile nor CUDA graphs: a quicker start, slower sampling."""
    vllm_sleep: bool = False
    """vllm: its weights and cache leave the GPU while the policy is trained."""
    trust_remote_code: bool = False
    """Let a hub model run its own code."""


# What may differ when a run is resumed: it does not change the mathematics.
FREE = {
    "resume", "output_dir", "wandb", "push_to_hub", "save_every", "keep", "eval_every", "show",
    "replicas", "micro_batch", "generation_batch", "activation_checkpointing", "cpu_offload",
    "compile", "dry_run", "merge", "vllm_eager", "vllm_sleep",
    "steps",  # the learning rate is constant
}  # fmt: skip


def with_defaults(args: Args) -> Args:
    """The defaults that depend on the task and the method."""
    games_model = "tiny_vision" if args.vision else "tiny_games"
    games_episodes = 234 if args.full_prompts else 70
    by_task = {
        "math": {"model": "tiny_bare", "steps": 80, "prompts_per_step": 16, "samples": 8},
        "general_points": {"model": games_model, "steps": 70, "prompts_per_step": 8, "samples": 8},
        "virl": {"model": games_model, "steps": 30, "prompts_per_step": 4, "samples": 4},
    }
    task = args.task if args.task in by_task else "general_points"
    defaults = by_task[task] | {"lr": 3e-4 if args.lora_r else 3e-5}
    defaults["eval_problems"] = 140 if args.task == "math" else games_episodes
    args = _filled(args, {"steps": by_task[task]["steps"]})
    defaults["warmup_steps"] = {"amft": 5, "sft_then_rl": args.steps // 2}.get(args.method, 0)
    if args.vision:  # tiny_vision is still learning to read
        defaults |= {"lr": 1e-4, "warmup_lr": 1e-3, "warmup_steps": 20, "warmup_batch": 32}
    args = _filled(args, defaults)
    of_these = {"warmup_batch": args.prompts_per_step, "validation_prompts": args.prompts_per_step}
    if args.sampler == "vllm":
        of_these["is_cap"] = 2.0
    if args.method == "chord":
        of_these["chord_steps"] = max(1, args.steps - args.warmup_steps - args.chord_warmup)
    return _filled(args, of_these | {"warmup_lr": args.lr, "clip_ratio_high": args.clip_ratio})


def _filled(args: Args, defaults: dict) -> Args:
    return replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})


# --------------------------------------------------------------------------------------------------
# Losses: one number a token. Its weight in the mean: token_mean and its like, below.


def ppo_loss(t: Tokens, args: Args) -> torch.Tensor:
    """Clipped surrogate, Schulman et al. 2017, eq. (7); with two bounds, DAPO's (2503.14476)."""
    ratio = (t.logprobs - t.old).exp()
    clipped = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio_high)
    return -torch.minimum(ratio * t.advantages, clipped * t.advantages)


def reinforce_loss(t: Tokens, args: Args) -> torch.Tensor:
    """The surrogate without clipping (LUFFY's and HPT's own samples)."""
    return -(t.logprobs - t.old).exp() * t.advantages


def luffy_loss(t: Tokens, args: Args) -> torch.Tensor:
    """Own samples by their ratio, demonstrations by pi / (pi + gamma), differentiated through.

    2504.14945, eq. (5).
    """
    p = t.logprobs.exp()
    shaped = -p / (p + args.luffy_gamma) * t.advantages
    return torch.where(t.demonstration, shaped, reinforce_loss(t, args))


def srft_loss(t: Tokens, args: Args) -> torch.Tensor:
    """2506.19767: 0.5 exp(-H) (-log pi) + clipped surrogate on demonstrations.

    Own samples: 0.1 exp(H) (-log pi) if right, log pi if wrong. H: the response's mean entropy,
    without gradient. The paper says that the weight of right samples rises with the entropy; a
    public summary prints exp(-H) there. log pi of wrong samples has no lower bound: one step per
    rollout.
    """
    H = (t.entropy.detach().sum(1) / t.mask.sum(1))[:, None]  # [B, 1]
    on_demonstrations = 0.5 * torch.exp(-H) * -t.logprobs + ppo_loss(t, args)
    on_own = torch.where(t.right, 0.1 * torch.exp(H) * -t.logprobs, t.logprobs)
    return torch.where(t.demonstration, on_demonstrations, on_own)


def sft_loss(t: Tokens, args: Args) -> torch.Tensor:
    """-log pi, eq. (2), weighted by --sft-weight; the weight is a constant to the gradient.

    phi: 2508.11408; dft: 2508.05629, eq. (9).
    """
    p = t.logprobs.detach().exp()
    weight = {"none": 1.0, "phi": p * (1 - p), "dft": p}[args.sft_weight]
    return -weight * t.logprobs


def value_loss(t: Tokens, args: Args) -> torch.Tensor:
    return 0.5 * (t.values - t.value_targets).square()


def entropy_bonus(t: Tokens, args: Args) -> torch.Tensor:
    return -t.entropy


def auxiliary_losses(args: Args) -> dict[str, tuple[Callable, float]]:
    """By name, with its coefficient: what mu does not weigh. None by default."""
    losses = {}
    if args.advantage == "gae":
        losses["value"] = value_loss, args.value_coefficient
    if args.entropy_coefficient > 0:
        losses["bonus"] = entropy_bonus, args.entropy_coefficient
    return losses


def utility_loss(t: Tokens, args: Args) -> torch.Tensor:
    """The loss whose gradient is -grad U (4), with leave-one-out advantages."""
    return -t.logprobs * t.advantages


# --------------------------------------------------------------------------------------------------
# The weight of a row's tokens in the mean


class Counts(NamedTuple):
    """Of a step's rows, over all ranks."""

    own: int  # samples in L_RL
    own_tokens: int
    shown: int  # demonstrations in L_RL
    shown_tokens: int
    sft_tokens: int


def token_mean(row: Row, n: Counts, args: Args) -> float:
    """DAPO's mean over all tokens, or with --loss-aggregation sequence of each response first."""
    if args.loss_aggregation == "sequence":
        return 1 / (n.own * len(row.turn.ids))
    return 1 / n.own_tokens


def luffy_mean(row: Row, n: Counts, args: Args) -> float:
    """1 / (responses x longest): Dr. GRPO's form of the mean."""
    return 1 / ((n.own + n.shown) * args.max_new_tokens)


def srft_mean(row: Row, n: Counts, args: Args) -> float:
    """1 / (tokens of the demonstrations, or of all samples, right and wrong)."""
    return 1 / (n.shown_tokens if row.demonstration else n.own_tokens)


def hpt_mean(row: Row, n: Counts, args: Args) -> float:
    """1 / (all prompts x samples x longest), prompts trained on their demonstration included."""
    prompts = args.prompts_per_step / args.minibatches
    return 1 / (prompts * args.samples * args.max_new_tokens)


def sft_mean(row: Row, n: Counts, args: Args) -> float:
    """1 / tokens of all demonstrations."""
    return 1 / n.sft_tokens


def hpt_sft_mean(row: Row, n: Counts, args: Args) -> float:
    """--hpt-sft / (all prompts x the demonstration's own length)."""
    prompts = args.prompts_per_step / args.minibatches
    return args.hpt_sft / (prompts * len(row.turn.ids))


# --------------------------------------------------------------------------------------------------
# Advantages


def group_advantages(
    returns: Sequence[float], baseline: Literal["grpo", "mean", "leave_one_out"]
) -> list[float]:
    """Advantages of a prompt's responses from their returns R.

    grpo: (R - mean) / (std + 1e-4), std with n - 1 (2402.03300); mean: R - mean (LUFFY, HPT);
    leave_one_out: R - mean of the others, the unbiased baseline that grad U needs.
    """
    n = len(returns)
    if n < 2:
        return [0.0] * n
    mean = sum(returns) / n
    if baseline == "mean":
        return [r - mean for r in returns]
    if baseline == "leave_one_out":
        return [(r - mean) * n / (n - 1) for r in returns]
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / (n - 1))
    return [(r - mean) / (std + 1e-4) for r in returns]


def gae(values: Sequence[float], reward: float, lam: float) -> list[float]:
    """Generalised advantage estimation over the tokens of a response (1506.02438, eq. 16).

    gamma = 1, the reward comes after the last token.
    """
    advantages, advantage, following = [], 0.0, 0.0
    for t in reversed(range(len(values))):
        reward_here = reward if t == len(values) - 1 else 0.0
        delta = reward_here + following - values[t]
        advantage = delta + lam * advantage
        following = values[t]
        advantages.append(advantage)
    return advantages[::-1]


@torch.no_grad()
def estimate_advantages(learner: PolicyLearner, rows: list[Row]) -> None:
    """GAE with the value head at theta_old; advantages whitened over the batch. Collective."""
    advantages = []
    for row, t, i in learner.each_forward(rows):
        values = t.values[i][t.mask[i]].tolist()
        row.advantages = gae(values, row.reward_to_go, learner.args.gae_lambda)
        row.value_targets = [a + v for a, v in zip(row.advantages, values, strict=True)]
        advantages += row.advantages
    squares = sum(a * a for a in advantages)
    n, total, squares = learner.world.sum(len(advantages), sum(advantages), squares)
    mean = total / n
    std = math.sqrt(max(0.0, squares / n - mean**2))
    for row in rows:
        row.advantages = [(a - mean) / (std + 1e-8) for a in row.advantages]


# --------------------------------------------------------------------------------------------------
# mu, the weight of imitation, after the warm-up: (args, step from 0, controller) -> mu


def zero(args: Args, step: int, controller) -> float:
    return 0.0


def one(args: Args, step: int, controller) -> float:
    return 1.0


def initial_mu(args: Args, step: int, controller) -> float:
    return args.mu_init


def cosine_mu(args: Args, step: int, controller) -> float:
    """CHORD's: a linear rise, then a cosine."""
    step -= args.warmup_steps
    if step < args.chord_warmup:
        return args.chord_start * (step + 1) / args.chord_warmup
    done = min(1.0, (step - args.chord_warmup) / args.chord_steps)
    height = 0.5 * (1 + math.cos(math.pi * done))
    return args.chord_end + (args.chord_start - args.chord_end) * height


def learned_mu(args: Args, step: int, controller) -> float:
    return controller.mu


# --------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Method:
    """All in which the methods differ. A new one is a loss, if it needs its own, and a row."""

    mu: Callable
    rl_loss: Callable = ppo_loss
    sft_loss: Callable = sft_loss
    baseline: str = "grpo"  # of group_advantages
    demonstrations: Literal["sft", "replaces_sample", "beside_samples", "replaces_unsolved"] = "sft"
    """sft: rows of L_SFT. replaces_sample: a row of L_RL instead of one of the samples (LUFFY).
    beside_samples: a row of L_RL as well (SRFT). replaces_unsolved: rows of L_SFT, at weight 1,
    instead of the samples of a prompt that is not solved (HPT)."""
    rl_mean: Callable = token_mean
    sft_mean: Callable = sft_mean
    learns_without_advantage: bool = False  # rows with advantage 0 still have a gradient
    learns_mu: Literal["no", "by_reward", "by_noise"] = "no"  # what its controller looks at
    fresh_optimizer: bool = False  # after the warm-up

    def weight_of_sft(self, mu: float) -> float:
        return 1.0 if self.demonstrations == "replaces_unsolved" else mu


METHODS = {
    "amft": Method(learned_mu, learns_mu="by_reward"),  # 2508.06944
    "sft": Method(one),
    "rl": Method(zero),  # GRPO, 2402.03300; PPO, 1707.06347, with --advantage gae
    "sft_then_rl": Method(zero, fresh_optimizer=True),  # as in 2604.23747
    "fixed": Method(initial_mu),
    "chord": Method(cosine_mu),  # 2508.11408
    "gac": Method(learned_mu, learns_mu="by_noise"),  # 2605.26184
    "luffy": Method(zero, luffy_loss, baseline="mean", demonstrations="replaces_sample",
                    rl_mean=luffy_mean),  # 2504.14945
    "srft": Method(zero, srft_loss, demonstrations="beside_samples", rl_mean=srft_mean,
                   learns_without_advantage=True),  # 2506.19767
    "hpt": Method(zero, reinforce_loss, baseline="mean", demonstrations="replaces_unsolved",
                  rl_mean=hpt_mean, sft_mean=hpt_sft_mean),  # 2509.04419
}  # fmt: skip


def rows_of(
    args: Args, groups: list[list[Trajectory]], demonstrations: list[Trajectory]
) -> tuple[list[Row], list[Row]]:
    """(rows of L_SFT, rows of L_RL) of a step's prompts, loss weights not yet set.

    groups: of each prompt its sampled trajectories; empty where nothing was sampled. All turns of a
    prompt's trajectories are one group of the advantages.
    """
    method, sft, rl = METHODS[args.method], [], []
    for i, demonstration in enumerate(demonstrations):
        shown = rows_of_trajectory(demonstration, args, i)
        for row in shown:
            row.demonstration = True
        unsolved = bool(groups) and sum(t.won for t in groups[i]) <= args.hpt_gate
        replaced = method.demonstrations == "replaces_unsolved" and unsolved
        if not groups or replaced or method.demonstrations == "sft":
            sft += shown
        if not groups or replaced:
            continue
        rows = [row for t in groups[i] for row in rows_of_trajectory(t, args, i)]
        if method.demonstrations in ("replaces_sample", "beside_samples"):
            rows += shown
        baseline = "mean" if args.advantage == "mean" else method.baseline
        advantages = group_advantages([row.reward_to_go for row in rows], baseline)
        for row, a in zip(rows, advantages, strict=True):
            row.advantages = [a] * len(row.turn.ids)
        rl += rows
    return sft, rl


def rows_of_trajectory(trajectory: Trajectory, args: Args, prompt: int) -> list[Row]:
    """A row a turn; advantages are not yet set."""
    returns = trajectory.returns(args.turn_gamma)
    return [
        Row(turn, [0.0] * len(turn.ids), prompt=prompt, right=turn.reward > 0, reward_to_go=r)
        for turn, r in zip(trajectory.turns, returns, strict=True)
    ]


def set_loss_weights(args: Args, world: World, sft: list[Row], rl: list[Row]) -> None:
    """Each row's weight in the mean, over all ranks. Collective.

    Truncated rows of L_RL weigh nothing with --mask-truncated.
    """
    method = METHODS[args.method]
    kept = [row for row in rl if row.turn.finished or not args.mask_truncated]
    own = [row for row in kept if not row.demonstration]
    shown = [row for row in kept if row.demonstration]
    counts = len(own), token_count(own), len(shown), token_count(shown), token_count(sft)
    n = Counts(*world.sum(*counts))
    for row in kept:
        row.weight = method.rl_mean(row, n, args)
    for row in sft:
        row.weight = method.sft_mean(row, n, args)


# --------------------------------------------------------------------------------------------------
# Backward passes and the step that follows them


def passes_of(
    args: Args, mu: float, sft: list[Row], rl: list[Row], G, D=None, halves=None
) -> list[Pass]:
    """The backward passes of a step: G = (1 - mu) g_RL + mu g_SFT + g_aux (3), D = g_SFT - g_RL.

    D None: this step is not differentiated by mu. halves: two buffers for what the prompts of even
    number say of g_SFT and of g_RL less what those of odd number say.
    """
    method = METHODS[args.method]
    mu_sft = method.weight_of_sft(mu)
    auxiliary = auxiliary_losses(args)
    learning, silent = split_silent(rl, method)
    if D is None:
        on_sft, on_rl = {"sft": (method.sft_loss, mu_sft)}, {"rl": (method.rl_loss, 1 - mu)}
        if auxiliary:  # on all rows of L_RL: one pass for all losses
            learning, silent, on_rl = rl, [], on_rl | auxiliary
        return [
            Pass(sft, on_sft, [(G, 1.0)]),
            Pass(learning, on_rl, [(G, 1.0)]),
            Pass(silent, on_rl, targets=[]),
        ]
    on_sft, on_rl = {"sft": (method.sft_loss, 1.0)}, {"rl": (method.rl_loss, 1.0)}
    passes = [
        Pass(sft, on_sft, [(D, 1.0), (G, mu_sft)]),
        Pass(learning, on_rl, [(D, -1.0), (G, 1 - mu)]),
    ]
    if halves is not None:
        passes = [*in_halves(passes[0], halves[0]), *in_halves(passes[1], halves[1])]
    passes.append(Pass(silent, on_rl, targets=[]))
    if auxiliary:
        passes.append(Pass(rl, auxiliary, [(G, 1.0)]))
    return passes


def split_silent(rows: list[Row], method: Method) -> tuple[list[Row], list[Row]]:
    """(rows of L_RL with a gradient, rows of prompts whose samples are all equally good)."""
    learning, silent = [], []
    for row in rows:
        learns = any(row.advantages) or method.learns_without_advantage
        (learning if learns and row.weight > 0 else silent).append(row)
    return learning, silent


def in_halves(work: Pass, difference) -> list[Pass]:
    """The pass in two, by the number of the prompt; `difference` gets even less odd."""
    even = [row for row in work.rows if row.prompt % 2 == 0]
    odd = [row for row in work.rows if row.prompt % 2 == 1]
    return [
        work._replace(rows=even, targets=[*work.targets, (difference, 1.0)]),
        work._replace(rows=odd, targets=[*work.targets, (difference, -1.0)]),
    ]


@dataclass
class Step:
    """What a step did."""

    G: list[torch.Tensor]  # (3), before clipping; of the last minibatch
    D: list[torch.Tensor] | None  # d G / d mu = g_SFT - g_RL
    norm: float  # |G|
    steps: int  # optimizer steps taken
    finite: bool  # False: G was not, and the step was left out
    sums: dict[str, float]  # of losses and what was measured, over all ranks
    halves: tuple | None = None  # of g_SFT and of g_RL: even prompts less odd ones


def minibatch(rows: list[Row], k: int, count: int) -> list[Row]:
    """The rows of every `count`-th prompt."""
    return [row for row in rows if row.prompt % count == k % count]


def train_on(
    learner: PolicyLearner,
    mu: float,
    sft: list[Row],
    rl: list[Row],
    schedule: float,
    with_D: bool,
) -> Step:
    """The optimizer steps of a step's rows: one, or one for each epoch and minibatch.

    with_D: keep d G / d mu, for derivative_by_mu or gradient_noise. Collective.
    """
    args, world, sums, taken_steps = learner.args, learner.world, {}, 0
    by_noise = METHODS[args.method].learns_mu == "by_noise"
    for k in range(args.epochs * args.minibatches):
        sft_part = minibatch(sft, k, args.minibatches)
        rl_part = minibatch(rl, k, args.minibatches)
        set_loss_weights(args, world, sft_part, rl_part)
        G = learner.zeros()
        D = learner.zeros() if with_D else None
        halves = (learner.zeros(), learner.zeros()) if with_D and by_noise else None
        for work in passes_of(args, mu, sft_part, rl_part, G, D, halves):
            for name, value in learner.backward(work).items():
                sums[name] = sums.get(name, 0.0) + value
        for buffer in (G, D, *(halves or ())):
            if buffer is not None:
                learner.sum_over_ranks(buffer)
        norm, taken = learner.take_step(G, schedule)
        if not taken:
            break
        taken_steps += 1
    names = sorted(sums)
    sums = dict(zip(names, world.sum(*(sums[name] for name in names)), strict=True))
    for name in ("sft", "rl", "value"):  # means over the optimizer steps, not sums
        sums[name] /= k + 1
    return Step(G, D, norm, taken_steps, taken, sums, halves)


# --------------------------------------------------------------------------------------------------
# The derivative of a step


@torch.no_grad()
def step_derivative(
    optimizer, params, G, D, norm: float, product: float, clip: float, preconditioner: str
) -> None:
    """D <- d theta / d mu of the step that was just taken (in place, shard by shard).

    G = (1 - mu) g_RL + mu g_SFT + g_aux before clipping, D = g_SFT - g_RL: lists of this rank's
    shards; norm = |G|, product = <G, D>. "none": -alpha D, eq. (5). "adam": of clipped AdamW,
        g  = c G,   dg = c (D - G <G, D> / |G|^2) if clipped else D
        dm = (1 - b1) dg / (1 - b1^t),   dv = (1 - b2) 2 g dg / (1 - b2^t)
        d theta / d mu = -alpha [ dm / (sqrt v + eps) - m dv / (2 sqrt v (sqrt v + eps)^2) ]
    with c = min(1, clip / |G|), t AdamW's count of steps, m and v after the step, bias-corrected;
    the second term is 0 where v = 0. Earlier moments and the weight decay do not depend on mu.
    """
    c = min(1.0, clip / norm) if norm > 0 else 1.0
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for p, g, d in zip(params, G, D, strict=True):
        group = groups[id(p)]
        if preconditioner == "none":
            d.mul_(-group["lr"])
            continue
        (b1, b2), eps, state = group["betas"], group["eps"], optimizer.state[p]
        t = float(state["step"])
        dg = c * (d - g * (product / norm**2)) if c < 1 else d
        m = local(state["exp_avg"]) / (1 - b1**t)
        v = local(state["exp_avg_sq"]) / (1 - b2**t)
        dm = (1 - b1) / (1 - b1**t) * dg
        dv = (1 - b2) / (1 - b2**t) * 2 * c * g * dg
        root = v.sqrt()
        second = torch.where(v > 0, m * dv / (2 * root * (root + eps) ** 2), torch.zeros_like(v))
        d.copy_((dm / (root + eps) - second) * -group["lr"])


def depends_on_mu(
    norm: float, product: float, square: float, clip: float, preconditioner: str
) -> bool:
    """Whether mu changes the step at all; norm = |G|, product = <G, D>, square = |D|^2.

    It does not where G was clipped and D is parallel to it, as where all samples of each prompt are
    equally good: G = mu g_SFT has the same direction for every mu. What is left of d theta / d mu
    is then rounding, which no RMS must see.
    """
    if square == 0:
        return False
    if norm <= clip or preconditioner == "none":
        return True
    aside = square * norm**2 - product**2  # |D|^2 |G|^2 sin^2 of the angle between them
    return aside > 1e-10 * square * norm**2


def derivative_by_mu(learner: PolicyLearner, step: Step) -> list[torch.Tensor] | None:
    """d theta / d mu of the last step, in D's memory; None where mu does not change it.

    G's memory is given back: the validation rollouts and their gradient come next. Collective.
    """
    G, D, norm = step.G, step.D, step.norm
    step.G = step.D = None
    product, square = learner.dot(G, D), learner.dot(D, D)
    clip, preconditioner = learner.args.clip, learner.args.meta_preconditioner
    if not depends_on_mu(norm, product, square, clip, preconditioner):
        return None
    step_derivative(learner.optimizer, learner.params, G, D, norm, product, clip, preconditioner)
    return D


def meta_gradient(
    learner: PolicyLearner, groups: list[list[Trajectory]], derivative: list[torch.Tensor]
) -> tuple[float, float]:
    """grad_mu U = < grad U, d theta / d mu > (5), and its standard deviation. Collective.

    groups: of validation prompts, at the new theta. grad U is a policy gradient: the
    log-probability of a trajectory's turns, times its return (undiscounted) against the others of
    its group. The noise is estimated from two half-batches: prompts of even and odd number over
    all ranks.
    """
    world, halves = learner.world, []
    numbers = [world.rank + world.size * i for i in range(len(groups))]
    for parity in (0, 1):
        half = [g for g, number in zip(groups, numbers, strict=True) if number % 2 == parity]
        (count,) = world.sum(sum(len(group) for group in half))
        rows = []
        for group in half:
            returns = [trajectory.returns()[0] for trajectory in group]
            advantages = group_advantages(returns, "leave_one_out")
            for trajectory, a in zip(group, advantages, strict=True):
                if a:
                    rows += [Row(t, [a] * len(t.ids), 1 / count) for t in trajectory.turns]
        learner.correct(rows)
        gradient = learner.zeros()
        learner.backward(Pass(rows, {"utility": (utility_loss, 1.0)}, [(gradient, 1.0)]))
        learner.sum_over_ranks(gradient)
        halves.append(-learner.dot(gradient, derivative))
    return sum(halves) / 2, abs(halves[0] - halves[1]) / 2


def gradient_noise(learner: PolicyLearner, step: Step) -> dict[str, float]:
    """What GAC weighs: the variances of g_RL and g_SFT, and |g_SFT - g_RL|^2 without them.

    A gradient is the sum of what two halves of its prompts say, so the square of their difference
    estimates the variance of the sum. Collective.
    """
    of_sft, of_rl = (learner.dot(half, half) for half in step.halves)
    apart = learner.dot(step.D, step.D) - of_sft - of_rl
    return {"variance/rl": of_rl, "variance/sft": of_sft, "disagreement": max(0.0, apart)}


# --------------------------------------------------------------------------------------------------
# The controller of mu


class Running:
    """Running means of numbers that come together, kept in `state` (a dict of a checkpoint).

    The weight of a number falls by `decay` with each that follows; the weights sum to 1.
    """

    def __init__(self, state: dict, decay: float):
        self.state, self.decay = state, decay

    def add(self, **numbers: float) -> dict[str, float]:
        """The means with these numbers."""
        self.state["count"] = self.state.get("count", 0) + 1
        weight = 1 - self.decay ** self.state["count"]
        for name, x in numbers.items():
            self.state[name] = self.decay * self.state.get(name, 0.0) + (1 - self.decay) * x
        return {name: self.state[name] / weight for name in numbers}

    def variance_of_mean(self) -> float:
        """Of a running mean of independent numbers of variance 1."""
        b, n = self.decay, self.state["count"]
        return (1 - b) / (1 + b) * (1 - b ** (2 * n)) / (1 - b**n) ** 2


class Controller:
    """mu and what its update remembers: eq. (6), or one of its other forms; or GAC's.

    learns: what the method's mu is learned from. state is saved with every checkpoint.
    """

    def __init__(self, args: Args, learns: Literal["no", "by_reward", "by_noise"] = "by_reward"):
        self.args, self.learns = args, learns
        self.state = {
            "mu": args.mu_init,
            "squares": [],  # of the meta-gradients so far
            "window": {},  # running means of the meta-gradient, its square, its noise squared
            "noise": {},  # running means of what GAC weighs
            "entropy_target": None,  # H*: of the policy after the warm-up
            "optimizer_steps": 0,
        }
        self.eta_mu, self.eta_entropy = args.eta_mu, args.eta_entropy
        if self.eta_mu is None:
            self.eta_mu = {"shrunken": 0.2, "normalised": 0.05, "printed": 1e-4}[args.mu_update]
        if self.eta_entropy is None:
            rates = {"shrunken": 0.0, "normalised": 0.05, "printed": 5e-4}
            self.eta_entropy = rates[args.mu_update]
        # Optimizer steps before the first meta-gradient: Adam's moments are cold
        self.first_steps = 2 if args.mu_update == "shrunken" else 10

    @property
    def mu(self) -> float:
        return self.state["mu"]

    @property
    def uses_entropy(self) -> bool:
        """Whether the entropy term moves mu."""
        return self.eta_entropy > 0 and not self.args.no_entropy_term

    def moves(self, step: int) -> bool:
        """Whether (6) follows this step (from 0)."""
        return self.learns == "by_reward" and step >= self.args.warmup_steps

    def wants_target(self, step: int) -> bool:
        """Whether H* is to be measured before this step (from 0)."""
        missing = self.state["entropy_target"] is None
        return self.moves(step) and self.uses_entropy and missing

    def gradient_due(self, step: int) -> bool:
        """Whether g_SFT - g_RL of this step (from 0) is needed."""
        args = self.args
        if self.learns == "no" or step < args.warmup_steps:
            return False
        if self.learns == "by_noise":
            return True
        due = (step + 1) % args.mu_every == 0 and not args.no_meta_gradient
        return due and self.state["optimizer_steps"] >= self.first_steps

    def move(
        self, step: int, grad_mu: float | None, entropy: float | None, noise: float = 0.0
    ) -> dict[str, float]:
        """mu after optimizer step number `step` (from 1); returns what moved it.

        grad_mu: of U, or None where it was not taken; noise: its standard deviation. entropy: H(pi)
        of this step's samples; None where all of them were cut and masked.
        """
        args, by_gradient, by_entropy, metrics = self.args, 0.0, 0.0, {}
        # Not where it is exactly 0: the validation samples of every prompt are equally good, which
        # says nothing and must not count in the RMS. Nor what is not finite: it would stay there
        if grad_mu and abs(grad_mu) + noise < 1e100:
            window = self._window(grad_mu, noise)
            metrics["grad_mu_snr_window"] = window["snr"]
            by_gradient = self._gradient_step(grad_mu, window)
            self.state["squares"].append(grad_mu**2)
        every_step = args.mu_update == "printed"
        due = every_step or step % args.mu_every == 0
        if self.uses_entropy and due and entropy is not None:
            sign = 1 if args.entropy_sign == "printed" else -1
            by_entropy = self.eta_entropy * (self.state["entropy_target"] - entropy) * sign
        self._set(self.mu + (by_gradient + by_entropy))
        return metrics | {
            "mu_change/meta_gradient": by_gradient,
            "mu_change/entropy": by_entropy,
        }

    def _set(self, mu: float) -> None:
        self.state["mu"] = min(self.args.mu_max, max(self.args.mu_min, mu))

    def _window(self, grad_mu: float, noise: float) -> dict[str, float]:
        """The meta-gradient over the last updates: its mean, RMS and signal-to-noise ratio.

        The noise is known from two half-batches at a time, so by luck it may seem to be nothing;
        one estimate more, as large as the gradient itself, is counted with the rest.
        """
        running = Running(self.state["window"], decay=0.7)
        means = running.add(mean=grad_mu, square=grad_mu**2, noise=noise**2)
        n = 1 / running.variance_of_mean()
        variance = (n * means["noise"] + means["square"]) / (n + 1)
        rms = max(math.sqrt(means["square"]), 1e-30)
        snr = abs(means["mean"]) / max(math.sqrt(variance / n), 1e-30)
        return {"mean": means["mean"], "rms": rms, "snr": snr}

    def _gradient_step(self, grad_mu: float, window: dict[str, float]) -> float:
        squares = self.state["squares"]
        if self.args.mu_update == "printed":
            return self.eta_mu * grad_mu
        if self.args.mu_update == "shrunken":
            certainty = window["snr"] ** 2 / (1 + window["snr"] ** 2)
            return self.eta_mu * certainty * window["mean"] / window["rms"]
        if len(squares) < 2:  # the first two only fill the running RMS
            return 0.0
        rms = math.sqrt(sum(squares) / len(squares))
        return self.eta_mu * max(-3.0, min(3.0, grad_mu / max(rms, 1e-30)))

    def balance(self, noise: dict[str, float]) -> dict[str, float]:
        """GAC: mu* = s_RL / (s_RL + s_SFT + disagreement), of running means; returns the means.

        It is the mu whose g = (1 - mu) g_RL + mu g_SFT errs least as an estimate of grad J, if
        g_SFT is biased by the disagreement: (1 - mu)^2 s_RL + mu^2 (s_SFT + disagreement). mu goes
        there by at most 0.05 a step.
        """
        means = Running(self.state["noise"], decay=0.9).add(**noise)
        best = means["variance/rl"] / max(sum(means.values()), 1e-30)
        self._set(self.mu + max(-0.05, min(0.05, best - self.mu)))
        return means


# --------------------------------------------------------------------------------------------------
# Checks before anything expensive


# Where the numbers must lie
NUMBERS = {
    "[1, 1e9]": (
        "steps", "prompts_per_step", "warmup_batch", "samples", "max_new_tokens", "epochs",
        "minibatches", "mu_every", "validation_prompts", "validation_size", "eval_problems",
        "save_every", "keep", "max_length", "replicas", "micro_batch", "generation_batch",
        "chord_steps", "lr_warmup",
    ),
    "[0, 1e9]": (
        "warmup_steps", "chord_warmup", "hpt_gate", "show", "dynamic_sampling", "lora_r",
    ),
    "(0, 1e6]": ("lora_alpha",),
    "[-1, 1e9]": ("eval_every",),
    "(0, 100]": ("lr", "warmup_lr", "value_lr"),
    "(0, inf)": ("clip", "clip_ratio", "clip_ratio_high", "luffy_gamma"),
    "[0, 1e6]": ("is_cap",),
    "[0, 1000]": (
        "entropy_coefficient", "value_coefficient", "hpt_sft", "eta_mu", "eta_entropy",
    ),
    "[0, 10]": ("weight_decay",),
    "[0, 1]": (
        "mu_init", "mu_min", "mu_max", "gae_lambda", "turn_gamma", "chord_start", "chord_end",
    ),
    "[0, 1)": ("betas",),
    "(-9e18, 9e18)": ("seed", "levels"),
}  # fmt: skip


def check(args: Args, ranks: int) -> None:
    """Raises DataError for arguments that cannot work."""
    check_numbers(args, NUMBERS)
    method = METHODS[args.method]
    if ranks % args.replicas:
        raise DataError(f"--replicas {args.replicas} does not divide the {ranks} ranks")
    for name in ("prompts_per_step", "validation_prompts", "warmup_batch"):
        if getattr(args, name) % ranks:
            raise DataError(
                f"--{name.replace('_', '-')} {getattr(args, name)} cannot be shared equally by "
                f"{ranks} ranks"
            )
    if args.samples < 2 and method.mu is not one:
        raise DataError(
            "--samples must be at least 2: a response is judged against the others of its prompt"
        )
    if method.learns_mu == "by_reward" and args.validation_prompts < 2:
        raise DataError("--validation-prompts must be at least 2, for an estimate of the noise")
    if args.task == "math" and args.validation_prompts > args.validation_size:
        raise DataError(
            f"--validation-prompts {args.validation_prompts} are more than --validation-size "
            f"{args.validation_size}"
        )
    if args.minibatches > args.prompts_per_step // ranks:
        raise DataError(
            f"--minibatches {args.minibatches} are more than the {args.prompts_per_step // ranks} "
            "prompts of a rank"
        )
    if args.vision and args.task == "math":
        raise DataError("--vision is for the games: --task general_points or virl")
    if not 0 <= args.mu_min <= args.mu_init <= args.mu_max <= 1:
        raise DataError(
            "0 <= --mu-min <= --mu-init <= --mu-max <= 1 is needed, not "
            f"{args.mu_min}, {args.mu_init}, {args.mu_max}"
        )
    if method.learns_mu != "no" and not 0 < args.mu_min <= args.mu_max < 1:
        raise DataError(
            "a learned mu needs both losses: --mu-min above 0 and --mu-max below 1, not "
            f"{args.mu_min} and {args.mu_max}"
        )
    if not 0 <= args.warmup_steps <= args.steps:
        raise DataError(f"--warmup-steps must be between 0 and --steps, not {args.warmup_steps}")
    if method.learns_mu == "by_reward" and not Controller(args).uses_entropy:
        if args.no_meta_gradient or args.eta_mu == 0:
            raise DataError(
                "nothing moves mu without --eta-mu, the meta-gradient and an entropy term (which "
                "--eta-entropy 0.05 gives a weight): --method fixed is that"
            )
        if args.entropy_sign != "printed":
            raise DataError(
                "--entropy-sign: the entropy term has no weight here, which --eta-entropy 0.05 or "
                "--mu-update normalised gives it"
            )
    if method.learns_mu == "by_noise" and args.prompts_per_step < 2 * ranks:
        raise DataError(
            f"--method {args.method} compares two halves of a rank's prompts: --prompts-per-step "
            f"must be at least {2 * ranks}"
        )
    if method.learns_mu != "no" and args.epochs * args.minibatches > 1:
        raise DataError(
            f"--method {args.method} takes one optimizer step per rollout: mu is learned from that "
            "one step"
        )
    if method.rl_loss is srft_loss and args.epochs > 1:
        raise DataError(
            f"--method {args.method}: the loss of wrong samples has no lower bound, so --epochs "
            "must be 1"
        )
    if args.sft_data and (args.task != "math" or method.demonstrations != "sft"):
        raise DataError(
            "--sft-data is for --task math and methods with an SFT loss of its own prompts, not "
            f"--task {args.task} --method {args.method}"
        )
    if args.reward and args.task != "math":
        raise DataError(f"--reward is for --task math: {args.task} has the reward of its rules")
    if args.task not in ("math", "general_points", "virl") and ":" not in args.task:
        raise DataError(f"--task {args.task}: math, general_points, virl or FILE.py:FUNCTION")
    if args.lora_r and (args.cpu_offload or args.compile):
        raise DataError("--lora-r goes with neither --cpu-offload nor --compile")
    if args.merge and not args.lora_r:
        raise DataError("--merge is for adapters: give --lora-r")
    check_ignored(args)
    check_flags(args)
    if method.rl_loss is not ppo_loss and args.advantage != "grpo":
        raise DataError(
            f"--method {args.method} has advantages of its own: leave --advantage at grpo"
        )


# Flags that only these methods read
ONLY = {
    ("chord",): ("chord_start", "chord_end", "chord_steps", "chord_warmup"),
    ("luffy",): ("luffy_gamma",),
    ("hpt",): ("hpt_gate", "hpt_sft"),
    ("amft",): (
        "meta_preconditioner", "mu_update", "eta_mu", "eta_entropy", "entropy_sign",
        "no_meta_gradient", "no_entropy_term",
    ),
    ("amft", "gac", "fixed"): ("mu_init",),
    ("amft", "gac", "fixed", "chord", "sft", "sft_then_rl", "hpt"): ("sft_weight",),
    ("amft", "gac", "fixed", "chord", "rl", "sft_then_rl", "srft"): ("clip_ratio_high",),
}  # fmt: skip
# Flags that are read beside others alone
BESIDE = {
    "--task math": ("data", "subjects", "levels", "suffix"),
    "--task general_points": ("rule", "suits"),
    "--task virl": ("actions", "routes", "test_routes"),
    "--advantage gae": ("value_coefficient", "value_lr", "gae_lambda"),
    "--lora-r": ("lora_alpha", "target_modules"),
}


def check_ignored(args: Args) -> None:
    """Raises DataError for a flag that is given but that nothing reads."""
    for methods, names in ONLY.items():
        if args.method not in methods and (flag := given(args, names)):
            raise DataError(
                f"{flag} is read by --method {', '.join(methods)} alone, not {args.method}"
            )
    there = {f"--task {args.task}", f"--advantage {args.advantage}"}
    there |= {"--lora-r"} if args.lora_r else set()
    for other, names in BESIDE.items():
        if other not in there and (flag := given(args, names)):
            raise DataError(f"{flag} is read beside {other} alone")
    if args.method == "sft" and args.dynamic_sampling:
        raise DataError("--dynamic-sampling is for samples: --method sft draws none")


def given(args: Args, names: Sequence[str]) -> str:
    """The first of these flags that has not its default; "" if there is none."""
    defaults = {f.name: f.default for f in fields(Args)}
    plain = with_defaults(replace(args, **{name: defaults[name] for name in names}))
    changed = [name for name in names if getattr(args, name) != getattr(plain, name)]
    return f"--{changed[0].replace('_', '-')}" if changed else ""


def load_task(args: Args, tokenizer) -> tuple:
    """(training game, game whose demonstrations are shown, validation game, {test set: (game,
    episodes)}, a line on what there is)."""
    if args.task == "math":
        train, validation, tests, report = load_problems(
            args.data,
            tokenizer,
            validation=args.validation_size,
            test=args.eval_problems,
            max_length=args.max_length,
            subjects=args.subjects,
            levels=args.levels,
            seed=args.seed,
            suffix=args.suffix,
            reward=args.reward,
        )
        shown = train
        if args.sft_data:
            shown = load_demonstrations(
                args.sft_data, tokenizer, tests, args.max_length, args.suffix
            )
            report += f"; {len(shown)} demonstrations of other problems"
        tests = {name: (game, len(game)) for name, game in tests.items()}
        return train, shown, validation, tests, report
    if ":" in args.task:
        train, validation, tests = own_function(args.task, "--task")()
        tests = {name: (game, args.eval_problems) for name, game in tests.items()}
        return train, train, validation, tests, f"{args.task}: episodes without end"
    train, validation, tests = games_of(
        args.task,
        rule=args.rule,
        suits=args.suits,
        actions=args.actions,
        vision=args.vision,
        compact=not args.full_prompts,
        routes=args.routes,
        test_routes=args.test_routes,
    )
    tests = {name: (game, args.eval_problems) for name, game in tests.items()}
    return train, train, validation, tests, f"{args.task}: episodes without end"


def longest_row(args: Args, config, tokenizer, processor, train) -> int:
    """Tokens of a prompt and its response at most, from 32 prompts. Raises ModelError.

    So that a model with too few positions is known before its weights are read.
    """
    longest = 0
    for seed in range(32):
        for turn in demonstrate(tokenizer, train, seed, processor).turns:
            longest = max(longest, len(turn.prompt) + max(len(turn.ids), args.max_new_tokens))
    check_positions(config, longest, "--max-new-tokens or --max-length")
    return longest


def prepare(args: Args, world: World) -> tuple:
    """(what load_readers and load_task give but the report, which is said; longest_row).

    All that can be known without weights. Raises DataError or ModelError.
    """
    readers = config, tokenizer, processor = load_readers(
        args.model, args.vision, args.trust_remote_code
    )
    *games, report = load_task(args, tokenizer)
    world.say(report)
    longest = longest_row(args, config, tokenizer, processor, games[0])
    if args.lora_r:
        base = skeleton(config, trust_remote_code=args.trust_remote_code)
        check_targets(base, args.target_modules)
    return readers, games, longest


def examine(args: Args, world: World) -> list[str]:
    """--dry-run: prints what there is and what it needs; returns what would not work."""
    (config, _, _), _, longest = prepare(args, world)
    responses = args.prompts_per_step * args.samples
    world.say(f"{responses} responses per step, at most {responses * longest:,} tokens")
    kept = min(args.keep, -(-args.steps // args.save_every)) + 1
    return check_space(world, needs(args, config, world, longest), args.output_dir, kept)


def needs(args: Args, config, world: World, longest: int) -> Needs:
    """Bytes on each rank: weights, Adam's moments, G (and D), and what a batch or rollout takes."""
    n, cuda = parameter_count(config, args.trust_remote_code), world.device.type == "cuda"
    width, shard, device, host = 2 if cuda else 4, 4 * n / world.shards, {}, {}
    if args.lora_r:  # of the frozen base a shard; of the adapters all, on every rank
        base = skeleton(config, trust_remote_code=args.trust_remote_code)
        device["frozen weights"] = width * n / world.shards
        shard = 4 * adapter_size(base, args.lora_r, args.target_modules)
    device |= {"weights": shard, "Adam": 2 * shard, "G and its clipped copy": 2 * shard}
    if METHODS[args.method].learns_mu != "no":
        device["D"] = shard
    if METHODS[args.method].learns_mu == "by_noise":
        device["differences of halves"] = 2 * shard
    if cuda and args.cpu_offload:
        device, host = {}, device
    if cuda and world.rank == 0:
        host["weights while loading"] = (width if args.lora_r else 4) * n
    rows = min(args.generation_batch, args.prompts_per_step * args.samples // world.size)
    at_once = args.micro_batch * longest
    sampling = {"cache of rollouts": cache_bytes(config, rows * longest, width)}
    if args.sampler == "vllm":
        sizes = args.generation_batch, longest, args.max_length + args.max_new_tokens
        sampling = {"vLLM": width * n, "its cache": engine_bytes(config, *sizes, width)}
        if not args.vllm_sleep:
            device, sampling = device | sampling, {}
    return Needs(
        device,
        host,
        training={
            "activations": activation_bytes(
                config, at_once, width, args.activation_checkpointing, adapters=args.lora_r > 0
            ),
            "logits": logit_bytes(config, at_once, width),
        },
        evaluation={
            "gathered weights": width * n if cuda or world.shards > 1 else 0,
            **sampling,
        },
        disk=3 * shard if args.lora_r else (12 + width) * n,
    )


# --------------------------------------------------------------------------------------------------


def build(args: Args, config, world: World) -> Policy:
    """The sharded policy with its weights: fp32 master weights, bf16 compute on GPUs.

    With --lora-r the weights are frozen (bf16 on GPUs), and policy.adapters are what is trained.
    """
    value_head, source = args.advantage == "gae", None
    cuda = world.device.type == "cuda"
    dtype = torch.bfloat16 if cuda and args.lora_r else torch.float32
    if world.rank == 0:
        lm = load_weights(args.model, dtype, trust_remote_code=args.trust_remote_code)
        source = Policy(lm, value_head)
        if value_head:
            torch.nn.init.zeros_(source.value.weight)
            torch.nn.init.zeros_(source.value.bias)
    lm = skeleton(config, dtype, trust_remote_code=args.trust_remote_code)
    lm.requires_grad_(not args.lora_r)
    policy = Policy(lm, value_head)
    if args.activation_checkpointing:
        policy.lm.activation_checkpointing_enable({"use_reentrant": False})
    blocks = layers_to_shard(policy.lm)
    if args.compile:
        for block in blocks:
            block.compile()
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    beside = set(policy.value.parameters()) if value_head and args.lora_r else set()
    if cuda or world.shards > 1:  # one CPU rank has nothing to shard or cast
        for module in (*blocks, policy):
            fully_shard(
                module,
                mesh=world.mesh["shard"],
                mp_policy=bf16 if cuda else MixedPrecisionPolicy(),
                offload_policy=CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
                ignored_params=beside,
            )
    materialize(policy, source, torch.device("cpu") if args.cpu_offload else world.device)
    turn_off_dropout(policy)
    check_head(policy, world)
    if args.lora_r:
        add_adapters(args, policy, world.device)
    return policy.train()


def add_adapters(args: Args, policy: Policy, device: torch.device) -> None:
    """What is trained in place of its frozen weights."""
    policy.adapters = Adapters(
        policy.lm,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=0.0,
        target_modules=args.target_modules,
        rank_stabilised=False,
        seed=args.seed,
        device=device,
    )
    policy.adapters.train_phi()


def vllm_engine(args: Args, config, policy: Policy, optimizer, longest: int) -> VllmSampler:
    """This rank's; it gets new weights after each of the optimizer's steps."""
    engine = VllmSampler(
        args.model,
        config,
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        sequences=args.generation_batch,
        longest=longest,
        max_length=args.max_length + args.max_new_tokens,
        eager=args.vllm_eager,
        sleeps=args.vllm_sleep,
        adapters=policy.adapters,
        trust_remote_code=args.trust_remote_code,
    )
    policy.register_forward_pre_hook(engine.rest)  # sampling is by policy.lm
    optimizer.register_step_post_hook(engine.weights_changed)
    return engine


def loss_metrics(args: Args, sums: dict[str, float], mu: float) -> dict[str, float]:
    """The losses of a step, as trained on, and what was measured of its samples."""
    metrics = {"mu": mu, "loss/sft": sums["sft"], "loss/rl": sums["rl"]}
    mu_sft = METHODS[args.method].weight_of_sft(mu)
    metrics["loss/total"] = (1 - mu) * sums["rl"] + mu_sft * sums["sft"]
    if args.advantage == "gae":
        metrics["loss/value"] = sums["value"]
    if sums["tokens"]:
        metrics["entropy"] = sums["entropy"] / sums["tokens"]
        metrics["clip_fraction"] = sums["clipped"] / sums["tokens"]
        metrics["approx_kl"] = sums["kl"] / sums["tokens"]
    return metrics


def tokens_sampled(groups: list[list[Trajectory]]) -> int:
    turns = [turn for group in groups for trajectory in group for turn in trajectory.turns]
    return sum(len(turn.ids) for turn in turns)


def training_seeds(args: Args, actor: Actor, step: int) -> range:
    """This rank's prompts of a step."""
    if step < args.warmup_steps:
        return actor.mine(args.warmup_batch, step * args.warmup_batch)
    after_warmup = (step - args.warmup_steps) * args.prompts_per_step
    start = args.warmup_steps * args.warmup_batch + after_warmup
    return actor.mine(args.prompts_per_step, start)


def rollout(args: Args, actor: Actor, game, seeds: list[int], samples: int, step: int) -> tuple:
    """(seeds, groups of samples, samples drawn) of a step's prompts. Collective.

    With --dynamic-sampling, prompts whose samples all have the same reward make way for others, far
    from all that are drawn otherwise.
    """
    groups = actor.rollout(game, seeds, samples, step)
    drawn = sum(map(len, groups))
    for k in range(1, args.dynamic_sampling + 1):
        if actor.stop.agreed():
            break
        equal = [i for i, group in enumerate(groups) if equally_good(group)]
        if actor.world.sum(len(equal))[0] == 0:
            break
        others = [seeds[i] + k * 10**6 for i in equal]
        new = actor.rollout(game, others, samples, f"{step}/{k}")
        for i, seed, group in zip(equal, others, new, strict=True):
            seeds[i], groups[i] = seed, group
            drawn += len(group)
    return seeds, groups, drawn


def evaluate(args: Args, actor: Actor, tests: dict, validation, step: int) -> tuple:
    """(results on the test sets, some responses for people to read). Collective."""
    with gathered(actor.policy):
        results = play_tests(actor.play, tests, actor.world, actor.stop)
        if results is None:
            return None, []
        seeds = range(step, step + args.show) if actor.world.rank == 0 else []
        groups = actor.play(validation, seeds, args.samples, f"{args.seed}/show/{step}")
        if actor.stop.agreed():
            return None, []
    return results, sample_rows(groups, step, actor.tokenizer)


def target_entropy(args: Args, actor: Actor, learner: PolicyLearner, validation) -> tuple:
    """(H*, this rank's samples for it): of the warm policy, on many prompts, as it is measured but
    once.

    None once a stop is agreed on. Collective.
    """
    count = args.validation_size if args.task == "math" else 4 * args.validation_prompts
    groups = actor.rollout(validation, actor.mine(count), args.samples, "target")
    if actor.stop.agreed():
        return None, 0
    return learner.entropy(groups), sum(map(len, groups))


def main(args: Args, world: World) -> int:
    readers, games, longest = prepare(args, world)
    config, tokenizer, processor = readers
    train, shown, validation, tests = games
    run = Run(  # folder, log, progress bar, Ctrl-C, checkpoints
        "amft",
        args,
        world,
        FREE,
        title=args.method,
        shows={"mu": "mu", "reward": "reward/mean", "H": "entropy"},
        advice="lower --lr",
    )
    too_much = 2e-3 if args.lora_r else 2e-5
    run.warn(rate_warnings(args, {"lr": too_much, "warmup_lr": too_much}))
    torch.manual_seed(args.seed)
    method = METHODS[args.method]
    policy = build(args, config, world)
    optimizer = adamw(args, policy)
    filler = demonstrate(tokenizer, train, 0, processor).turns[0]
    learner = PolicyLearner(args, policy, optimizer, world, tokenizer.pad_token_id, filler)
    controller = Controller(args, method.learns_mu)
    if args.lora_r:
        beside = [p for name, p in trained_weights(policy) if name.startswith("value.")]
        checkpoint = AdapterCheckpoint(policy.adapters, optimizer, resolve(args.model), beside)
    else:
        checkpoint = ModelCheckpoint(policy, processor or tokenizer, optimizer, policy.lm)
    engine = None
    if args.sampler == "vllm":
        engine = vllm_engine(args, config, policy, optimizer, longest)
    size = sum(p.numel() for p in learner.params)
    run.start(checkpoint, f"{size / 1e6:.1f}M parameters", controller.state)
    actor = Actor(
        policy,
        policy.lm,
        tokenizer,
        processor,
        world,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.generation_batch,
        stop=run.stop,
        sampler=engine.sample if engine else sample,
    )
    own_samples = args.samples - (1 if method.demonstrations == "replaces_sample" else 0)

    for step in run.steps():
        if run.evaluation_due(step, args.warmup_steps):
            results, responses = evaluate(args, actor, tests, validation, step)
            lines = tests_lines(step, results, responses) if results else []
            run.evaluation(step, results, lines, samples=responses)
        if run.is_over(step):
            break
        warming = step < args.warmup_steps
        mu = 1.0 if warming else method.mu(args, step, controller)
        for_target = 0
        if controller.wants_target(step):
            target, for_target = target_entropy(args, actor, learner, validation)
            if run.stop_agreed():
                break
            controller.state["entropy_target"] = target
        if method.fresh_optimizer and step == args.warmup_steps:
            optimizer.state.clear()
        run.lap()

        # (a, b) demonstrations and own samples of the step's prompts, rewards, advantages.
        # A seed names an episode: game.reset(seed)
        seeds, groups, drawn = list(training_seeds(args, actor, step)), [], 0
        if mu < 1:
            seeds, groups, drawn = rollout(args, actor, train, seeds, own_samples, step)
        demonstrations = [actor.demonstrate(shown, seed) for seed in seeds]
        if run.stop_agreed():
            break
        seconds = {"rollout": run.lap()}
        sft, rl = rows_of(args, groups, demonstrations)
        if method.weight_of_sft(mu) == 0:
            sft = []
        if args.advantage == "gae" and groups:
            estimate_advantages(learner, rl)
        of_engine = learner.correct(rl) if groups else {}

        # (d) theta <- clipped AdamW(theta, G): before (c), which differentiates this very step
        since = step - args.warmup_steps if method.fresh_optimizer and not warming else step
        schedule = min(1.0, (since + 1) / args.lr_warmup)
        if warming:
            schedule *= args.warmup_lr / args.lr
        result = train_on(learner, mu, sft, rl, schedule, with_D=controller.gradient_due(step))
        controller.state["optimizer_steps"] += result.steps
        seconds["train"] = run.lap()
        metrics = loss_metrics(args, result.sums, mu) | of_engine
        metrics |= {"grad_norm": result.norm, "lr": args.lr * schedule}
        if groups:
            metrics |= rollout_metrics(groups, world)

        # (c) grad_mu U at the new theta (5), and with it the mu of the next step (6)
        trials = []
        if controller.moves(step) and result.finite:
            grad_mu, noise = None, 0.0
            derivative = derivative_by_mu(learner, result) if result.D is not None else None
            if derivative is not None:
                first = (step + 1) // args.mu_every * args.validation_prompts
                seeds = actor.mine(args.validation_prompts, first)
                key = f"{step}/validation"  # to the end, as the step is taken and mu belongs to it
                trials = actor.rollout(validation, seeds, args.samples, key, to_the_end=True)
                grad_mu, noise = meta_gradient(learner, trials, derivative)
                metrics |= {"grad_mu": grad_mu, "grad_mu_snr": abs(grad_mu) / max(noise, 1e-30)}
            if controller.uses_entropy:
                metrics["entropy_target"] = controller.state["entropy_target"]
            metrics |= controller.move(step + 1, grad_mu, metrics.get("entropy"), noise)
        elif method.learns_mu == "by_noise" and result.D is not None and result.finite:
            metrics |= controller.balance(gradient_noise(learner, result))
        del result
        seconds["mu"] = run.lap()

        metrics |= {f"seconds/{phase}": s for phase, s in seconds.items()}
        sampled, tried, generated, trained = world.sum(
            drawn,
            for_target + sum(len(group) for group in trials),
            tokens_sampled(groups),
            sum(row.length for row in sft + rl),
        )
        metrics |= {"samples/train": sampled, "samples/validation": tried}
        metrics["tokens_per_second/rollout"] = generated / seconds["rollout"]
        metrics["tokens_per_second/train"] = args.epochs * trained / seconds["train"]
        run.warn(rollout_warnings(metrics, args.max_new_tokens))
        run.finite(metrics["grad_norm"])
        run.log(step, metrics)
    if args.merge and run.completed:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        readers = processor or tokenizer
        write_merged(run.folder / "merged", policy.lm, policy.adapters, readers, dtype)
    status = run.finish(tests_table, "dynamics.png", f"; responses: {run.folder / 'samples.jsonl'}")
    if engine:
        engine.close()
    return status


def cli() -> int:
    args = with_defaults(tyro.cli(Args))
    return start("amft.py", args, check, examine, main)


if __name__ == "__main__":
    sys.exit(cli())
