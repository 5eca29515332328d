"""A policy that is trained: rows, micro-batches, gradients in flat buffers, and AdamW's step.

What lies below amft.py's losses and methods. A `Row` is one response with what
its loss needs; `PolicyLearner.backward` takes the gradient of a sum of losses on rows and adds it
to buffers, each with its factor; `dot` and `take_step` are for those buffers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from games.play import Trajectory, Turn
from model import World, each_gradient, flat_like, local, set_gradients, trained_parameters
from policy import Policy, stack_inputs
from vllm_sampler import engine_metrics, truncated_weights


@dataclass
class Row:
    """One response with what its loss needs."""

    turn: Turn
    advantages: list[float]  # one a token
    weight: float = 0.0  # of each of its tokens in the loss
    prompt: int = 0  # which of this rank's prompts of the step
    demonstration: bool = False
    right: bool = False  # whether its reward is above 0
    reward_to_go: float = 0.0  # of this turn and, discounted, of the turns after it
    value_targets: list[float] = field(default_factory=list)  # one a token, for the value head
    importance: list[float] = field(default_factory=list)  # one a token; see PolicyLearner.correct

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.turn.prompt) + len(self.turn.ids)


def token_count(rows: list[Row]) -> int:
    """Tokens of the responses."""
    return sum(len(row.turn.ids) for row in rows)


class Tokens(NamedTuple):
    """What a loss may use, [B, L] or, of a whole response, [B, 1]."""

    logprobs: torch.Tensor  # log pi(token)
    entropy: torch.Tensor  # of pi at the token, nats
    values: torch.Tensor | None  # of the value head, before the token
    old: torch.Tensor  # log-probability when it was sampled; 0 (certain) for demonstrations
    advantages: torch.Tensor
    value_targets: torch.Tensor
    mask: torch.Tensor  # where there is a response token
    weight: torch.Tensor  # [B, 1] of each token in the mean
    demonstration: torch.Tensor  # [B, 1]
    right: torch.Tensor  # [B, 1] whether its reward is above 0
    importance: torch.Tensor | float = 1.0  # of a token that another engine has drawn

    def weighted_sum(self, loss: torch.Tensor) -> torch.Tensor:
        """The weights make it a mean over all ranks."""
        return (loss * (self.weight * self.importance * self.mask)).sum()


class Pass(NamedTuple):
    """A backward pass: where the gradient of a sum of losses on some rows goes."""

    rows: list[Row]
    losses: dict[str, tuple[Callable, float]]  # by name: (Tokens, args) -> [B, L], and its factor
    targets: list[tuple[list[torch.Tensor], float]]  # (buffer, factor): buffer += factor x gradient
    """Empty: the rows have no gradient and are only measured."""


def collate_rows(rows: list[Row], pad_id: int, device: torch.device) -> dict:
    """A batch, padded on the right to a multiple of 32 tokens.

    ids [B, T]; mask, old, advantages, value_targets, importance [B, T-1]: the token at position t
    is predicted at t - 1; weight, demonstration, right [B, 1]; inputs: what comes of pictures.
    """
    length = -(-max(row.length for row in rows) // 32) * 32
    shape = len(rows), length - 1
    batch = {"ids": torch.full((len(rows), length), pad_id)}
    batch["mask"] = torch.zeros(shape, dtype=torch.bool)
    for name in ("old", "advantages", "value_targets"):
        batch[name] = torch.zeros(shape)
    if any(row.importance for row in rows):
        batch["importance"] = torch.ones(shape)
    for i, row in enumerate(rows):
        batch["ids"][i, : row.length] = torch.tensor(row.turn.prompt + row.turn.ids)
        at = slice(len(row.turn.prompt) - 1, row.length - 1)
        batch["mask"][i, at] = True
        batch["old"][i, at] = torch.tensor(row.turn.old_logprobs)
        batch["advantages"][i, at] = torch.tensor(row.advantages)
        if row.value_targets:
            batch["value_targets"][i, at] = torch.tensor(row.value_targets)
        if row.importance:
            batch["importance"][i, at] = torch.tensor(row.importance)
    for name in ("weight", "demonstration", "right"):
        batch[name] = torch.tensor([[getattr(row, name)] for row in rows])
    pictures = [(row.turn.inputs, len(row.turn.prompt)) for row in rows]
    inputs = stack_inputs(pictures, length, left=False)
    batch = {name: x.to(device) for name, x in batch.items()}
    return batch | {"inputs": {name: x.to(device) for name, x in inputs.items()}}


def trained_weights(policy: Policy) -> list[tuple[str, torch.nn.Parameter]]:
    """What is trained, by name: the adapters and the value head, or all weights."""
    if policy.adapters is None:
        kept = {id(p) for p in trained_parameters(policy)}
        return [(name, p) for name, p in policy.named_parameters() if id(p) in kept]
    of_adapters = [(f"phi.{i}", p) for i, p in enumerate(policy.adapters.phi)]
    return of_adapters + [(n, p) for n, p in policy.named_parameters() if p.requires_grad]


def adamw(args, policy: Policy) -> torch.optim.AdamW:
    """The value head has a learning rate of its own; "peak" is what the schedule multiplies."""
    named = trained_weights(policy)
    head = [p for name, p in named if name.startswith("value.")]
    rest = [p for name, p in named if not name.startswith("value.")]
    groups = [{"params": rest, "lr": args.lr, "peak": args.lr}]
    if head:
        groups.append({"params": head, "lr": args.value_lr, "peak": args.value_lr})
    return torch.optim.AdamW(groups, betas=args.betas, weight_decay=args.weight_decay, fused=True)


class PolicyLearner:
    """Policy, optimizer and their machine: gradients, and the steps that they lead to.

    filler: a turn of the task, for ranks without rows.
    """

    def __init__(self, args, policy: Policy, optimizer, world: World, pad_id: int, filler=None):
        self.args, self.policy, self.optimizer = args, policy, optimizer
        self.world, self.pad_id = world, pad_id
        self.filler = filler or Turn([pad_id], [pad_id], [0.0], True, "", 0.0)
        self.params = [p for _, p in trained_weights(policy)]
        self.local_params = [local(p) for p in self.params]
        self.replicated = policy.adapters is not None  # each rank holds all that is trained

    def batches(self, rows: list[Row]) -> list[dict]:
        """This rank's micro-batches, sorted by length, as many as the rank with most rows needs.

        All ranks of a shard group must call the model equally often, and with pictures if the
        others have some: missing ones are filled with `filler`, a real turn, at weight 0.
        """
        rows, size = sorted(rows, key=lambda row: row.length), self.args.micro_batch
        count = torch.tensor(-(-len(rows) // size), device=self.world.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        filler = Row(self.filler, [0.0] * len(self.filler.ids))
        return [
            collate_rows(
                rows[k * size : (k + 1) * size] or [filler], self.pad_id, self.world.device
            )
            for k in range(int(count))
        ]

    def forward(self, batch: dict, entropy_gradient: bool = False) -> Tokens:
        outputs = self.policy(batch["ids"], batch["mask"], entropy_gradient, **batch["inputs"])
        rest = {name: batch[name] for name in Tokens._fields if name in batch}
        return Tokens(*outputs, **rest)

    def backward(self, work: Pass) -> dict[str, float]:
        """One pass; returns sums over this rank's rows: the weighted losses and, of samples, more.

        FSDP2 averages over the shard group, hence x shards. Gradients of adapters are of this
        rank's rows alone; see sum_over_ranks.
        """
        shards = 1 if self.replicated else self.world.shards
        sums = dict.fromkeys(("rl", "sft", "value", "entropy", "tokens", "clipped", "kl"), 0.0)
        learns, use = bool(work.targets), partial(add_to_targets, work.targets)
        for batch in self.batches(work.rows):
            with torch.set_grad_enabled(learns):
                t = self.forward(batch, entropy_gradient="bonus" in work.losses)
                loss = 0.0
                for name, (loss_of, factor) in work.losses.items():
                    mean = t.weighted_sum(loss_of(t, self.args))
                    loss = loss + factor * mean
                    sums[name] = sums.get(name, 0.0) + mean.item()
            if learns:
                with each_gradient(self.params, use):
                    (loss * shards).backward()
            if "rl" in work.losses:
                self.measure(t, sums)
        return sums

    @torch.no_grad()
    def measure(self, t: Tokens, sums: dict[str, float]) -> None:
        """Adds what the log shows of the samples: entropy and ratios."""
        own = t.mask & ~t.demonstration & (t.weight > 0)
        log_ratio = (t.logprobs - t.old)[own]
        ratio = log_ratio.exp()
        sums["tokens"] += own.sum().item()
        sums["entropy"] += t.entropy[own].sum().item()
        sums["clipped"] += ((ratio - 1).abs() > self.args.clip_ratio).sum().item()
        k3 = ratio - 1 - log_ratio  # Schulman's estimate of KL(old | new)
        sums["kl"] += k3.sum().item()

    @torch.no_grad()
    def entropy(self, groups: list[list[Trajectory]]) -> float:
        """Mean token entropy of the policy over its own responses, nats. Collective."""
        turns = [turn for group in groups for trajectory in group for turn in trajectory.turns]
        sums = [0.0, 0.0]
        for batch in self.batches([Row(turn, [0.0] * len(turn.ids), 1.0) for turn in turns]):
            t = self.forward(batch)
            real = t.mask & (t.weight > 0)
            sums = [sums[0] + t.entropy[real].sum().item(), sums[1] + real.sum().item()]
        entropy, count = self.world.sum(*sums)
        return entropy / max(count, 1)

    def each_forward(self, rows: list[Row]) -> Iterator[tuple[Row, Tokens, int]]:
        """(row, its micro-batch, its place in that) of every row, without fillers. Collective."""
        rows, size = sorted(rows, key=lambda row: row.length), self.args.micro_batch
        for k, batch in enumerate(self.batches(rows)):
            t = self.forward(batch)
            for i, row in enumerate(rows[k * size : (k + 1) * size]):
                yield row, t, i

    @torch.no_grad()
    def correct(self, rows: list[Row]) -> dict[str, float]:
        """Samples of another engine: pi_old becomes the policy's own, and each token gets its
        truncated importance weight min(pi_old / pi_engine, C). Collective.

        Before the step that learns from them. Returns what the log shows of the two.
        """
        if self.args.sampler == "own" or not self.args.is_cap:
            return {}
        of_tokens = []
        for row, t, i in self.each_forward([row for row in rows if not row.demonstration]):
            logprobs, engine = t.logprobs[i][t.mask[i]].tolist(), row.turn.old_logprobs
            differences = [a - b for a, b in zip(logprobs, engine, strict=True)]
            row.importance = truncated_weights(differences, self.args.is_cap)
            row.turn = row.turn._replace(old_logprobs=logprobs)
            of_tokens += differences
        return engine_metrics(of_tokens, self.args.is_cap, self.world)

    def zeros(self) -> list[torch.Tensor]:
        """A gradient-sized buffer."""
        return flat_like(self.local_params)

    def sum_over_ranks(self, gradient: list[torch.Tensor]) -> None:
        """Adds up what backward has left out: other replicas, or with adapters all other ranks."""
        if self.replicated:
            dist.all_reduce(gradient[0]._base)
        else:
            self.world.sum_over_replicas(gradient)

    def dot(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        """Inner product over all shards, in float64. Collective."""
        product = sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))
        if self.world.shards > 1 and not self.replicated:
            dist.all_reduce(product, group=self.world.mesh.get_group("shard"))
        return product.item()

    def take_step(self, G: list[torch.Tensor], schedule: float) -> tuple[float, bool]:
        """theta <- clipped AdamW(theta, G), G left unclipped. Returns |G| and whether it was done.

        A G that is not finite is left out. schedule: fraction of the peak learning rate.
        """
        square = self.dot(G, G)
        if not math.isfinite(square):
            return math.inf, False
        norm = math.sqrt(square)
        c = min(1.0, self.args.clip / norm) if norm > 0 else 1.0
        set_gradients(self.params, [g * c for g in G] if c < 1 else G)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, True


def add_to_targets(targets, i: int, gradient: torch.Tensor) -> None:
    for buffer, factor in targets:
        buffer[i].add_(gradient, alpha=factor)
