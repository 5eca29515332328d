"""Makes the embedded models.

python -m tiny.train                # tiny, from generated problems (15 minutes on 2 CPU cores)
python -m tiny.train --output-dir my_tiny --steps 200
python -m tiny.train --bare         # then tiny_bare, where amft.py starts (a minute)
python -m tiny.train --games        # then tiny_games, where amft.py's games start
python -m tiny.train --vision       # then tiny_vision, which sees cards
"""

import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from checker import grade
from data import (
    DataError,
    Encoded,
    Example,
    check_numbers,
    collate,
    embedded_examples,
    encode,
    template,
)
from games import games_of
from games.play import demonstrate, play
from model import (
    EMBEDDED,
    ModelError,
    full_weights,
    load_config,
    load_weights,
    save_pretrained,
    token_loss,
)
from policy import sample
from sources import expanded
from tiny.hidden_rules import cipher_rows
from tiny.problems import FAMILIES, ROLES


@dataclass
class Args:
    """Train the embedded tiny model: its tokenizer from the problems' text, a small Llama on worked
    solutions."""

    output_dir: str = str(EMBEDDED["tiny"])
    """Where the model is written (Hugging Face format, bf16)."""
    steps: int = 8000
    """Optimizer steps."""
    batch_size: int = 32
    """Problems per step, drawn evenly from the families of the pre-training."""
    lr: float = 5e-3
    """Peak learning rate of Muon (matrices); embeddings and norms: AdamW at 3e-3. 100 steps of
    warm-up, then linear to zero."""
    seed: int = 0
    """Initial weights and data order; the same seed gives the same loss curve."""
    games: bool = False
    """Make tiny_games instead, where amft.py's games start: tiny after --game-steps batches of the
    experts' answers to both games."""
    game_steps: int = 1500
    """For --games."""
    vision: bool = False
    """Make tiny_vision instead: eyes for tiny_games (SigLIP, LLaVA), trained for --vision-steps
    batches of General Points in pictures."""
    vision_steps: int = 130
    """For --vision."""
    bare: bool = False
    """Make tiny_bare instead, in a minute: tiny after 60 steps of AdamW at 3e-4 on problems of
    which 60% have the bare answer for a response. It can still work a problem out but often does
    not: what learning from rewards can find."""


# Where the numbers must lie
NUMBERS = {
    "[1, 1e9]": ("steps", "batch_size", "game_steps", "vision_steps"),
    "(0, 100]": ("lr",),
    "(-9e18, 9e18)": ("seed",),
}


