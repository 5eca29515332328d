"""Episodes: of one turn (mathematics) or several (games).

A game is anything with reset, prompt, step and expert, see rules.py.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data import template
from model import gathered
from policy import Sample, encode_prompts, never, sample, sample_with_pictures


class Turn(NamedTuple):
    prompt: list[int]  # token ids
    ids: list[int]  # of the response, with the end token
    old_logprobs: list[float]  # zeros for a demonstration
    finished: bool
    text: str
    reward: float
    inputs: dict = {}  # of the pictures
    noted: dict = {}  # what the game noted beside the reward


@dataclass
class Trajectory:
    turns: list[Turn] = field(default_factory=list)
    won: bool = False

    def returns(self, gamma: float = 1.0) -> list[float]:
        """Of each turn: its reward and the discounted rewards of the turns after it."""
        returns, following = [], 0.0
        for turn in reversed(self.turns):
            following = turn.reward + gamma * following
            returns.append(following)
        return returns[::-1]


@dataclass
class _Player:
    """Who plays one episode."""

    seed: int
    number: int  # of the seed's samples
    state: object
    trajectory: Trajectory = field(default_factory=Trajectory)
    done: bool = False


def play(
    model,
    tokenizer,
    game,
    seeds: Sequence[int],
    samples: int,
    key: str,
    max_new_tokens: int,
    batch_size: int = 128,
    temperature: float = 1.0,
    progress: str | None = None,
    processor=None,
    interrupted: Callable[[], bool] = never,
    sampler: Callable[..., list[Sample]] = sample,
) -> list[list[Trajectory]]:
    """`samples` episodes for each seed. All that are not over advance together, in one call of the
    sampler a turn.

    key names the random streams: one for each (key, seed, sample, turn), so that the split over
    ranks does not change them. interrupted: asked on the way; once it says so, the trajectories
    are cut short. sampler: see Actor. Under FSDP2 call it within gathered(model).
    """
    places = itertools.product(seeds, range(samples))
    players = [_Player(seed, number, game.reset(seed)) for seed, number in places]
    active, turn, stop = players, 0, template(tokenizer).stop
    while active and not interrupted():
        together = samples if turn == 0 else 1  # at first the samples of a seed share their prompt
        messages = [game.prompt(p.state) for p in active[::together]]
        prompts = encode_prompts(tokenizer, messages, processor)
        names = [f"{key}/{p.seed}/{p.number}/{turn}" for p in active]
        streams = [random.Random(name).getrandbits(62) for name in names]
        if processor is None:
            responses = sampler(
                model,
                tokenizer,
                [prompt.ids for prompt in prompts],
                together,
                max_new_tokens,
                temperature,
                stop=stop,
                batch_size=batch_size,
                seeds=streams,
                progress=progress,
                interrupted=interrupted,
            )
        else:
            responses = sample_with_pictures(
                model,
                tokenizer,
                prompts,
                together,
                max_new_tokens,
                temperature,
                stop,
                batch_size,
                streams,
            )
        texts = tokenizer.batch_decode([response.answer for response in responses])
        for i, player in enumerate(active):
            _advance(game, player, prompts[i // together], responses[i], texts[i])
        active = [p for p in active if not p.done]
        turn += 1
    trajectories = [p.trajectory for p in players]
    return [trajectories[i : i + samples] for i in range(0, len(players), samples)]


def _advance(game, player: _Player, prompt, response, text: str) -> None:
    """A player's turn: what the game says of the response is kept."""
    result = game.step(player.state, text)
    player.trajectory.turns.append(
        Turn(
            prompt.ids,
            response.ids,
            response.logprobs,
            response.finished,
            text,
            result.reward,
            prompt.inputs,
            result.noted,
        )
    )
    player.trajectory.won, player.done = result.won, result.done


def demonstrate(tokenizer, game, seed: int, processor=None) -> Trajectory:
    """The expert's episode."""
    player, end = _Player(seed, 0, game.reset(seed)), template(tokenizer).end
    while not player.done:
        (prompt,) = encode_prompts(tokenizer, [game.prompt(player.state)], processor)
        text = game.expert(player.state)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + end
        _advance(game, player, prompt, Sample(ids, [0.0] * len(ids), True), text)
    return player.trajectory


class Actor:
    """A policy with what it needs to play: one for each rank of a run.

    policy: the sharded model, of which lm is the language model (or the same). stop: see run.Stop.
    sampler: policy.sample or what has its arguments; for text.
    """

    def __init__(
        self,
        policy,
        lm,
        tokenizer,
        processor,
        world,
        *,
        seed,
        max_new_tokens,
        batch_size,
        stop,
        sampler=sample,
    ):
        self.policy, self.lm, self.world = policy, lm, world
        self.tokenizer, self.processor = tokenizer, processor
        self.seed, self.max_new_tokens, self.batch_size = seed, max_new_tokens, batch_size
        self.stop, self.sampler = stop, sampler

    def play(self, game, seeds, samples: int, key: str, temperature: float = 1.0, to_the_end=False):
        """Groups of trajectories, one a seed, while the policy is gathered; see play.

        Cut short where a stop is asked for, unless to_the_end.
        """
        long = self.world.rank == 0 and self.max_new_tokens > 1024
        return play(
            self.lm,
            self.tokenizer,
            game,
            seeds,
            samples,
            key,
            self.max_new_tokens,
            self.batch_size,
            temperature,
            "rollout" if long else None,
            self.processor,
            never if to_the_end else self.stop.is_requested,
            self.sampler,
        )

    def rollout(self, game, seeds, samples: int, key, to_the_end=False) -> list[list[Trajectory]]:
        """The same at temperature 1, with random streams of the run's seed."""
        with gathered(self.policy):
            return self.play(game, seeds, samples, f"{self.seed}/{key}", to_the_end=to_the_end)

    def demonstrate(self, game, seed: int) -> Trajectory:
        return demonstrate(self.tokenizer, game, seed, self.processor)

    def mine(self, count: int, start: int = 0) -> range:
        """This rank's seeds of the `count` from start on."""
        return range(start + self.world.rank, start + count, self.world.size)
