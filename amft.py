r"""AMFT: imitation and exploration in one stage, balanced by a learned weight; and the methods it is compared with.

    L_RL  = -E_{y ~ pi}[ min(r A, clip(r, 1 - eps, 1 + eps) A) ],   L_SFT = -E_{(x, y) ~ D}[ log pi(y | x) ]         (1, 2)
    L     = (1 - mu) L_RL + mu L_SFT,   theta <- clipped AdamW(theta, grad L)                                       (3)
    mu    <- clip( mu + eta_mu grad_mu U + eta_H (H* - H(pi)), mu_min, mu_max ),   U = E[reward on validation]       (4, 6)
    grad_mu U = < grad U(theta_t), d theta_t / d mu >,   the derivative of the step that was just taken              (5)
"AMFT: Aligning LLM Reasoners by Meta-Learning the Optimal Imitation-Exploration Balance", arXiv 2508.06944. A later arXiv record (v3) says
that the paper is under investigation and that its authors asked to withdraw it; its public code cannot produce its results. This is an
independent implementation of the published algorithm.

What is done differently, and why:
1. The meta-gradient is real: two backward passes at theta give g_SFT and g_RL, validation rollouts at the new theta give grad U (a policy
   gradient with a leave-one-out baseline), and one inner product joins them. The paper's code has a placeholder there.
2. --meta-preconditioner adam (default) differentiates the clipped AdamW step that training takes; none is eq. (5), which is for SGD.
3. --mu-update normalised (default): with the published constants eq. (6) moves mu by some 1e-9 an update; --mu-update printed does just that.
4. --entropy-sign printed is eq. (6); text is what the paper's words say, the opposite.
5. A step's demonstrations are those of its prompts, so that every --method sees the same prompts and demonstrations.
6. Rollouts are taken at temperature 1 and top-p 1: the log-probabilities are those of the distribution sampled from.

    python amft.py                                                         # laptop: embedded model and problems, 4 minutes
    torchrun --standalone --nproc_per_node 8 amft.py --model Qwen/Qwen2.5-Math-7B --data hub --lr 1e-6 --steps 500 --mu-every 20 \
        --prompts-per-step 128 --max-new-tokens 8192 --micro-batch 2 --activation-checkpointing
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank $R --master_addr $HOST --master_port 29500 amft.py --replicas 2 ...
"""

import functools
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import model as models
from data import DataError, load_problems
from games import games_of
from model import Episode, Policy, Stop, Turn, World, demonstrate, local, total


