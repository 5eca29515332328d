"""The figures of docs/checker.md that no test shows: reference answers, fuzzing, Math-Verify.

    python -m tests.checker_figures golds FOLDER --pairs 150000     # .jsonl.gz, rows with "answer"
    python -m tests.checker_figures fuzz --cases FILE ... --seconds 600 --threads 1 --seed 0
    python -m tests.checker_figures peers --cases FILE ...          # needs math-verify

golds: each accepts itself; the accepted of random pairs with different texts, and of answers with a
digit, a sign or a brace changed, are printed. fuzz: both sides hostile, made from the rows' texts,
pieces and expressions; with one thread an alarm ends a call after 3 s. FILE: rows with response,
gold, expect.
"""

import contextlib
import gzip
import heapq
import json
import random
import re
import resource
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import tyro

import checker

PIECES = r"""\frac { } ( ) [ ] ^ _ \sqrt 12 x | \pm ! , = < > \cup \cap \text{ \mathrm{ & % \log . -
    e \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} \\ \infty \binom \boxed{ $ é n k C x^2
    \sum_{k=1}^{ \prod \int_0^1 dx \sin \cos \lfloor \rfloor \{ \} \setminus \le \ne and or i \pi
    10^ 99 0. \overline{ \mod \in \mathbb{R} + * / ' \det ^{99} ^{1/3} \gcd( \max( n! \exp( \cdot :
    7 :00 \$ million kg cm hours \[ \( \arctan \sinh ** 10^{6000} Wait not 3,5 #### </think> answer:
    999999999999999999999999999999"""
PIECES = [*PIECES.split(), " ", "\n", " and ", "The answer is "]
ATOMS = r"x n 2 3 \pi e i x_1 k 0.5 10^{6000} 7 201 (x+1) n! -1 a b \sqrt{2}"
FORMS = r"""(A+B) \frac{A}{B} {A}^{B} A\cdot{}B \sqrt[3]{A}-B \sin(A)+B \log_{A}{B} |A|-B A!+B A<B
    \lfloor{}A\rfloor-B \binom{A}{B} \gcd(A,B) \sum_{k=1}^{A}{B} \max(A,B) e^{A}-B (A)(B) (A,B) A=B
    \begin{pmatrix}A\\B\end{pmatrix} \tan(A)^{B} \{A,B\} \prod_{k=1}^{A}(B) \int_0^{A}{B}dx A,B
    \sum_{n=0}^{\infty}{A}/{B} A\cup{}B x>A\text{and}x<B A\text{kg}B\text{g} \cosh(A)/{B}"""
CHANGES = {
    "digit": r"[0-9]",
    "sign": r"[+-]",
    "brace": r"\}[-+\dnkx]",
    "brace back": r"(?<=[^{A-Za-z])[\dnkx]\}",
}


def read_golds(folder: Path) -> dict[str, list[str]]:
    """The answers in each file."""
    golds = {}
    for file in sorted(folder.rglob("*.gz")):
        with gzip.open(file, "rt") as lines:
            golds[file.name] = [str(json.loads(line)["answer"]) for line in lines]
    return golds


def read_rows(files: tuple[Path, ...]) -> list[dict]:
    rows = []
    for file in files:
        rows += map(json.loads, file.read_text().splitlines())
    return rows


def accepts_itself(gold: str) -> bool:
    return checker.is_equal(gold, gold) and checker.grade(f"It is $\\boxed{{{gold}}}$.", gold)


def changed(gold: str, rng: random.Random) -> dict[str, str]:
    """The answer with another digit, with another sign, with a closing brace moved by a place."""
    results = {}
    for kind, pattern in CHANGES.items():
        if places := list(re.finditer(pattern, gold)):
            m = rng.choice(places)
            new = m[0][::-1] if len(m[0]) == 2 else {"+": "-", "-": "+"}.get(m[0])
            new = new or str((int(m[0]) + rng.randint(1, 9)) % 10)
            results[kind] = f"{gold[: m.start()]}{new}{gold[m.end() :]}"
    return results


def show_golds(folder: tyro.conf.Positional[Path], pairs: int = 150_000, seed: int = 0) -> None:
    rng, counts = random.Random(seed), Counter()
    files = read_golds(folder)
    for name, golds in files.items():
        refused = [gold for gold in golds if not accepts_itself(gold)]
        print(f"{name}: {len(golds)} answers; refused by themselves: {refused}")
    files = {name: golds for name, golds in files.items() if "mmlu" not in name}  # letters
    answers = sum(map(len, files.values()))
    for golds in files.values():
        distinct, count = sorted(set(golds)), pairs * len(golds) // answers
        tried = [("pair", *rng.sample(distinct, 2)) for _ in range(count)]
        for gold in golds:
            tried += [(kind, other, gold) for kind, other in changed(gold, rng).items()]
        for kind, other, gold in tried:
            counts[kind] += 1
            if checker.is_equal(other, gold):
                print(f"{kind}: {other!r} accepted for {gold!r}")
    print(f"{answers} answers; tried: {dict(counts)}")