def check(args: Args) -> None:
    """Raises DataError for arguments that cannot work, and where something would be lost."""
    check_numbers(args, NUMBERS)
    if not args.output_dir:
        raise DataError("--output-dir must name a folder")
    folder = expanded(args.output_dir)
    if folder.is_file():
        raise DataError(f"--output-dir {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise DataError(f"--output-dir {folder} holds other things than a model: name another")


# --------------------------------------------------------------------------------------------------
# What all of them use


def fit(model, batches: Iterator[dict], steps: int, lr: float, warmup: int = 100) -> list[float]:
    """Muon (matrices, peak `lr`) and AdamW (the rest, 3e-3), linear warm-up and decay. Returns the
    losses.

    Muon, as on equal time it reaches twice AdamW's accuracy here (17.7% against 7.5% after 1,000
    steps).
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        group = matrices if p.ndim == 2 and "embed" not in name else others
        group.append(p)
    muon = torch.optim.Muon(
        matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    losses, bar = [], tqdm(range(steps), mininterval=2)
    for step in bar:
        loss = mean_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in ((muon, lr), (adamw, 3e-3)):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / warmup, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ModelError(f"the loss of step {step + 1} is not finite: lower --lr")
        if step % 100 == 0:
            bar.set_postfix(loss=f"{mean(losses[-50:]):.4f}")
    return losses


def teach_habit(model, batches: Iterator[dict]) -> None:
    """60 steps of AdamW at 3e-4."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
    for _ in tqdm(range(60)):
        mean_loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def mean_loss(model, batch: dict) -> torch.Tensor:
    """Over the response tokens."""
    return token_loss(model, batch) / (batch["labels"] != -100).sum()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def millions(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


def round_to_bf16(model) -> None:
    """What is measured is then what is stored."""
    model.to(torch.bfloat16).float()


def store(args: Args, name: str, model, tokenizer) -> Path:
    """Writes an embedded model in bf16 to its place, or to --output-dir where one is given."""
    folder = expanded(args.output_dir)
    if folder == EMBEDDED["tiny"]:
        folder = EMBEDDED[name]
    shutil.rmtree(folder, ignore_errors=True)
    weights = full_weights(model, torch.bfloat16)
    save_pretrained(folder, model, tokenizer, weights, torch.bfloat16)
    return folder


# --------------------------------------------------------------------------------------------------
# tiny: a Llama that reads and solves the generated problems

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GAME_TEXTS = [
    '{"cards": ["A", "10", "K", "7"], "number": [1, 10, 10, 7], "formula": "(10-7)*(10-1)=24"}',
    '{"current observation": "No landmarks nearby", '
    '"current instruction": "Turn right to face north.", "action": "turn_direction(right)"}',
    '{"current observation": "A cafe on the left", "current instruction": '
    '"Move forward until you reach next intersection.", "action": "forward()"}',
]


def train_tokenizer(texts: list[str], vocab_size: int = 1024):
    """Byte-level BPE: any text round-trips. Digits stand alone; an operator takes the spaces around
    it (" + " is one token)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = r"\d| ?\\[A-Za-z]+ ?| ?[A-Za-z]+| ?[^\sA-Za-z\d\\]+ ?|\\|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=special[2:],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def tokenizer_texts(examples: Sequence[Example]) -> list[str]:
    texts = []
    for e in examples[::8]:
        texts += [e.prompt, e.response]
    for rule in range(10):
        for row in cipher_rows(rule):
            texts += [row["problem"], row["solution"]]
    for a, b in itertools.product(range(10), repeat=2):
        texts += [rf"${a} \circ {b}$", rf"\boxed{{{a}}}"] * 10
    return texts + GAME_TEXTS * 50


def problem_batches(
    families: list[list[Encoded]], size: int, seed: int, pad_id: int
) -> Iterator[dict]:
    """Every family is as likely. Sixteen batches of like lengths at a time, in random order."""
    rng = random.Random(seed)
    while True:
        rows = [rng.choice(rng.choice(families)) for _ in range(16 * size)]
        rows.sort(key=lambda row: len(row.ids))
        queue = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(queue)
        while queue:
            yield collate(queue.pop(), pad_id, 8)


def solved(model, tokenizer, examples: Sequence[Example]) -> int:
    """How many the model answers rightly, greedily."""
    chat = template(tokenizer)
    prompts = [chat.before + e.prompt + chat.after for e in examples]
    prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    responses = sample(model, tokenizer, prompts, max_new_tokens=96, temperature=0, stop=chat.stop)
    texts = tokenizer.batch_decode([response.answer for response in responses])
    return sum(grade(text, e.answer) for text, e in zip(texts, examples, strict=True))


def accuracy_table(counts: dict[tuple[str, str], tuple[int, int]]) -> str:
    """In Markdown, by subject and role, of {(role, family): (right, problems)}."""
    lines = [f"| subject | {' | '.join(ROLES)} |", "|---" * (1 + len(ROLES)) + "|"]
    for subject in [*FAMILIES, ""]:
        cells = []
        for role in ROLES:
            found = [n for (r, name), n in counts.items() if r == role and name.startswith(subject)]
            right, problems = map(sum, zip(*found, strict=True))
            cells.append(f"{100 * right / problems:.0f}%")
        lines.append(f"| {subject or 'all'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_tiny(args: Args) -> None:
    families = embedded_examples(4000, args.seed, "train", "pretraining")
    examples = list(itertools.chain.from_iterable(families.values()))
    tokenizer = train_tokenizer(tokenizer_texts(examples))
    encoded, _ = encode(tokenizer, examples, 256)
    by_family = []
    for family in families.values():
        by_family.append([encoded[e.id] for e in family])

    torch.manual_seed(args.seed)
    model = tiny_llama(tokenizer)
    sizes = f"{millions(model)}, {len(tokenizer)} tokens, {len(examples)} problems"
    print(sizes, flush=True)
    start = time.time()
    batches = problem_batches(by_family, args.batch_size, args.seed, tokenizer.pad_token_id)
    losses = fit(model, batches, args.steps, args.lr)
    round_to_bf16(model)
    folder = store(args, "tiny", model, tokenizer)

    model.eval()
    counts = {}
    for role in ROLES:
        for name, test in embedded_examples(40, args.seed, "test", role).items():
            right = solved(model, tokenizer, test)
            counts[role, name] = right, len(test)
            print(f"{name:45} {role:12} {right:3}/{len(test)}")
    report = {
        "args": asdict(args) | {"output_dir": folder.name},
        "minutes": round((time.time() - start) / 60, 1),
        "loss": [round(mean(losses[i : i + 100]), 4) for i in range(0, len(losses), 100)],
        "accuracy": {name: count for (_, name), count in counts.items()},
        "torch": torch.__version__,
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1))
    print(accuracy_table(counts), f"\n{report['minutes']} minutes", flush=True)


# --------------------------------------------------------------------------------------------------
# tiny_bare: tiny with a habit of bare answers


def make_bare(args: Args) -> None:
    """A choice that the model can already make is something for reinforcement learning to find; its
    mistakes of arithmetic are not."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    _, tokenizer = load_config("tiny")
    model = load_weights("tiny")
    families = embedded_examples(400, args.seed, "train", "pretraining")
    examples = []
    for e in itertools.chain.from_iterable(families.values()):
        bare = rng.random() < 0.6
        examples.append(replace(e, response=f"\\boxed{{{e.answer}}}") if bare else e)
    encoded, _ = encode(tokenizer, examples, 256)

    def batches() -> Iterator[dict]:
        while True:
            rows = [encoded[e.id] for e in rng.sample(examples, 32)]
            yield collate(rows, tokenizer.pad_token_id)

    teach_habit(model, batches())
    print(store(args, "tiny_bare", model, tokenizer))


# --------------------------------------------------------------------------------------------------
# tiny_games: tiny, taught both games


def game_batches(
    tokenizer, rng: random.Random, first: int = 0, bare: float = 0.0
) -> Iterator[dict]:
    """The experts' answers, with short prompts, in distribution, from step `first` on: walks at
    even steps, cards at odd ones. With probability `bare` only the JSON's last field, the formula
    or the action, is kept."""
    cards = replace(games_of("general_points", compact=True)[0], split="pretraining")
    city = replace(games_of("virl", compact=True)[0], split="pretraining")
    walks = []
    for step in itertools.count(first):
        if step % 2:
            turns = [demonstrate(tokenizer, cards, 32 * step + i).turns[0] for i in range(32)]
        else:
            while len(walks) < 500:
                for _ in range(50):
                    walks += demonstrate(tokenizer, city, rng.randrange(10**9)).turns
            rng.shuffle(walks)
            turns = [walks.pop() for _ in range(16)]
        rows = []
        for t in turns:
            ids = t.ids
            if bare and rng.random() < bare:
                last = list(json.loads(t.text).items())[-1]
                text = json.dumps(dict([last]))
                ids = tokenizer(text, add_special_tokens=False)["input_ids"] + t.ids[-1:]
            rows.append(Encoded(t.prompt + ids, len(t.prompt)))
        yield collate(rows, tokenizer.pad_token_id)


def report_games(when: str, model, tokenizer) -> None:
    """Prints the episodes won of 100 in distribution, greedily, and the right turns."""
    model.eval()
    for title, name in (("General Points", "general_points"), ("V-IRL", "virl")):
        game = games_of(name, compact=True)[2]["in distribution"]
        groups = play(model, tokenizer, game, range(100), 1, "test", 96, temperature=0)
        won, turns = 0, []
        for (trajectory,) in groups:
            won += trajectory.won
            turns += trajectory.turns
        right = sum(t.reward > 0 for t in turns)
        print(f"{when}: {title}: won {won} of 100, right turns {right} of {len(turns)}", flush=True)
    model.train()


def make_games(args: Args) -> None:
    """tiny -> tiny_games: the experts' answers to both games; then a habit of bare answers, as in
    make_bare: 60% of the examples."""
    torch.manual_seed(args.seed)
    _, tokenizer = load_config("tiny")
    model = load_weights("tiny")
    batches = game_batches(tokenizer, random.Random(args.seed))
    losses = fit(model, batches, args.game_steps, 3e-3, warmup=20)
    round_to_bf16(model)
    report_games("full answers", model, tokenizer)
    teach_habit(model, game_batches(tokenizer, random.Random(args.seed), args.game_steps, bare=0.6))
    round_to_bf16(model)
    report_games("with the habit", model, tokenizer)
    store(args, "tiny_games", model, tokenizer)
    for title, own in (("V-IRL", losses[::2]), ("General Points", losses[1::2])):
        means = [f"{mean(own[i : i + 100]):.3f}" for i in range(0, len(own), 100)]
        print(title, "loss", " ".join(means))


# --------------------------------------------------------------------------------------------------
# tiny_vision: tiny_games with eyes

VISION_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}",
)