@dataclass
class Args:
    """AMFT, and under the same budget: SFT, GRPO or PPO, SFT then RL, a fixed weight, CHORD, LUFFY, SRFT, HPT."""

    # What is trained, on what
    task: Literal["math", "general_points", "virl"] = "math"
    """Where prompts, demonstrations and rewards come from: data.py (math) or games.py. It sets the defaults that are "by task"."""
    model: str | None = None
    """tiny, tiny_bare (tiny with a habit of bare answers), a local folder in Hugging Face format, or a hub name. By task: tiny_bare, tiny_games
    (tiny after the experts' answers, with the same habit), tiny_vision with --vision."""
    data: str = "embedded"
    """embedded, hub (Elliott/Openr1-Math-46k-8192), or a file or folder with problem, solution and answer; see data.py."""
    subjects: tuple[str, ...] = ()
    """Only problems of these subjects (columns subject or type)."""
    levels: tuple[int, ...] = ()
    """Only problems of these levels."""
    suffix: str | None = None
    """math: text after every problem. Default: a request to reason and to box the answer (none for embedded problems)."""
    validation_size: int = 64
    """math: training problems set apart for U, the validation reward that mu's gradient is taken of."""
    rule: Literal["10", "11_12_13"] = "10"
    """general_points: what J, Q and K count in training; the other rule is the out-of-distribution test."""
    suits: Literal["black", "red"] = "black"
    """general_points with --vision: the cards in training; the others are the visual out-of-distribution test."""
    actions: Literal["absolute", "relative"] = "absolute"
    """virl: what turn_direction takes in training; the other is the out-of-distribution test."""
    routes: str | None = None
    """virl: a route file of the original for training, instead of the procedural city."""
    test_routes: str | None = None
    """virl: a route file for the tests."""
    vision: bool = False
    """Games in pictures, for a model of AutoModelForImageTextToText (default: tiny_vision)."""
    full_prompts: bool = False
    """Games: the originals' long prompts and routes. Without: short ones, for the embedded model."""
    max_length: int = 2048
    """Tokens of a prompt and its demonstration; longer ones are left out and counted."""
    output_dir: str = "runs/amft"
    """Run folder: args.json, metrics.jsonl, evaluations.jsonl, samples.jsonl, dynamics.png, checkpoints. A folder in use gets a number appended."""
    seed: int = 42
    """Prompts and samples are a function of (seed, step, place)."""

    # The method
    method: Literal["amft", "sft", "rl", "sft_then_rl", "fixed", "chord", "luffy", "srft", "hpt"] = "amft"
    """amft; sft; rl (GRPO or PPO, see --advantage); sft_then_rl; fixed (constant mu = --mu-init); chord (2508.11408); luffy
    (2504.14945); srft (2506.19767); hpt (2509.04419)."""
    steps: int | None = None
    """Optimizer steps (times --epochs and --minibatches), the warm-up included. By task: 80, 70, 30."""
    warmup_steps: int | None = None
    """W, SFT steps at the beginning, counted in --steps. Default: 5 for amft, 0 for the other methods; 20 with --vision."""
    warmup_batch: int | None = None
    """Demonstrated prompts per warm-up step. Default: --prompts-per-step; 32 with --vision."""
    warmup_lr: float | None = None
    """Learning rate of the warm-up. Default: --lr; 1e-3 with --vision."""
    lr: float | None = None
    """alpha, AdamW (paper's code: 1e-6 for 7B models). Default: 3e-5; with --vision 1e-4, since tiny_vision is still learning to read."""
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
    advantage: Literal["grpo", "gae"] = "grpo"
    """grpo: reward against its group; gae: PPO with a value head (the paper's)."""
    clip_ratio: float = 0.2
    """eps of the clipped surrogate."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """token: mean over all response tokens (DAPO's); sequence: each response first (the original GRPO)."""
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

    # The controller of mu
    mu_init: float = 0.5
    """mu at the start (the paper's code has 0.8, its README 0.5); the constant of --method fixed."""
    mu_min: float = 0.05
    """Lowest mu."""
    mu_max: float = 0.95
    """Highest mu."""
    mu_every: int = 5
    """K, steps between meta-gradients (paper: 20; a demonstration of 80 steps wants more than four)."""
    meta_preconditioner: Literal["adam", "none"] = "adam"
    """d theta / d mu of the clipped AdamW step (adam), or eq. (5) as printed (none)."""
    mu_update: Literal["normalised", "printed"] = "normalised"
    """normalised: the meta-gradient divided by its running RMS, both terms every K steps; printed: eq. (6)."""
    eta_mu: float | None = None
    """Default: 0.05 normalised, 1e-4 printed."""
    eta_entropy: float | None = None
    """Per nat. Default: 0.05 normalised, 5e-4 printed."""
    entropy_sign: Literal["printed", "text"] = "printed"
    """printed: + eta_H (H* - H), as in eq. (6); text: the opposite, as in the paper's words."""
    validation_prompts: int | None = None
    """Validation prompts per meta-gradient, with --samples responses each, over all ranks. Default: --prompts-per-step."""
    no_meta_gradient: bool = False
    """Ablation: the entropy term alone moves mu."""
    no_entropy_term: bool = False
    """Ablation: the meta-gradient alone moves mu."""

    # The other methods
    sft_share: float = 0.5
    """sft_then_rl: share of the steps that are SFT."""
    chord_start: float = 0.9
    """chord: mu at the start of its cosine."""
    chord_end: float = 0.05
    """chord: mu at its end."""
    chord_steps: int = 200
    """chord: length of the cosine."""
    chord_warmup: int = 0
    """chord: steps of linearly rising mu before it."""
    chord_phi: bool = False
    """chord: constant mu 0.1, each demonstration token weighted by p (1 - p)."""
    luffy_gamma: float = 0.1
    """luffy: gamma of the shaping pi / (pi + gamma)."""
    hpt_gate: int = 0
    """hpt: a prompt with at most so many right samples is trained on its demonstration instead (2 for weaker models)."""
    hpt_sft: float = 1.0
    """hpt: weight of such demonstrations (0.3 for the 1.5B model)."""

    # Evaluation, logging, checkpoints
    eval_every: int = 20
    """Steps between evaluations; also before the first, after the warm-up and after the last. 0: only those; -1: none."""
    eval_problems: int | None = None
    """Problems or episodes of each test set, greedy. By task: 140, 70, 70; games with --full-prompts 234, as in the papers."""
    show: int = 2
    """Prompts whose sampled responses are written to samples.jsonl at evaluations; the best and the worst are printed."""
    save_every: int = 40
    """Steps between checkpoints; also at the end and on Ctrl-C or SIGTERM."""
    keep: int = 3
    """Checkpoints kept."""
    resume: bool = False
    """Continue the newest checkpoint of --output-dir."""
    dry_run: bool = False
    """Check versions, devices, model, data, memory and disk without reading weights; exit status 1 if the run could not finish."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb; WANDB_MODE=offline works)."""

    # Machine
    replicas: int = 1
    """R: the ranks form R groups that shard their own copy of the model; gradients are summed over them."""
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
    trust_remote_code: bool = False
    """Let a hub model run its own code."""


# ---------------------------------------------------------------------------------------------------------------------
# Losses: one number a token, [B, L]. old: log-probability at the time of sampling; 0 for demonstrations (behaviour probability 1).


def ppo_loss(logprobs, old, advantages, eps):
    """Clipped surrogate, Schulman et al. 2017, eq. (7)."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)


def reinforce_loss(logprobs, old, advantages):
    """The surrogate without clipping (LUFFY's and HPT's own samples)."""
    return -(logprobs - old).exp() * advantages


def luffy_loss(logprobs, old, advantages, demonstration, gamma):
    """Own samples by their ratio, demonstrations by pi / (pi + gamma), differentiated through (2504.14945, eq. 5)."""
    p = logprobs.exp()
    return torch.where(demonstration, -p / (p + gamma) * advantages, reinforce_loss(logprobs, old, advantages))


def srft_loss(logprobs, old, advantages, demonstration, right, entropy, eps):
    """2506.19767: 0.5 exp(-H) (-log pi) + clipped surrogate on demonstrations; own samples 0.1 exp(H) (-log pi) if right, log pi if wrong.

    entropy [B, 1]: each sequence's mean token entropy H, without gradient. The paper says that the weight of right samples rises with
    the entropy; a public summary prints exp(-H) there. log pi of wrong samples has no lower bound: one step per rollout.
    """
    on_demonstrations = 0.5 * torch.exp(-entropy) * -logprobs + ppo_loss(logprobs, old, advantages, eps)
    on_own = torch.where(right, 0.1 * torch.exp(entropy) * -logprobs, logprobs)
    return torch.where(demonstration, on_demonstrations, on_own)


def sft_loss(logprobs, phi=False):
    """-log pi; with phi each token is weighted by p (1 - p), a constant to the gradient (CHORD-phi, 2508.11408)."""
    p = logprobs.detach().exp()
    return -(p * (1 - p)) * logprobs if phi else -logprobs


def group_advantages(returns: list[float], method: Literal["grpo", "mean", "leave_one_out"]) -> list[float]:
    """grpo: (R - mean) / (std + 1e-4), std with n - 1 (2402.03300); mean: R - mean (LUFFY, HPT); leave_one_out: R - mean of the others,
    the unbiased baseline that grad U needs."""
    n = len(returns)
    if n < 2:
        return [0.0] * n
    mean = sum(returns) / n
    if method == "leave_one_out":
        return [(r - mean) * n / (n - 1) for r in returns]
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / (n - 1))
    return [(r - mean) / (std + 1e-4) if method == "grpo" else r - mean for r in returns]


def gae(values: list[float], reward: float, lam: float) -> list[float]:
    """Generalised advantage estimation over the tokens of a response, gamma = 1, the reward after its last token (1506.02438, eq. 16)."""
    out, advantage, following = [], 0.0, 0.0
    for t in reversed(range(len(values))):
        delta = (reward if t == len(values) - 1 else 0.0) + following - values[t]
        advantage = delta + lam * advantage
        following = values[t]
        out.append(advantage)
    return out[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# The controller of mu


@torch.no_grad()
def step_derivative(optimizer, params, gradient, difference, norm: float, product: float, clip: float, preconditioner: str) -> None:
    """difference <- d theta / d mu of the step that was just taken (in place, shard by shard).

    gradient: G = (1 - mu) g_RL + mu g_SFT + g_aux before clipping; difference: D = g_SFT - g_RL; norm = |G|, product = <G, D>.
    "none": -alpha D, eq. (5). "adam": the derivative of clipped AdamW,
        dg = c (D - G <G, D> / |G|^2) if clipped else D,   dm = (1 - b1) dg / (1 - b1^t),   dv = (1 - b2) 2 g dg / (1 - b2^t)
        d theta / d mu = -alpha [ dm / (sqrt v + eps) - m dv / (2 sqrt v (sqrt v + eps)^2) ]      (bias-corrected m, v; 0 where v = 0)
    """
    c = min(1.0, clip / norm) if norm > 0 else 1.0
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for p, g, d in zip(params, gradient, difference, strict=True):
        group = groups[id(p)]
        if preconditioner == "none":
            d.mul_(-group["lr"])
            continue
        (b1, b2), eps, state = group["betas"], group["eps"], optimizer.state[p]
        t = float(state["step"])
        dg = c * (d - g * (product / norm**2)) if c < 1 else d
        m, v = local(state["exp_avg"]) / (1 - b1**t), local(state["exp_avg_sq"]) / (1 - b2**t)
        dm, dv, root = (1 - b1) / (1 - b1**t) * dg, (1 - b2) / (1 - b2**t) * 2 * c * g * dg, v.sqrt()
        second = torch.where(v > 0, m * dv / (2 * root * (root + eps) ** 2), torch.zeros_like(v))
        d.copy_((dm / (root + eps) - second) * -group["lr"])


def depends_on_mu(norm: float, product: float, square: float, clip: float, preconditioner: str) -> bool:
    """Whether mu changes the step at all (norm = |G|, product = <G, D>, square = |D|^2). It does not where G was clipped and D is parallel to it, as
    where all samples of each prompt are equally good: G = mu g_SFT has the same direction for every mu. What is left of d theta / d mu is then
    rounding, which no RMS must see."""
    aside = square * norm**2 - product**2  # |D|^2 |G|^2 sin^2 of the angle between them
    return square > 0 and (norm <= clip or preconditioner == "none" or aside > 1e-10 * square * norm**2)


class Controller:
    """mu and what its update remembers. Eq. (6), or its normalised form."""

    def __init__(self, args: Args):
        self.args, self.mu, self.squares = args, args.mu_init, []
        printed = args.mu_update == "printed"
        self.eta_mu = args.eta_mu if args.eta_mu is not None else 1e-4 if printed else 0.05
        self.eta_entropy = args.eta_entropy if args.eta_entropy is not None else 5e-4 if printed else 0.05

    def update(self, step: int, gradient: float | None, entropy: float, target: float) -> dict[str, float]:
        """One update after optimizer step number `step` (from 1). gradient: grad_mu U, or None where it was not taken."""
        args, change = self.args, {"meta_gradient": 0.0, "entropy": 0.0}
        if gradient:  # exactly 0: the validation samples of every prompt are equally good, which says nothing and must not count in the RMS
            if args.mu_update == "printed":
                change["meta_gradient"] = self.eta_mu * gradient
            elif len(self.squares) >= 2:  # the first two values only fill the running RMS
                rms = math.sqrt(sum(self.squares) / len(self.squares))
                change["meta_gradient"] = self.eta_mu * max(-3.0, min(3.0, gradient / max(rms, 1e-30)))
            self.squares.append(gradient**2)
        if not args.no_entropy_term and (args.mu_update == "printed" or step % args.mu_every == 0):
            change["entropy"] = self.eta_entropy * (target - entropy) * (1 if args.entropy_sign == "printed" else -1)
        self.mu = min(args.mu_max, max(args.mu_min, self.mu + sum(change.values())))
        return {f"mu_change/{k}": v for k, v in change.items()}


def mu_of_step(args: Args, step: int, controller: Controller) -> float:
    """The weight of imitation at a step (from 0): 1 in a warm-up, else the method's."""
    if step < args.warmup_steps or args.method == "sft":
        return 1.0
    if args.method == "sft_then_rl":
        return float(step < round(args.sft_share * args.steps))
    if args.method == "chord":
        if args.chord_phi:
            return 0.1
        if step < args.chord_warmup:
            return args.chord_start * (step + 1) / args.chord_warmup
        done = min(1.0, (step - args.chord_warmup) / args.chord_steps)
        return args.chord_end + (args.chord_start - args.chord_end) * 0.5 * (1 + math.cos(math.pi * done))
    return {"amft": controller.mu, "fixed": args.mu_init}.get(args.method, 0.0)


def with_defaults(args: Args) -> Args:
    """The defaults that depend on the task and the method."""
    first, episodes = 5 if args.method == "amft" else 0, 234 if args.full_prompts else 70
    model = "tiny_vision" if args.vision else "tiny_games"
    by_task = {"math": {"model": "tiny_bare", "steps": 80, "warmup_steps": first, "prompts_per_step": 16, "samples": 8, "eval_problems": 140},
               "general_points": {"model": model, "steps": 70, "warmup_steps": first, "prompts_per_step": 8, "samples": 8, "eval_problems": episodes},
               "virl": {"model": model, "steps": 30, "warmup_steps": first, "prompts_per_step": 4, "samples": 4, "eval_problems": episodes}}[args.task]
    by_task |= {"lr": 1e-4, "warmup_lr": 1e-3, "warmup_steps": 20, "warmup_batch": 32} if args.vision else {"lr": 3e-5}
    args = replace(args, **{k: v for k, v in by_task.items() if getattr(args, k) is None})
    rest = {"warmup_batch": args.prompts_per_step, "warmup_lr": args.lr, "validation_prompts": args.prompts_per_step}
    return replace(args, **{k: v for k, v in rest.items() if getattr(args, k) is None})


# ---------------------------------------------------------------------------------------------------------------------
# From episodes to rows of a batch


@dataclass
class Row:
    """One response with what its loss needs."""

    turn: Turn
    advantages: list[float]  # one a token
    weight: float = 0.0  # of each of its tokens in the loss
    demonstration: bool = False
    right: bool = False
    returns: list[float] = field(default_factory=list)  # targets of the value head


def rl_rows(args: Args, groups: list[list[Episode]], demonstrations: list[Episode]) -> tuple[list[Row], list[Row]]:
    """(rows of L_RL, rows of L_SFT) by the method, weights not yet set. luffy and srft put demonstrations into L_RL; hpt decides
    prompt by prompt."""
    rl, sft = [], []
    for group, demonstration in zip(groups, demonstrations, strict=True):
        in_group = args.method in ("luffy", "srft")
        if args.method == "hpt" and sum(e.won for e in group) <= args.hpt_gate:
            sft += [demonstration_row(t) for t in demonstration.turns]
            continue
        members = [(e, False) for e in group] + [(demonstration, True)] * in_group
        turns = [(t, r, shown, e.won) for e, shown in members for t, r in zip(e.turns, e.returns(args.turn_gamma), strict=True)]
        baseline = "mean" if args.method in ("luffy", "hpt") else "grpo"
        for (t, r, shown, won), a in zip(turns, group_advantages([r for _, r, _, _ in turns], baseline), strict=True):
            rl.append(Row(t, [a] * len(t.ids), demonstration=shown, right=won, returns=[r] * len(t.ids)))
        if not in_group and args.method != "hpt":
            sft += [demonstration_row(t) for t in demonstration.turns]
    return rl, sft


def demonstration_row(turn: Turn) -> Row:
    return Row(turn, [0.0] * len(turn.ids), demonstration=True)


def set_weights(args: Args, world: World, rl: list[Row], sft: list[Row]) -> None:
    """Each token's share of the loss, by the method's normalisation, over all ranks. Truncated rows weigh nothing with --mask-truncated."""
    kept = [r for r in rl if r.turn.finished or not args.mask_truncated]
    size = lambda rows: sum(len(r.turn.ids) for r in rows)  # noqa: E731
    own, shown = [r for r in kept if not r.demonstration], [r for r in kept if r.demonstration]
    own_n, own_tokens, shown_n, shown_tokens, sft_n, sft_tokens = total(world, len(own), size(own), len(shown), size(shown), len(sft), size(sft))
    for r in kept:
        if args.method == "luffy":  # (1 / sequences) sum / L_max
            r.weight = 1 / ((own_n + shown_n) * args.max_new_tokens)
        elif args.method == "hpt":  # the mean over all prompts of either part
            r.weight = 1 / (args.prompts_per_step * args.samples * args.max_new_tokens)
        elif args.method == "srft":  # token means, one denominator for right and wrong samples
            r.weight = 1 / (shown_tokens if r.demonstration else own_tokens)
        elif args.loss_aggregation == "sequence":
            r.weight = 1 / (own_n * len(r.turn.ids))
        else:
            r.weight = 1 / own_tokens
    for r in sft:
        r.weight = args.hpt_sft / (args.prompts_per_step * len(r.turn.ids)) if args.method == "hpt" else 1 / sft_tokens


def batches(rows: list[Row], pad_id: int, micro_batch: int, world: World, count: int) -> list[dict]:
    """`count` micro-batches sorted by length, padded to multiples of 32 tokens; missing ones are filled with rows of weight 0, as all ranks
    of a shard group must call the model equally often."""
    rows = sorted(rows, key=lambda r: len(r.turn.prompt) + len(r.turn.ids))
    out = []
    for k in range(count):
        part = rows[k * micro_batch : (k + 1) * micro_batch] or [replace(rows[0], weight=0.0) if rows else Row(Turn([pad_id], [pad_id], [0.0], True, "", 0.0), [0.0])]
        length = -(-max(len(r.turn.prompt) + len(r.turn.ids) for r in part) // 32) * 32
        ids = torch.full((len(part), length), pad_id)
        mask = torch.zeros(len(part), length - 1, dtype=torch.bool)
        old, advantages, returns = (torch.zeros(len(part), length - 1) for _ in range(3))
        for i, r in enumerate(part):
            start, end = len(r.turn.prompt), len(r.turn.prompt) + len(r.turn.ids)
            ids[i, :end] = torch.tensor(r.turn.prompt + r.turn.ids)
            at = slice(start - 1, end - 1)  # the token at position t is predicted at t - 1
            mask[i, at], old[i, at], advantages[i, at] = True, torch.tensor(r.turn.old_logprobs), torch.tensor(r.advantages)
            if r.returns:
                returns[i, at] = torch.tensor(r.returns)
        flags = {k: torch.tensor([[getattr(r, k)] for r in part]) for k in ("weight", "demonstration", "right")}
        batch = {"ids": ids, "mask": mask, "old": old, "advantages": advantages, "returns": returns} | flags
        inputs = models.stack_inputs([(r.turn.inputs, len(r.turn.prompt)) for r in part], length, left=False)  # of the pictures
        out.append({k: v.to(world.device) for k, v in batch.items()} | {"inputs": {k: v.to(world.device) for k, v in inputs.items()}})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# One step


class Learner:
    """Policy, optimizer and their machine: backward passes and the steps that follow them."""

    def __init__(self, args: Args, policy: Policy, optimizer, world: World, pad_id: int):
        self.args, self.policy, self.optimizer, self.world, self.pad_id = args, policy, optimizer, world, pad_id
        self.params = [p for p in policy.parameters() if p.requires_grad]

    def batches(self, rows: list[Row]) -> list[dict]:
        """This rank's micro-batches, as many as the rank with most rows needs."""
        count = torch.tensor(-(-len(rows) // self.args.micro_batch), device=self.world.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return batches(rows, self.pad_id, self.args.micro_batch, self.world, int(count))

    def backward(self, rows: list[Row], part: Literal["rl", "sft", "aux", "rl+aux", "utility"], scale: float = 1.0) -> dict[str, float]:
        """Adds scale x grad of a part of the loss to p.grad. Returns sums over this rank's tokens (weighted: the losses).

        "rl" and "sft": eq. (1) or the method's own form, and eq. (2). "aux": value loss and entropy bonus, which mu does not weigh.
        "utility": the loss whose gradient is -grad U.
        """
        args, sums = self.args, dict.fromkeys(("rl", "sft", "value", "entropy", "tokens", "clipped", "kl"), 0.0)
        silent = [part == "rl" and (r.weight == 0 or (args.method != "srft" and not any(r.advantages))) for r in rows]
        parts = [(b, learns) for learns in (True, False) for b in self.batches([r for r, s in zip(rows, silent, strict=True) if s != learns])]
        for b, learns in parts:  # rows without a gradient (all samples of their prompt are equally good) are only measured
            with torch.set_grad_enabled(learns):
                logprobs, entropy, values = self.policy(b["ids"], b["mask"], args.entropy_coefficient > 0 and "aux" in part, **b["inputs"])
            weight, old, advantages = b["weight"] * b["mask"], b["old"], b["advantages"]
            loss = logprobs.sum() * 0.0
            if part.startswith("rl"):
                if args.method == "luffy":
                    tokens = luffy_loss(logprobs, old, advantages, b["demonstration"], args.luffy_gamma)
                elif args.method == "srft":
                    H = (entropy.detach().sum(1) / b["mask"].sum(1))[:, None]
                    tokens = srft_loss(logprobs, old, advantages, b["demonstration"], b["right"], H, args.clip_ratio)
                elif args.method == "hpt":
                    tokens = reinforce_loss(logprobs, old, advantages)
                else:
                    tokens = ppo_loss(logprobs, old, advantages, args.clip_ratio)
                rl = (tokens * weight).sum()
                loss, sums["rl"] = loss + scale * rl, sums["rl"] + rl.item()
            if part == "sft":
                sft = (sft_loss(logprobs, args.chord_phi and args.method == "chord") * weight).sum()
                loss, sums["sft"] = loss + scale * sft, sums["sft"] + sft.item()
            if "aux" in part:
                if args.entropy_coefficient:
                    loss = loss - args.entropy_coefficient * (entropy * weight).sum()
                if values is not None:
                    value = 0.5 * ((values - b["returns"]).square() * weight).sum()
                    loss, sums["value"] = loss + args.value_coefficient * value, sums["value"] + value.item()
            if part == "utility":
                loss = -(logprobs * advantages * weight).sum()
            if learns:
                (loss * self.world.shards).backward()  # FSDP averages over the shard group
            with torch.no_grad():
                own = b["mask"] & ~b["demonstration"] & (b["weight"] > 0)
                ratio = (logprobs - old)[own]
                sums["tokens"] += own.sum().item()
                sums["entropy"] += entropy[own].sum().item()
                sums["clipped"] += ((ratio.exp() - 1).abs() > args.clip_ratio).sum().item()
                sums["kl"] += (ratio.exp() - 1 - ratio).sum().item()  # Schulman's k3 estimate of KL(old | new)
        return sums

    @torch.no_grad()
    def entropy(self, rows: list[Row]) -> float:
        """Mean token entropy of the policy over its own responses, over all ranks."""
        sums = [0.0, 0.0]
        for b in self.batches(rows):
            _, entropy, _ = self.policy(b["ids"], b["mask"], **b["inputs"])
            real = b["mask"] & (b["weight"] > 0)
            sums = [sums[0] + entropy[real].sum().item(), sums[1] + real.sum().item()]
        entropy, count = total(self.world, *sums)
        return entropy / max(count, 1)

    @torch.no_grad()
    def estimate_advantages(self, rows: list[Row]) -> None:
        """GAE with the value head at theta_old; advantages whitened over all tokens of the batch."""
        rows = sorted(rows, key=lambda r: len(r.turn.prompt) + len(r.turn.ids))
        flat, size = [], self.args.micro_batch
        for k, b in enumerate(self.batches(rows)):
            _, _, values = self.policy(b["ids"], b["mask"], **b["inputs"])
            for r, v, m in zip(rows[k * size : (k + 1) * size], values, b["mask"], strict=False):
                v = v[m].tolist()
                r.advantages = gae(v, r.returns[-1], self.args.gae_lambda)
                r.returns = [a + x for a, x in zip(r.advantages, v, strict=True)]
                flat += r.advantages
        n, s, squares = total(self.world, len(flat), sum(flat), sum(a * a for a in flat))
        mean, std = s / n, math.sqrt(max(0.0, squares / n - (s / n) ** 2))
        for r in rows:
            r.advantages = [(a - mean) / (std + 1e-8) for a in r.advantages]

    def flat(self) -> list[torch.Tensor]:
        """A gradient-sized buffer, as views."""
        shards = [local(p) for p in self.params]
        buffer = torch.zeros(sum(s.numel() for s in shards), dtype=shards[0].dtype, device=shards[0].device)
        return [v.view(s.shape) for v, s in zip(buffer.split([s.numel() for s in shards]), shards, strict=True)]

    def move_gradient(self, *targets: tuple[list[torch.Tensor], float]) -> None:
        """For each (buffer, factor): buffer += factor x p.grad. Then p.grad is dropped."""
        for i, p in enumerate(self.params):
            if p.grad is not None:
                for buffer, factor in targets:
                    buffer[i].add_(local(p.grad), alpha=factor)
                p.grad = None

    def reduce(self, buffer: list[torch.Tensor]) -> None:
        """Sum over the replicas."""
        if self.world.replicas > 1:
            dist.all_reduce(buffer[0]._base, group=self.world.mesh.get_group("replica"))

    def dot(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        """Inner product over all shards, in float64."""
        x = sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))
        if self.world.shards > 1:
            dist.all_reduce(x, group=self.world.mesh.get_group("shard"))
        return x.item()

    def take_step(self, gradient: list[torch.Tensor], lr: float) -> tuple[float, bool]:
        """Clip and AdamW with the gradient G, which is left unclipped. Returns (|G|, whether the step was finite and taken)."""
        square = self.dot(gradient, gradient)
        if not math.isfinite(square):
            return math.inf, False
        norm = math.sqrt(square)
        c = min(1.0, self.args.clip / norm) if norm > 0 else 1.0
        for p, g in zip(self.params, gradient, strict=True):
            g = g * c if c < 1 else g
            p.grad = DTensor.from_local(g, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()) if isinstance(p, DTensor) else g
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, True

    def utility_gradient(self, groups: list[list[Episode]], derivative: list[torch.Tensor]) -> tuple[float, float]:
        """(grad_mu U, its signal-to-noise ratio from two half-batches): < grad U, d theta / d mu >, eq. (5). Log-probabilities are
        summed over an episode's turns and weighted by its return against the others of its group."""
        halves = []
        for half in (0, 1):
            rows = []
            for group in groups[half::2]:
                for episode, a in zip(group, group_advantages([e.returns()[0] for e in group], "leave_one_out"), strict=True):
                    rows += [Row(t, [a] * len(t.ids)) for t in episode.turns if a]
            (episodes,) = total(self.world, sum(len(g) for g in groups[half::2]))
            for r in rows:
                r.weight = 1 / episodes
            self.backward(rows, "utility")
            gradient = self.flat()
            self.move_gradient((gradient, 1.0))
            self.reduce(gradient)
            halves.append(-self.dot(gradient, derivative))
        mean, noise = sum(halves) / 2, abs(halves[0] - halves[1]) / 2
        return mean, abs(mean) / max(noise, 1e-30)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything expensive


def check(args: Args, size: int) -> None:
    """Raises DataError for arguments that cannot work."""
    models.check_positive(args, ("steps", "prompts_per_step", "warmup_batch", "max_new_tokens", "epochs", "minibatches", "mu_every", "validation_prompts", "validation_size",
                                 "eval_problems", "save_every", "keep", "max_length", "replicas", "micro_batch", "generation_batch", "chord_steps", "lr_warmup"),
                          ("lr", "warmup_lr", "value_lr", "clip", "clip_ratio", "luffy_gamma"))
    if size % args.replicas:
        raise DataError(f"--replicas {args.replicas} does not divide the {size} ranks")
    for name in ("prompts_per_step", "validation_prompts", "warmup_batch"):
        if getattr(args, name) % size:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be shared equally by {size} ranks")
    if args.samples < 2 and args.method not in ("sft",):
        raise DataError("--samples must be at least 2: a response is judged against the others of its prompt")
    if args.vision and args.task == "math":
        raise DataError("--vision is for the games: --task general_points or virl")
    if not 0 <= args.mu_min <= args.mu_init <= args.mu_max <= 1:
        raise DataError(f"0 <= --mu-min <= --mu-init <= --mu-max <= 1 is needed, not {args.mu_min}, {args.mu_init}, {args.mu_max}")
    if not 0 <= args.warmup_steps <= args.steps:
        raise DataError(f"--warmup-steps must be between 0 and --steps, not {args.warmup_steps}")
    if args.method == "amft" and args.epochs * args.minibatches > 1:
        raise DataError("--method amft takes one optimizer step per rollout: d theta / d mu is the derivative of that one step")
    if args.method == "srft" and args.epochs > 1:
        raise DataError("--method srft: the loss of wrong samples has no lower bound, so --epochs must be 1")
    if args.method in ("luffy", "srft", "hpt") and args.advantage == "gae":
        raise DataError(f"--method {args.method} has advantages of its own: leave --advantage at grpo")


def load_task(args: Args, tokenizer) -> tuple:
    """(training game, validation game, {test: (game, episodes)}, a line on what there is)."""
    if args.task != "math":
        train, validation, tests = games_of(args.task, rule=args.rule, suits=args.suits, actions=args.actions, vision=args.vision, compact=not args.full_prompts,
                                            routes=args.routes, test_routes=args.test_routes)
        return train, validation, {name: (game, args.eval_problems) for name, game in tests.items()}, f"{args.task}: episodes without end"
    train, validation, tests, report = load_problems(args.data, tokenizer, validation=args.validation_size, test=args.eval_problems, max_length=args.max_length,
                                                     subjects=args.subjects, levels=args.levels, seed=args.seed, suffix=args.suffix)
    return train, validation, {name: (game, len(game)) for name, game in tests.items()}, report


def dry_run(args: Args, world: World) -> int:
    """The environment test. Returns the exit status: 1 if the run could not finish."""
    say = functools.partial(print, flush=True) if world.rank == 0 else lambda *a: None
    reasons = models.check_ranks(world, say)
    try:
        config, tokenizer, processor = models.load_readers(args.model, args.vision, args.trust_remote_code)
        train, _, _, report = load_task(args, tokenizer)
        say(report)
        lengths = [len(t.prompt) + max(len(t.ids), args.max_new_tokens) for i in range(32) for t in demonstrate(tokenizer, train, i, processor).turns]
        responses = args.prompts_per_step * args.samples
        say(f"{responses} responses per step, at most {responses * max(lengths):,} tokens")
        reasons += models.check_space(config, world, say, 4 + 2 * (args.method == "amft"), args.micro_batch * max(lengths), args.activation_checkpointing,
                                      args.output_dir, min(args.keep, -(-args.steps // args.save_every)) + 1)
    except (DataError, models.ModelError) as e:
        reasons.append(str(e))
    say("\n".join(f"cannot finish: {r}" for r in reasons) or "ready")
    return 1 if reasons else 0


# ---------------------------------------------------------------------------------------------------------------------


def build(args: Args, config, world: World) -> Policy:
    """The sharded policy with its weights: fp32 master weights, bf16 compute on GPUs."""
    source = Policy(models.load_weights(args.model, trust_remote_code=args.trust_remote_code), args.advantage == "gae") if world.rank == 0 else None
    policy = Policy(models.skeleton(config, trust_remote_code=args.trust_remote_code), args.advantage == "gae")
    if source is not None and args.advantage == "gae":
        torch.nn.init.zeros_(source.value.weight), torch.nn.init.zeros_(source.value.bias)
    if args.activation_checkpointing:
        policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = models.layers_to_shard(policy.lm)
    if args.compile:
        for block in blocks:
            block.compile()
    cuda = world.device.type == "cuda"
    if cuda or world.shards > 1:  # one CPU rank has nothing to shard or cast
        sharding = {"mesh": world.mesh["shard"], "offload_policy": CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
                    "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cuda else MixedPrecisionPolicy()}
        for block in blocks:
            fully_shard(block, **sharding)
        fully_shard(policy, **sharding)
    models.materialize(policy, source, torch.device("cpu") if args.cpu_offload else world.device)
    models.check_head(policy, world)
    return policy.train()


# What may differ when a run is resumed: it does not change the mathematics.
FREE = {"resume", "output_dir", "wandb", "save_every", "keep", "eval_every", "show", "replicas", "micro_batch", "generation_batch", "activation_checkpointing",
        "cpu_offload", "compile", "dry_run"}


def main(args: Args, world: World) -> int:
    rank0, begun = world.rank == 0, time.time()
    say = functools.partial(tqdm.write, file=sys.stdout) if rank0 else lambda *a: None
    config, tokenizer, processor = models.load_readers(args.model, args.vision, args.trust_remote_code)
    train, validation, tests, report = load_task(args, tokenizer)
    say(report)
    run = models.run_folder(args.output_dir, asdict(args), args.resume, FREE, world.rank)
    resume_from = models.checkpoints(run)[-1] if args.resume and models.checkpoints(run) else None

    torch.manual_seed(args.seed)
    policy = build(args, config, world)
    heads = [{"params": [p for n, p in policy.named_parameters() if n.startswith("value.") == head], "lr": lr, "peak": lr} for head, lr in ((False, args.lr), (True, args.value_lr))]
    optimizer = torch.optim.AdamW([g for g in heads if g["params"]], betas=args.betas, weight_decay=args.weight_decay, fused=True)
    learner, controller, stop = Learner(args, policy, optimizer, world, tokenizer.pad_token_id), Controller(args), Stop(world)
    state = {"step": 0, "skipped": 0, "skipped_in_a_row": 0, "optimizer_steps": 0, "entropy_target": None, "mu": args.mu_init, "squares": []}
    if resume_from:
        state = models.load_checkpoint(resume_from, policy, optimizer)
        controller.mu, controller.squares = state["mu"], state["squares"]
    say(f"{args.method}: {sum(p.numel() for p in learner.params) / 1e6:.1f}M parameters, {world.size} rank(s), run folder {run}"
        + (f", resumed at step {state['step']}" if resume_from else ""))
    log = evaluation.Log("amft", asdict(args), run, rank0, state["step"], "samples.jsonl")
    saved_at = state["step"] if resume_from else -1
    save_dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32

    def save():
        nonlocal saved_at
        if saved_at != state["step"]:
            state.update(mu=controller.mu, squares=controller.squares)
            models.save_checkpoint(run / "checkpoint", lambda tmp: models.write_training_state(tmp, policy, processor or tokenizer, optimizer, save_dtype, policy.lm), state, args.keep)
            saved_at = state["step"]

    own_samples = args.samples - (args.method == "luffy")
    share = lambda count, start=0: [start + world.rank + world.size * i for i in range(count // world.size)]  # this rank's prompts  # noqa: E731

    def rollout(game, seeds, key):
        with models.gathered(policy):
            return models.play(policy.lm, tokenizer, game, seeds, own_samples if game is train else args.samples, f"{args.seed}/{key}", args.max_new_tokens,
                               args.generation_batch, processor=processor, progress="rollout" if rank0 and args.max_new_tokens > 1024 else None)

    bar = tqdm(total=args.steps, initial=state["step"], disable=not rank0, desc=args.method, mininterval=0.5)
    failed, stopped, warned = None, False, set()

    def warn(kind: str, text: str) -> None:
        if kind not in warned:
            warned.add(kind)
            say(f"warning: {text}")

    for step in range(state["step"], args.steps + 1):
        last = step == args.steps
        if stopped := stop.agreed():
            break
        due = args.eval_every >= 0 and (step in (0, args.warmup_steps) or last or (args.eval_every and step % args.eval_every == 0))
        if due and step not in log.evaluations:
            with models.gathered(policy):
                result = evaluation.play_tests(policy.lm, tokenizer, world, tests, args.max_new_tokens, args.generation_batch, processor)
                shown = evaluation.sample_rows(policy.lm, tokenizer, validation, args.show if rank0 else 0, args.samples, step, args.seed, args.max_new_tokens, args.generation_batch, processor)
            more = [] if args.task == "math" else ["step_accuracy"] + ["recognition"] * (args.vision and args.task == "general_points")
            more = {n: "".join(f", {k.replace('_', ' ')} {r[k]:.1%}" for k in more) for n, r in result.items()}
            log.record(step, result, "; ".join(f"{n} {r['accuracy']:.1%}{more[n]}, {r['length']:.0f} tokens" for n, r in result.items()), shown)
        if last:
            break
        torch.manual_seed(hash((args.seed, step, world.rank)) % 2**31)  # dropout, where a model has it
        warming, mu = step < args.warmup_steps, mu_of_step(args, step, controller)
        lr = min(1.0, (step + 1) / args.lr_warmup) * (args.warmup_lr / args.lr if warming else 1.0)
        explore = not warming and (mu < 1 or args.method in ("luffy", "srft", "hpt"))
        imitate = warming or args.method == "hpt" or (mu > 0 and args.method not in ("luffy", "srft"))
        if args.method == "amft" and step == args.warmup_steps and state["entropy_target"] is None:  # H*: of the warm policy, on its own rollouts
            groups = rollout(validation, share(args.validation_prompts), "target")
            state["entropy_target"] = learner.entropy([Row(t, [0.0] * len(t.ids), 1.0) for g in groups for e in g for t in e.turns])

        # (a, b) demonstrations and rollouts of this step's prompts, rewards, advantages
        clock = [time.perf_counter()]
        seeds = share(args.warmup_batch, step * args.warmup_batch) if warming else \
            share(args.prompts_per_step, args.warmup_steps * args.warmup_batch + (step - args.warmup_steps) * args.prompts_per_step)
        demonstrations = [demonstrate(tokenizer, train, s, processor) for s in seeds]
        groups = rollout(train, seeds, step) if explore else []
        clock.append(time.perf_counter())
        rl, sft = rl_rows(args, groups, demonstrations) if explore else ([], [demonstration_row(t) for d in demonstrations for t in d.turns])
        sft = sft if imitate else []
        if args.method == "hpt":
            explore, imitate = (x > 0 for x in total(world, len(rl), len(sft)))
        if args.advantage == "gae" and explore:
            learner.estimate_advantages(rl)

        # (d) the losses at theta; G and, where mu will be updated, D = g_SFT - g_RL
        coefficients = {"rl": 1.0 if args.method in ("luffy", "srft", "hpt") else 1 - mu, "sft": 1.0 if warming or args.method == "hpt" else mu}
        update_mu = (args.method == "amft" and not args.no_meta_gradient and step >= args.warmup_steps and (step + 1) % args.mu_every == 0 and state["optimizer_steps"] >= 10)
        auxiliary, sums, norm, finite, difference = args.entropy_coefficient or args.advantage == "gae", {}, 0.0, True, None

        def add(part, rows, scale=1.0):
            for k, v in learner.backward(rows, part, scale).items():
                sums[k] = sums.get(k, 0.0) + v * (k not in ("entropy", "tokens", "clipped", "kl") or part.startswith("rl"))

        for k in range(args.epochs * args.minibatches):
            part = slice(k % args.minibatches, None, args.minibatches)
            rl_part, sft_part = rl[part], sft[part]
            set_weights(args, world, rl_part, sft_part)
            gradient = learner.flat() if update_mu or world.replicas > 1 else None
            if update_mu:
                difference = learner.flat()
                add("sft", sft_part)
                learner.move_gradient((difference, 1.0), (gradient, mu))
                add("rl", rl_part)
                learner.move_gradient((difference, -1.0), (gradient, 1 - mu))
                if auxiliary:
                    add("aux", rl_part)
                    learner.move_gradient((gradient, 1.0))
                learner.reduce(difference)
            else:
                if imitate:
                    add("sft", sft_part, coefficients["sft"])
                if explore:
                    add("rl+aux" if auxiliary else "rl", rl_part, coefficients["rl"])
            if gradient is not None:
                learner.move_gradient((gradient, 1.0))
                learner.reduce(gradient)
            else:
                gradient = [local(p.grad) if p.grad is not None else torch.zeros_like(local(p)) for p in learner.params]
            norm, finite = learner.take_step(gradient, lr)
            state["optimizer_steps"] += finite
            if not finite:
                optimizer.zero_grad()
                break
        clock.append(time.perf_counter())

        # (c) grad_mu U at the new theta, and the mu of the next step
        losses = dict(zip(sums, total(world, *sums.values()), strict=True))
        tokens = max(losses["tokens"], 1)
        metrics = {"step": step + 1, "mu": mu, "loss/sft": losses["sft"], "loss/rl": losses["rl"],
                   "loss/total": coefficients["rl"] * losses["rl"] + coefficients["sft"] * losses["sft"], "grad_norm": norm, "lr": args.lr * lr}
        if args.advantage == "gae":
            metrics["loss/value"] = losses["value"]
        if groups:
            metrics |= evaluation.rollout_metrics(groups, world)
            if losses["tokens"]:
                metrics |= {"entropy": losses["entropy"] / tokens, "clip_fraction": losses["clipped"] / tokens, "approx_kl": losses["kl"] / tokens}
            if metrics["truncated"] > 0.5:
                warn("cut", f"{metrics['truncated']:.0%} of the responses are cut at --max-new-tokens {args.max_new_tokens}: their rewards say little")
            if metrics["groups_without_variance"] == 1:
                warn("equal", "all responses to each prompt have the same reward: this step's advantages are zero, nothing is learned from them")
        if args.method == "amft" and state["entropy_target"] is not None and finite:
            grad_mu = None
            product, square = (learner.dot(gradient, difference), learner.dot(difference, difference)) if update_mu else (0.0, 0.0)
            if depends_on_mu(norm, product, square, args.clip, args.meta_preconditioner):
                step_derivative(optimizer, learner.params, gradient, difference, norm, product, args.clip, args.meta_preconditioner)
                seeds = share(args.validation_prompts, (step + 1) // args.mu_every * args.validation_prompts)
                grad_mu, noise_ratio = learner.utility_gradient(rollout(validation, seeds, f"{step}/validation"), difference)
                metrics |= {"grad_mu": grad_mu, "grad_mu_snr": noise_ratio}
            metrics |= {"entropy_target": state["entropy_target"]}
            if "entropy" in metrics:
                metrics |= controller.update(step + 1, grad_mu, metrics["entropy"], state["entropy_target"])
        difference = gradient = None
        clock.append(time.perf_counter())
        state["step"], state["skipped"] = step + 1, state["skipped"] + (not finite)
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
        generated, trained = total(world, sum(len(t.ids) for g in groups for e in g for t in e.turns), sum(len(r.turn.prompt) + len(r.turn.ids) for r in rl + sft))
        metrics |= {"skipped_steps": state["skipped"], "seconds": clock[-1] - clock[0], "seconds/rollout": clock[1] - clock[0], "seconds/train": clock[2] - clock[1],
                    "seconds/mu": clock[3] - clock[2], "tokens_per_second/rollout": generated / (clock[1] - clock[0]),
                    "tokens_per_second/train": args.epochs * trained / (clock[2] - clock[1]), "peak_memory_gb": models.peak_memory(world.device) / 1e9}
        log.step(metrics)
        bar.update()
        bar.set_postfix(mu=f"{mu:.2f}", reward=f"{metrics.get('reward/mean', math.nan):.2f}", H=f"{metrics.get('entropy', math.nan):.2f}")
        if state["skipped_in_a_row"] >= 5:
            failed = (f"the gradient was not finite in 5 steps running (to step {step + 1}): lower --lr. "
                      f"Last good checkpoint: {models.checkpoints(run)[-1] if models.checkpoints(run) else 'none'}")
            break
        if (step + 1) % args.save_every == 0 and state["skipped_in_a_row"] == 0:
            save()
    bar.close()
    if failed:
        print(f"amft.py: {failed}", file=sys.stderr) if rank0 else None
        return 1
    save()
    if stopped:
        say(f"stopped at step {state['step']} and saved; to go on: the same command with --output-dir {run} --resume")
        return 0
    if rank0:
        import plots

        if log.evaluations:
            print("\n" + evaluation.tests_table(log.evaluations[min(log.evaluations)], log.evaluations[max(log.evaluations)]))
        plots.figure([run], run / "dynamics.png")
        print(f"\n{time.time() - begun:.0f} s; model: {run / 'checkpoint'}; picture: {run / 'dynamics.png'}; responses: {run / 'samples.jsonl'}")
    return 0


def cli() -> int:
    start = lambda args, world: (dry_run if args.dry_run else main)(with_defaults(args), world)  # noqa: E731
    return models.run_script("amft.py", Args, lambda args, size: check(with_defaults(args), size), start)


if __name__ == "__main__":
    sys.exit(cli())