def expression(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(ATOMS.split())
    sides = {"A": expression(rng, depth - 1), "B": expression(rng, depth - rng.randint(1, 3))}
    return re.sub(r"\b[AB]\b", lambda m: sides[m.group()], rng.choice(FORMS.split()))


def mutated(text: str, texts: list[str], rng: random.Random) -> str:
    """Cut, repeated, with a piece inside, spliced with another, or reversed in part."""
    i = rng.randint(0, len(text))
    j = min(len(text), i + rng.randint(1, 12))
    start, inside, end = text[:i], text[i:j], text[j:]
    repeated = inside * rng.choice((1, 5, 40, 300))
    pieces = rng.choice(PIECES) * rng.choice((1, 2, 30))
    return start + rng.choice(("", repeated, pieces, rng.choice(texts)[j:], inside[::-1])) + end


def hostile(texts: list[str], rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 40)))
    if kind == 1:
        made = expression(rng, rng.randint(1, 5))
        return rng.choice((made, f"\\boxed{{{made}}}"))
    text = rng.choice(texts)
    for _ in range(rng.randint(1, 3)):
        text = mutated(text, texts, rng)
    return text[:60_000]


def peak() -> int:
    """Kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(texts: list[str], seconds: float, seed: int, threads: int) -> dict:
    """calls, kilobytes grown, failures [(what, a, b)], slowest [(CPU s, a, b)]."""
    checker.is_equal(r"\sqrt2+x", r"\sin x")  # sympy's import
    calls, failures, slowest = [], [], []
    before, end = peak(), time.monotonic() + seconds
    alarm = signal.alarm if threads == 1 else int

    def work(number: int) -> None:
        rng, times = random.Random(f"{seed} {number}"), []
        while time.monotonic() < end:
            a, b = hostile(texts, rng), hostile(texts, rng)
            b = rng.choice((b, b, mutated(a, texts, rng), a + " "))
            for decide in (checker.grade, checker.is_equal):
                start = time.thread_time()
                try:
                    alarm(3)
                    verdict = decide(a, b)
                except BaseException as error:
                    verdict = error
                alarm(0)
                calls.append(number)
                times = heapq.nlargest(10, [*times, (time.thread_time() - start, a, b)])
                if verdict is not True and verdict is not False:
                    failures.append((repr(verdict), a, b))
        slowest.extend(times)

    signal.signal(signal.SIGALRM, signal.default_int_handler)  # KeyboardInterrupt
    workers = [threading.Thread(target=work, args=(n,)) for n in range(1, threads)]
    for worker in workers:
        worker.start()
    work(0)
    for worker in workers:
        worker.join()
    slowest.sort(reverse=True)
    return {"calls": len(calls), "grown": peak() - before, "failures": failures, "slowest": slowest}


def show_fuzz(
    cases: tuple[Path, ...], seconds: float = 60, seed: int = 0, threads: int = 1
) -> None:
    rows = read_rows(cases)
    texts = [row["response"][:3000] for row in rows] + [str(row["gold"])[:3000] for row in rows]
    report = fuzz(texts, seconds, seed, threads)
    for cpu, a, b in report["slowest"][:10]:
        print(f"{cpu:.3f} CPU seconds: {a[:300]!r} against {b[:300]!r}")
    print(f"{report['calls']} calls; {report['grown']} KB in all; failures: {report['failures']}")


def show_peers(cases: tuple[Path, ...]) -> None:
    """Accuracy and times of both, one after the other."""
    import math_verify

    rows = read_rows(cases)

    def verify(response: str, gold: str) -> bool:
        with contextlib.suppress(Exception):
            dressed = gold if "boxed" in gold or "$" in gold else f"${gold}$"
            return math_verify.verify(math_verify.parse(dressed), math_verify.parse(response))
        return False

    for name, decide in (("checker.py", checker.grade), ("Math-Verify", verify)):
        decide(r"\boxed{\sqrt2+x}", r"\sin x")  # imports sympy
        times, wrong = [], []
        for row in rows:
            start = time.perf_counter()
            verdict = decide(row["response"], str(row["gold"]))
            times.append(1e3 * (time.perf_counter() - start))
            if verdict != row["expect"]:
                wrong.append(verdict)
        times.sort()
        right = 100 - 100 * len(wrong) / len(rows)
        print(f"{name}: {len(rows)} rows, {right:.1f}% right, {sum(wrong)} false accepts")
        print(f"  median {times[len(rows) // 2]:.2f} ms, longest {times[-1]:.0f} ms")
        print(f"  99th percentile {times[int(0.99 * len(rows))]:.1f} ms")


if __name__ == "__main__":
    commands = {"golds": show_golds, "fuzz": show_fuzz, "peers": show_peers}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