def vision_model():
    """(model, processor): a two-layer SigLIP of 128 x 128 pixels in patches of 16 and a projector,
    in front of tiny_games (LLaVA)."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    text_config, tokenizer = load_config("tiny_games")
    text_config._name_or_path = ""  # else this machine's folder is written into the config
    tokenizer.chat_template = VISION_TEMPLATE
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 128, "width": 128}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token="<|image|>",
        chat_template=VISION_TEMPLATE,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    language_model = load_weights("tiny_games").model
    model.model.language_model.load_state_dict(language_model.state_dict())
    model.tie_weights()
    return model, processor


def recognition(model, processor, test) -> float:
    """The share of 100 hands whose cards are named rightly."""
    model.eval()
    tokenizer = processor.tokenizer
    groups = play(
        model, tokenizer, test, range(100), 1, "recognition", 24, 100, 0.0, processor=processor
    )
    model.train()
    right = 0
    for seed, (trajectory,) in enumerate(groups):
        right += test.recognised(test.reset(seed), trajectory.turns[0].text)
    return right / len(groups)


def make_vision(args: Args) -> None:
    """tiny_games with eyes -> tiny_vision. It learns to read cards from the experts' answers; how
    well is printed on the way."""
    torch.manual_seed(args.seed)
    model, processor = vision_model()
    tokenizer = processor.tokenizer
    cards, _, tests = games_of("general_points", vision=True, compact=True)
    cards = replace(cards, split="pretraining")
    test = replace(tests["in distribution"], attempts=1)
    print(millions(model), flush=True)

    def batches() -> Iterator[dict]:
        for step in itertools.count():
            if step and step % 20 == 0:
                rate = recognition(model, processor, test)
                tqdm.write(f"step {step}: {rate:.0%} of 100 hands read rightly", file=sys.stdout)
            turns = []
            for i in range(32):
                turns += demonstrate(tokenizer, cards, 32 * step + i, processor).turns[:1]
            rows = [Encoded(t.prompt + t.ids, len(t.prompt)) for t in turns]
            pictures = torch.cat([t.inputs["pixel_values"] for t in turns])
            yield collate(rows, tokenizer.pad_token_id) | {"pixel_values": pictures}

    fit(model, batches(), args.vision_steps, 5e-3, warmup=50)
    print(f"step {args.vision_steps}: {recognition(model, processor, test):.0%}")
    store(args, "tiny_vision", model, processor)


def main(args: Args) -> None:
    check(args)
    if args.bare:
        make_bare(args)
    elif args.games:
        make_games(args)
    elif args.vision:
        make_vision(args)
    else:
        make_tiny(args)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (DataError, ModelError, OSError) as e:
        print(f"tiny.train: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tiny.train: interrupted, nothing is written", file=sys.stderr)
        sys.exit(130)
