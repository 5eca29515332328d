"""checker.py: pairs by hand, endings, random spellings, labelled cases, golds, hostile text."""

import cmath
import json
import math
import random
import re
import resource
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

import checker
from tests.checker_figures import PIECES, accepts_itself, changed, fuzz, read_golds
from tests.helpers import ROOT, SHARED, hostile_rows, needs_shared

EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("(x+1)(x-1)", "x^2-1"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"1\frac12", "3/2"),
    ("1,234", "1234"),
    (r"2.5\times10^{-3}", "0.0025"),
    (r"50\%", r"\frac12"),
    (r"30^\circ", r"\frac{\pi}{6}"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    (r"\lfloor 2.7\rfloor", "2"),
    (r"e^{i\pi}", "-1"),
    (r"|3+4i|", "5"),
    (r"x\in[-2,7]", r"-2\le x\le 7"),
    (r"(0,9)\cup(9,36)", r"(0,36)\setminus\{9\}"),
    (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2"),
    ("y=2x+1", "2y-4x=2"),
    ("x=2 or x=3", "3, 2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\sqrt{x^2}", "|x|"),
    (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"),
    ("2x+3y<6", "4x+6y<12"),
    ("4.123105625617661", r"\sqrt{17}"),
    (r"\text{(C)}", "C"),
    (r"5.4\text{ cents}", "5.4"),
    (r"6\pi\approx18.85", r"6\pi"),
    ("101_2", "(101)_{2}"),
    (r"n\equiv3\pmod7", r"n\equiv10\pmod{7}"),
    # a decimal against a value that only numbers tell; significant digits beside a power of ten
    (r"\sin 30^\circ", "0.5"),
    (r"\log_4 8", "1.5"),
    (r"2.314814814815 \times 10^{-3}", r"\frac{1}{432}"),
    (r"33.33333333333\%", r"\frac13"),
    # letters
    (r"\lfloor n/2\rfloor+\lceil n/2\rceil", "n"),
    (r"\cos(n\pi)", "(-1)^n"),
    (r"\sqrt{(x-4)^2}", "|x-4|"),
    (r"\binom{n}{k}", r"\frac{n!}{k!(n-k)!}"),
    (r"2\cdot 3^{n-1}", r"\frac{2}{3} 3^n"),
    (r"e^{i\theta}", r"\cos\theta+i\sin\theta"),
    (r"\arctan 1+\arctan 2+\arctan 3", r"\pi"),
    (r"\frac{a^2-b^2}{a-b}", "a+b"),
    # sums, products, integrals, determinants, double factorials
    (r"\sum_{i=1}^{n} i^2", r"\frac{n(n+1)(2n+1)}{6}"),
    (r"\sum_{k=0}^{\infty} \frac{1}{3^k}", "1.5"),
    (r"\prod_{k=1}^{5} k", "120"),
    (r"\int_1^2 2x\,dx", "3"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
    ("5!!", "15"),
    ("2^6 3^5 5^4", "9720000"),
    # matrices and points
    (r"\frac13\begin{pmatrix}3\\6\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}+t\begin{pmatrix}1\\1\end{pmatrix}", "(1+t,2+t)"),
    (
        r"\begin{cases} x & x>0 \\ -x & x\le 0\end{cases}",
        r"\begin{cases} -x, & \text{if } x\le 0 \\ x, & \text{if } x>0\end{cases}",
    ),
    # sets
    (r"x>2 \text{ and } x<5", "(2,5)"),
    (r"x<2 \text{ or } x>5", r"(-\infty,2)\cup(5,\infty)"),
    (r"x \neq \pm 1", r"\mathbb{R}\setminus\{-1,1\}"),
    ("x^2<4", "(-2,2)"),
    (r"|x|\ge1", r"(-\infty,-1]\cup[1,\infty)"),
    (r"\{k : k\ge3\}", r"k\ge3"),
    (r"[1,2)\cup[2,3]", "[1,3]"),
    (r"\pm 1 \pm \sqrt2", r"1+\sqrt2,1-\sqrt2,-1+\sqrt2,-1-\sqrt2"),
    # names
    ("f(t)=t^2", "f(x)=x^2"),
    ("p=2, q=3", "(p,q)=(2,3)"),
    ("x=3, y=-1", "(3,-1)"),
    (r"\sin^2 x+C", r"-\cos^2 x+c"),
    (r"\begin{cases} x=1 \\ y=2\end{cases}", "(1,2)"),
    # units, scale words, times
    (r"5\,\mathrm{kg}", "5"),
    (r"-13.6\ \mathrm{eV}", "-13.6"),
    (r"9.8\ \mathrm{m/s^2}", r"9.8\ \mathrm{m\,s^{-2}}"),
    (r"5\text{ square meters}", r"5\text{ m}^2"),
    (r"\text{42 ways}", "42"),
    (r"50\text{ percent}", "0.5"),
    (r"12\text{ million}", "12,000,000"),
    (r"45\text{ degrees}", r"45^\circ"),
    (r"\$3\text{ million}", "3000000"),
    ("2:4", "1:2"),
    (r"\text{1:03 PM}", r"1\!:\!03"),
    # how it is written
    (r"\color{red}{42}", "42"),
    (r"\underline{42}", "42"),
    (r"\Large 42", "42"),
    ("= 42", "42"),
    (r"1,2,\dots,n", r"1, 2, \ldots, n"),
    ("100,200,300", "300,200,100"),
    ("$1{,}000{,}000$", "10^6"),
    (r"\text{Option E}", "E"),
]
DIFFERENT = [
    ("2^{100}", "2^{100}+1"),
    ("3.14", r"\pi"),
    ("0.33", "1/3"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("(3,1)", r"\{1,3\}"),
    ("|x|", "x"),
    ("x>3", "x<3"),
    ("x+y>1", "x+y<1"),
    ("x^2+y^2=25", "x^2+y^2=5"),
    ("101_2", "5"),
    (r"\pm3", "3"),
    (r"2\text{ or }3", "2"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("1,2", "1,2,3"),
    ("a_1", "a_2"),
    (r"\text{odd}", r"\text{even}"),
    ("1e-30", "0"),
    ("1.0000000001", "1"),
    ("i", "-i"),
    ("", "0"),
    ("x=5", "y=5"),
    (r"20\%", r"\$20"),
    (r"1\frac45", "14/5"),
    ("I(0)e^{-t}", "0"),
    # alike as text without braces, dots, primes, spaces
    ("2^{n}-1", "2^{n-1}"),
    (r"\sqrt{x}+1", r"\sqrt{x+1}"),
    (r"\frac{11}{2}", r"\frac{1}{12}"),
    (".5", "5"),
    ("y=.5x+1", "y=5x+1"),
    ("2 3", "23"),
    (r"2\quad3", "6"),
    ("f'(2)", "f(2)"),
    ("y''+y=0", "y+y=0"),
    (r"\overrightarrow{AB}", r"\overrightarrow{BA}"),
    # equal at some places only
    ("(-1)^n", "-1"),
    (r"\lfloor n/10\rfloor", r"\lfloor (n-1)/10\rfloor"),
    (r"\lfloor\log_2 n\rfloor+1", r"\lceil\log_2 n\rceil"),
    (r"\gcd(n,7)", "1"),
    (r"\min(n,40)", "n"),
    (r"|x-3|+|x+3|", "6"),
    (r"\lceil x\rceil", r"\lfloor x\rfloor+1"),
    ("(x-4)(x+3)(x-87)+x", "x"),
    ("x!", "0"),
    # small, and nearly equal
    ("e^{-200}", "e^{-201}"),
    ("e^{-300}", "0"),
    ("1+e^{-300}", "1"),
    (r"\sqrt{10^{100}+1}", "10^{50}"),
    ("10^{20000}+1", "10^{20000}"),
    ("2^{1/2^{200}}", "1"),
    # sets
    (r"x>2 \text{ and } x<5", r"(-\infty,\infty)"),
    (r"x\ne1 \text{ or } x\ne2", r"\mathbb{R}"),
    ("x^2<5", "(-2,2)"),
    (r"|x|\le3", "(-3,3)"),
    (r"\pm1\pm\sqrt2", r"1+\sqrt2,-1-\sqrt2"),
    # units, times, letters
    ("1:00", "12:00"),
    ("3:05", "3:5"),
    ("3:05", "3/5"),
    ("3:00 PM", "4:00 PM"),
    ("3:45 PM", "3:45 AM"),
    (r"12\text{ million}", "12"),
    (r"3\text{ or more}", "3"),
    ("42abc", "42"),
    (r"30^\circ", r"30\%"),
    (r"\text{(A) }3, \text{(B) }5", "A"),
    ("A: no, B", "A"),
    ("B, C", r"\text{B}"),
    (r"\text{1:03 PM}", "1/3"),
    ("0,4", "0.4"),
    ("16,3,1,3", "16,3,1,1"),
    ("0^{k-n}", "2^{k-n}"),
    (r"\gcd(n,29)", "1"),
    ("|x-200|", "200-x"),
    (r"100\text{ cm}", r"100\text{ m}"),
    ("x+C", "x"),
    ("f(x)=2x", "g(x)=2x"),
    (r"\sum_{k=1}^{10} k", "56"),
]
ANSWERS = [
    (r"so \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{3} then \boxed{open {", "3"),
    (r"\boxed{2} and \boxed{3}", "2, 3"),
    (r"\boxed 5.", "5"),
    (r"\boxed42", "42"),
    (r"\Boxed{42}", "42"),
    ("none", None),
    ("#### 72", "72"),
    ("The answer is 3.5. I hope so.", "3.5"),
    (r"The largest $n$ is, finally, $\frac12$", r"\frac12"),
    ("12 apples, so 1,250 in all", "1,250"),
    ("it grows by 10 to 100%.", "100%"),
    (r"Final Answer: The largest $n$ is 34.", "34"),
    ("", None),
]
ENDINGS = [  # a text, its answer, what stands there too and is not
    ("The answer is:\n\n$$\n\\frac{11}{36}\n$$", "11/36", "11"),
    ("The answer is 5. Wait, I forgot one. So the answer is 10.", "10", "5"),
    ("The answer is 5. Wait, there is one more, that makes 6.", "6", "5"),
    ("The answer is 5, since the sum is 10.", "5", "10"),
    ("Answer: 7 (since 3+4=7)", "7", "3"),
    ("The answer is exactly 12.", "12", "1"),
    ("The answer is option C because B is wrong.", "C", "B"),
    ("The answer is 2**10.", "1024", "210"),
    ("**42**", "42", "2"),
    ("```\n42\n```", "42", "2"),
    ("The answers are 3 and 4.", "4, 3", "4"),
    ("Therefore $x = 4$ or $x = -4$.", r"\pm4", "-4"),
    ("The roots are 2, 3, and 5.", "2,3,5", "5"),
    ("The area is $25\\pi$ square units, which is about 78.54.", r"25\pi", "78.54"),
    ("The answer is approximately 0.17 (exactly $\\frac16$).", "1/6", "0.17"),
    ("<think>Perhaps \\boxed{12}? No.</think> The final answer is 15.", "15", "12"),
    ("<answer>(x-1)(x+1)</answer>", "x^2-1", "1"),
    ('{"answer": 42, "confidence": 0.9}', "42", "0.9"),
    ("\\boxed{42}<end_of_turn>\n<start_of_turn>user\n\\boxed{56}", "42", "56"),
    ("So altogether we need 2 1/4 cups.", "9/4", "1/4"),
    ("So we need 12 cups because 3 boxes hold 4 each.", "12", "4"),
    ("\\boxed{a > b}\n\n**Answer: D**", "D", "A"),
    ("\\boxed{5}\n\nWait, I made an error. The correct answer is 6.", "6", "5"),
    ("Tom gets $20 - $13.50 = $6.50 back.", "6.5", "20"),
    ("So there are 17 such integers less than 100.", "17", "100"),
    ("The answer is between 3 and 4.", "between 3 and 4", "4"),
    ("所以最终答案为：42", "42", "2"),
    ("因此，答案是 $\\frac{3}{4}$。", "0.75", "3"),
    ("故选 B。", "B", "C"),
    ("Ответ: 25.", "25", "5"),
    ("답은 7입니다.", "7", "1"),
    ("La réponse est donc $\\frac{3}{4}$.", "0.75", "4"),
    ("Die Antwort lautet 25 cm.", "25", "5"),
    ("There is no solution.", "no solution", "0"),
]


def assert_equal(a: str, b: str) -> None:
    """Whichever of them is the gold."""
    assert checker.is_equal(a, b), f"{a} against {b}"
    assert checker.is_equal(b, a), f"{b} against {a}"


def assert_different(a: str, b: str) -> None:
    assert not checker.is_equal(a, b), f"{a} against {b}"
    assert not checker.is_equal(b, a), f"{b} against {a}"


def test_checker_pairs():
    for a, b in EQUAL:
        assert_equal(a, b)
        assert checker.grade(rf"So it is $\boxed{{{a}}}$.", b), f"{a} against {b}"
    for a, b in DIFFERENT:
        assert_different(a, b)
    for answer in ("E: A polygenic risk score", r"\textbf{(E)}\ 12", "E) increases", "(E)"):
        assert checker.is_equal(answer, "E"), answer
        assert not checker.is_equal(answer, "D"), answer


def test_extract_answer():
    for text, answer in ANSWERS:
        assert checker.extract_answer(text) == answer, text
    for text, answer, other in ENDINGS:
        assert checker.grade(text, answer), f"{text}: {checker.extract_answer(text)}"
        assert not checker.grade(text, other), f"{text}: {checker.extract_answer(text)}"
    start = time.thread_time()
    checker.extract_answer("\\boxed{" * 100_000)
    assert time.thread_time() - start < 1


def test_checker_own_rows():
    """Rows made before the checker was last rewritten, from the forms of public answer keys and the
    ways in which families of models end."""
    lines = (Path(__file__).parent / "data" / "checker_own.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 120
    for row in rows:
        assert checker.grade(row["response"], row["gold"]) == row["expect"], row


def test_checker_takes_any_objects():
    class Silent:
        def __str__(self):
            raise ValueError

    things = [None, 5, 2.5, True, b"5", [1], {}, Silent(), float("nan"), 10**5000, "\ud800", "5"]
    for a in things:
        for b in things:
            assert checker.grade(a, b) in (True, False)
            assert checker.is_equal(a, b) in (True, False)
    assert checker.grade("\\boxed{5}", 5)
    assert not checker.grade(None, "5")


def test_import_is_light():
    """sympy is imported by the first answers that need it."""
    code = "import checker, sys; print(sorted({'sympy', 'mpmath'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def spellings(rng: random.Random) -> tuple[str, str, str]:
    """(a value's LaTeX, the same value otherwise spelled, another value): random expressions with
    one number changed."""
    a, b, c, d = (rng.randint(2, 40) for _ in range(4))
    n = rng.randint(2, 5)
    line = rf"\left({b}+{a} \cdot x\right)/{c}"
    if a < 10 and c < 10:
        line = rf"\dfrac{a}{{{c}}}x + \tfrac{{{b}}}{c}"
    square = a * a * b
    forms = [
        (rf"\frac{{{a}x+{b}}}{{{c}}}", line, rf"\frac{{{a}x+{b}}}{{{c + 1}}}"),
        (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{square}}}", rf"\sqrt{{{square + 1}}}"),
        (rf"(x+{a})^{n}", rf"(x+{a})^{{{n - 1}}}\left({a}+x\right)", rf"(x+{a})^{n + 1}"),
        (
            rf"\left({a}, \frac{{{b}}}{{{c}}}\right]",
            rf"({a},{b}/{c}]",
            rf"({a},{b}/{c})",
        ),
        (
            rf"\{{{a},{b + 40},{c + 80}\}}",
            f"{c + 80}, {a}, {b + 40}",
            f"{c + 81}, {a}, {b + 40}",
        ),
        (f"{a * 1000 + 100 + b}", f"{a},{100 + b}", f"{a},{101 + b}"),
        (
            rf"{a}x+{b}y={c}",
            rf"{n * b}y = {n * c} - {n * a}x",
            rf"{n * b}y = {n * c} + {n * a}x",
        ),
        (rf"{a}\pi r^{{{n}}}", rf"r^{n}\cdot{a}\pi", rf"{a}\pi r^{{{n + 1}}}"),
        (rf"\log_{{{a}}} {a**n}", f"{n}", f"{n + 1}"),
        (rf"{a}+{b}i", rf"{b}i+{a}", rf"{a}-{b}i"),
    ]
    return rng.choice(forms)


def test_checker_properties():
    """Random expressions spelled otherwise are accepted, with one number changed they are not;
    random text raises nothing."""
    rng = random.Random(3)
    for _ in range(300):
        a, same, other = spellings(rng)
        assert_equal(a, same)
        assert_different(a, other)
    for _ in range(2000):
        a, b = ("".join(rng.choices(PIECES, k=rng.randint(1, 25))) for _ in range(2))
        assert checker.is_equal(a, b) in (True, False), (a, b)
        assert checker.grade(a, b) in (True, False), (a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_checker_fuzz(threads):
    """Five seconds of tests/checker_figures.py: always a verdict, under half a second of work, with
    little memory."""
    texts = [text for pair in EQUAL + DIFFERENT for text in pair] + [row[0] for row in ENDINGS]
    report = fuzz(texts, seconds=5, seed=1, threads=threads)
    assert report["failures"] == []
    assert report["slowest"][0][0] < 0.5, report["slowest"][0]
    assert report["grown"] < 50_000


def test_long_text_is_linear():
    """What took seconds where a pattern started again at each digit, space, bracket or prime."""
    for text in (
        "\\boxed{" + "1" * 29_000 + "}",
        "1" * 29_000,
        "\\boxed{0." + "3" * 8_000 + "}",
        "\\boxed{a" + " " * 28_000 + "b}",
        "\\[ " * 6_000,
        "\\boxed{y" + "'" * 28 + "}",
        "\\boxed{" + "g(" * 35 + "x" + ")" * 35 + "}",
        "\\boxed{a" + "_A" * 300 + "}",
        "answer is " * 5_000,
        "**" * 30_000,
    ):
        start = time.thread_time()
        assert not checker.grade(text, "7/5")
        assert time.thread_time() - start < 0.5, text[:30]


@needs_shared
def test_checker_cases_and_hostile_rows(capsys):
    """The labelled cases; hostile rows on either side and on both, also in a thread: half a second
    of work each, 50 MB, no exception."""
    for file, least in (("cases.jsonl", 100), ("cases2.jsonl", 97)):
        assert checker.main([str(SHARED / "checker" / file)]) == 0
        report = capsys.readouterr().out
        assert float(re.search(r"([\d.]+)% right", report)[1]) >= least, report
        assert " 0 false accepts" in report, report
    rows = hostile_rows()
    slow, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def grade_all() -> None:
        for row in rows:
            response, gold = row["response"], row["gold"]
            for a, b in ((response, gold), (gold, response), (response, response + " ")):
                start = time.thread_time()
                checker.grade(a, b)
                checker.is_equal(a, b)
                if time.thread_time() - start > 0.5:
                    slow.append(row["name"])

    grade_all()
    thread = threading.Thread(target=grade_all)
    thread.start()
    thread.join()
    assert slow == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def shared_golds() -> list[list[str]]:
    """The answers of each file with answers in mathematics."""
    files = read_golds(SHARED / "data")
    return [golds for name, golds in files.items() if "mmlu" not in name]


JUDGED_EQUAL = [  # golds of one file that are written otherwise and mean the same
    {r"\frac19", r"\frac{1}{9}"},
    {r"\frac78", r"\frac{7}{8}"},
    {"D", r"\text{(D)}"},
]


@needs_shared
def test_checker_golds():
    """Every gold accepts itself; of golds with another text only those are accepted that were read
    and judged equal."""
    files = shared_golds()
    assert sum(map(len, files)) > 7000
    for golds in files:
        for gold in golds:
            assert accepts_itself(gold), gold
    rng, accepted = random.Random(0), []
    for golds in files:
        distinct = sorted(set(golds))
        for _ in range(len(golds) // 2):
            a, b = rng.sample(distinct, 2)
            if checker.is_equal(a, b) and {a, b} not in JUDGED_EQUAL:
                accepted.append((a, b))
    assert accepted == []


@needs_shared
def test_changed_golds_are_rejected():
    rng = random.Random(0)
    for golds in shared_golds():
        for gold in golds[::4]:
            for other in changed(gold, rng).values():
                # where the braces of \text end says nothing
                shown = [re.sub(r"\\text|[{}\s]", "", s) for s in (other, gold)]
                if "\\text" not in gold or shown[0] != shown[1]:
                    assert not checker.is_equal(other, gold), (other, gold)


# --------------------------------------------------------------------------------------------------
# The parts, each by hand


def test_boxes():
    """Where they begin and end; the outermost; what is not closed is none."""
    for text, boxes in (
        (r"a \boxed{1} b \boxed{2}", [(2, 11, "1"), (14, 23, "2")]),
        (r"\boxed{a \boxed{b} c}", [(0, 21, r"a \boxed{b} c")]),
        (r"\boxed{{1}} }", [(0, 11, "{1}")]),
        (r"\boxed{1", []),
        (r"\boxed{\{1, 2\}}", [(0, 16, r"\{1, 2\}")]),
        (r"x \fbox{ 3 }", [(2, 12, "3")]),
        (r"\boxed 12 apples", [(0, 8, "12")]),
        (r"\boxed A.", [(0, 9, "A")]),
        (r"\boxed{1} \boxed{2 \boxed{3}", [(0, 9, "1"), (19, 28, "3")]),
        (r"\boxed " + "7" * 120, [(0, 8, "7" * 100)]),
    ):
        assert checker._boxes(text) == boxes, text
    near, far = "not" + " " * 3, "not" + " " * 20
    assert checker._meant(near + r"\boxed{1} or \boxed{ } or \boxed{2}")[0][2] == "2"
    assert checker._meant(far + r"\boxed{1}")[0][2] == "1"


def test_formulas():
    """A dollar of money is none; what is not closed is none."""
    for text, formulas in (
        ("a $x$ b $$y$$", [(2, 5, "x"), (8, 13, "y")]),
        (r"\( u \) and \[v\]", [(0, 7, "u"), (12, 17, "v")]),
        ("$5 and $6", []),
        ("it costs $5, or $x = 3$.", [(16, 23, "x = 3")]),
        ("$ x $", [(0, 5, "x")]),
        ("$ x$ y", []),
        (r"\$5 and $\$3$", [(8, 13, r"\$3")]),
        ("$a\n\nb$", []),
        ("$x$2", []),
        (r"\(x $y$", [(4, 7, "y")]),
    ):
        assert checker._formulas(text) == formulas, text
    parts = [(0, 1, "a"), (6, 7, "b"), (10, 11, "c")]
    assert checker._joined("x and y : z", parts) == [(0, 7, "a, b"), (10, 11, "c")]
    for spaces, count in ((59, 1), (60, 2)):
        text = "a," + " " * spaces + "b"
        assert len(checker._joined(text, [(0, 1, "a"), (spaces + 2, spaces + 3, "b")])) == count
    assert checker._without_markdown("**a** 2**3 (x)**2 `b` <b>c</b>\n```py\nd\n```") == (
        "a 2**3 (x)**2 b c\n\nd\n"
    )


def test_where_answers_are_sought():
    """Boxes in the last 20,000 characters, other endings in the last 5,000."""
    box = r"\boxed{7}"
    assert checker.extract_answer(box + " " * (20_000 - len(box))) == "7"
    assert checker.extract_answer(box + " " * (20_001 - len(box))) is None
    said = "#### 7\n"
    assert checker.extract_answer(said + "a " * ((5_000 - len(said)) // 2)) == "7"
    assert "7" not in checker.extract_answer(said + "a " * 2_500)
    field = '{"answer": "x"}'
    assert checker.extract_answer(field + "a" * (5_000 - len(field))) == "x"
    assert checker.extract_answer(field + "a" * (5_002 - len(field))) != "x"
    for text, answer in (
        ("<|im_start|>x \\boxed{1}<|im_end|>\\boxed{2}", "1"),
        ("<|channel|>final<|message|>\\boxed{1}<|channel|>final<|message|>\\boxed{2}", "2"),
        ("a</think>\\boxed{1}</think>so 2", "2"),
        ("\\boxed{1} the answer is 2", "2"),
        ("\\boxed{1} the answer is " + "9" * 59, "9" * 59),
        ("\\boxed{1} the answer is " + "9" * 60, "1"),
        ("\\boxed{1} the answer is x", "1"),
        ("\\boxed{1} the answer is (C)", "(C)"),
        ("I get 5. Now \\boxed{6", "5"),
        ("<answer>1</answer> <answer> 2 </answer>", "2"),
        ("<answer>It is 3 apples then</answer>", "3"),
        ('{"answer": "a\\"b"} {"final_answer": [1, 2]}', "[1, 2]"),
        ('{"answer": "a\\"b"}', 'a"b'),
        ("#### 1\n#### 2\nx", "2"),
        ("#### Step 3", "3"),
        ("#### 1. First", "1"),
    ):
        assert checker.extract_answer(text) == answer, text


def test_ends_of_sentences():
    """What is said at the end, in the ways people say it."""
    for text, answer in (
        ("Hence 3 is the answer", "3"),
        ("The answer is 4. So 3 is the answer.", "3"),
        ("3 is the answer. The answer is 4.", "4"),
        ("The answer is correct. The answer is right.", "right"),
        ("Die Antwort ist 2,5", "2.5"),
        ("The answer is 2,5", "2,5"),
        ("The answer is approximately 3.1, exactly $\\pi$", "\\pi"),
        ("The answer is $5$ cm.", "5\\text{ cm}"),
        ("The answer is 5 cm.", "5 cm"),
        ("The answer is 12 or 15.", "12 or 15"),
        ("The answer is B, as the others fail.", "B"),
        ("We find 12 or 15.", "12 or 15"),
        ("It is between 3 and 5", "It is between 3 and 5"),
        ("We get $x = 4$ (since 2+2)", "x = 4"),
        ("It takes 3 hours and 20 minutes.", "3 hours and 20 minutes"),
        ("Not 7 but we get 8, because 9 fails", "8"),
        ("There are 17 of them, I think", "17"),
        ("There are twelve.", "twelve"),
        ("It has no real solutions.", "no real solutions"),
        ("The colour is red", "red"),
        ("Is it 5? Yes, 6 it is", "6"),
    ):
        assert checker.extract_answer(text) == answer, (text, checker.extract_answer(text))


def test_cleaned_texts():
    """One spelling for what means the same."""
    for text, cleaned in (
        ("  $ 5 $ ", "5"),
        (r"\[ x \].", "x"),
        (r"\(x\)", "x"),
        ("$5", r"\$5"),
        (r"\text{ yes }.", "yes"),
        ("−3×2", r"-3\times 2"),
        ("2½", r"2 \frac12"),
        ("x²", "x^2"),
        ("a₁", "a_1"),
        ("1 234 567", "1234567"),
        ("1 234 56", "1 234 56"),
        ("-12 345.6", "-12345.6"),
        (r"1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"1\!:\!03", "1:03"),
        ("3x10^4", r"3\times 10^4"),
        (r"{5\choose2}", r"\binom{5}{2}"),
        (r"90^{\circ}", r"90\deg"),
        (r"6\pi\approx18.85", r"6\pi"),
        (r"x\approx 3", "x= 3"),
        (r"\approx 3", "3"),
        ("'a'", "a"),
        ("a'", "a'"),
        ('"5"', "5"),
        ("5. ", "5"),
        ("twenty-one", "21"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        (r"2.\overline{3}", r"\frac{21}{9}"),
        (r".12\overline{34}", r"\frac{1222}{9900}"),
        (r"\\frac12", r"\frac12"),
        ("all real numbers", r"\mathbb{R}"),
        (r"\{\}", r"\emptyset"),
        ("5<|im", "5"),
    ):
        assert checker.clean(text) == cleaned, (text, checker.clean(text))
    assert checker.clean("1" * 1500) == "1" * 1500
    for long in ("1" * 1501, "1 " * 3500):
        with pytest.raises(checker.Limit):
            checker.clean(long)
    assert checker.clean("x" + " " * 2000 + "y") == "x y"


def test_numbers_in_words():
    for text, digits in (
        ("zero", "0"), ("Nineteen", "19"), ("twenty", "20"), ("ninety-nine", "99"),
        ("one hundred", "100"), ("two hundred and five", "205"), ("hundred", "100"),
        ("three thousand four hundred twelve", "3412"), ("twelve hundred", "1200"),
        ("two million one thousand", "2001000"), ("dozen", "12"), ("two dozen", "24"),
        ("one two", ""), ("twenty thirteen", ""), ("twenty-ten", ""), ("five apples", ""),
        ("", ""), ("one hundred thirteen", "113"), ("thirteen one", ""), ("billion", "1000000000"),
    ):  # fmt: skip
        assert checker.spelled(text) == digits, text


def test_words_that_are_compared():
    for text, plain in (
        (r"\text{Yes} NO x Y", "yesnoxy"), ("2 3", "2 3"), ("a 3", "a3"), (r"\text {a b}", "ab"),
        ("undefined", "doesnotexist"), ("DNE", "doesnotexist"), ("The limit does not exist",
        "doesnotexist"), ("none", "nosolution"), ("No real solutions", "nosolution"),
        ("x" * 50 + "nosolution", "x" * 50 + "nosolution"), (r"\$5", r"\$5"), ("$a$", "a"),
    ):  # fmt: skip
        assert checker.words(text) == plain, (text, checker.words(text))


def num(n) -> tuple:
    return ("num", Fraction(n))


X, Y = ("sym", "x"), ("sym", "y")
ONE, TWO, THREE = num(1), num(2), num(3)
TREES = {
    "x+2-3": ("add", X, TWO, ("neg", THREE)),
    "-x": ("neg", X),
    "--x": X,
    "2x^3": ("mul", TWO, ("pow", X, THREE)),
    "x/2y": ("mul", ("div", X, TWO), Y),
    "2^3^2": ("pow", TWO, ("pow", THREE, TWO)),
    "2^-3": ("pow", TWO, ("neg", THREE)),
    "2*-3": ("mul", TWO, ("neg", THREE)),
    "x!": ("fun", "factorial", X),
    "x!!": ("fun", "factorial2", X),
    "3%": ("percent", THREE),
    r"3\deg": ("deg", THREE),
    r"\frac12": ("div", ONE, TWO),
    r"\frac{1}{23}": ("div", ONE, num(23)),
    r"\frac123": ("mul", ("div", ONE, TWO), THREE),
    r"3\frac12": num("7/2"),
    r"3\frac21": ("mul", THREE, ("div", TWO, ONE)),
    r"3\frac33": ("mul", THREE, ("div", THREE, THREE)),
    "3 1/2": num("7/2"),
    r"\sqrt3": ("pow", THREE, ("div", ONE, TWO)),
    r"\sqrt[3]{x}": ("pow", X, ("div", ONE, THREE)),
    r"\binom32": ("fun", "binomial", THREE, TWO),
    "|x|": ("fun", "abs", X),
    "||x|-2|": ("fun", "abs", ("add", ("fun", "abs", X), ("neg", TWO))),
    r"\sin 2x": ("fun", "sin", ("mul", TWO, X)),
    r"\sin x\cos y": ("mul", ("fun", "sin", X), ("fun", "cos", Y)),
    r"\sin^2 x": ("pow", ("fun", "sin", X), TWO),
    r"\sin^{-1} x": ("fun", "arcsin", X),
    r"\sin -x": ("fun", "sin", ("neg", X)),
    r"\log_2 x": ("fun", "log", X, TWO),
    r"\max(1,2)": ("fun", "max", ONE, TWO),
    r"\max\{1,2\}": ("fun", "max", ONE, TWO),
    r"\lfloor x\rfloor": ("fun", "floor", X),
    r"\lceil x\rceil": ("fun", "ceil", X),
    "(x)": X,
    "[x]": X,
    "(1,2)": ("tuple", "(", ")", ONE, TWO),
    "(1,2]": ("tuple", "(", "]", ONE, TWO),
    "[1,2)": ("tuple", "[", ")", ONE, TWO),
    "]1,2]": ("tuple", "(", "]", ONE, TWO),
    r"\langle 1,2\rangle": ("tuple", "(", ")", ONE, TWO),
    r"\langle 1,2,3\rangle": ("tuple", "(", ")", ONE, TWO, THREE),
    r"\{1,2\}": ("set", ONE, TWO),
    r"\{1\}": ("set", ONE),
    r"\emptyset": ("set",),
    r"\mathbb{R}": ("reals",),
    "1,2": ("list", ONE, TWO),
    "1,2,": ("list", ONE, TWO),
    "1 or 2": ("list", ONE, TWO),
    "x=1": ("rel", ("=",), X, ONE),
    "= 1": ONE,
    "1<x\\le2": ("rel", ("<", "<="), ONE, X, TWO),
    "2>x\\ge1": ("rel", ("<=", "<"), ONE, X, TWO),
    r"x\ne1": ("rel", ("!=",), X, ONE),
    r"x\in[1,2]": ("tuple", "[", "]", ONE, TWO),
    r"x\notin\{1\}": ("minus", ("reals",), ("set", ONE)),
    r"x\equiv1\pmod{3}": ("mod", X, ONE, THREE),
    r"\{1\}\cup\{2\}": ("union", ("set", ONE), ("set", TWO)),
    r"\{1\}\cap\{2\}": ("cap", ("set", ONE), ("set", TWO)),
    r"\{x | x>1\}": ("rel", ("<",), ONE, X),
    "1:2": ("ratio", ONE, TWO),
    "1:2:3": ("ratio", ONE, TWO, THREE),
    "1:03": ("time", 1, 3, ""),
    "12:45 p.m.": ("time", 12, 45, "pm"),
    "x>1 and x<2": ("cap", ("rel", ("<",), ONE, X), ("rel", ("<",), X, TWO)),
    "x<1 or x>2": ("union", ("rel", ("<",), X, ONE), ("rel", ("<",), TWO, X)),
    r"x\ne1 or x\ne2": ("cap", ("rel", ("!=",), X, ONE), ("rel", ("!=",), X, TWO)),
    r"1\pm2": ("list", ("add", ONE, TWO), ("add", ONE, ("neg", TWO))),
    r"1\mp2": ("list", ("add", ONE, ("neg", TWO)), ("add", ONE, TWO)),
    "101_2": ("based", "101", TWO),
    "(101)_2": ("based", "101", TWO),
    "2.50": ("dec", Fraction(5, 2), 3, Fraction(1, 100)),
    "0.05": ("dec", Fraction(1, 20), 1, Fraction(1, 100)),
    "1.5e3": ("dec", Fraction(1500), 2, Fraction(100)),
    "2.": TWO,
    "a_1": ("sym", "a _ 1"),
    "x'": ("sym", "x '"),
    "f(x)": ("sym", "f ( x )", "x"),
    "f(2)": ("sym", "f ( 2 )"),
    "x(y)": ("mul", X, Y),
    "e": ("const", "e"),
    r"\pi": ("const", "pi"),
    r"\infty": ("const", "inf"),
    r"\sum_{k=1}^{3} k": ("sum", "k", ONE, THREE, ("sym", "k")),
    r"\prod_{k=1}^3 2": ("prod", "k", ONE, THREE, TWO),
    r"\int_1^2 x\,dx": ("int", "x", ONE, TWO, X),
    r"\begin{pmatrix}1&2\\3&x\end{pmatrix}": ("matrix", (ONE, TWO), (THREE, X)),
    r"\begin{aligned}x&=1\\y&=2\end{aligned}": (
        "list", ("rel", ("=",), X, ONE), ("rel", ("=",), Y, TWO),
    ),
    r"\begin{gathered}x=1\\ \end{gathered}+1": (
        "add", ("rel", ("=",), X, ONE), ONE,
    ),
    r"\begin{vmatrix}1&2\\3&x\end{vmatrix}": ("fun", "det", ("matrix", (ONE, TWO), (THREE, X))),
    r"\begin{cases}1&x>2\\x&\text{else}\end{cases}": (
        "cases", (ONE, ("rel", ("<",), TWO, X)), (X, ("text", "else")),
    ),
    "3 cm": ("unit", THREE, "m^1", Fraction(1, 100), "cm"),
    r"\$3": ("unit", THREE, "$^1", Fraction(1), "$"),
    "3 hours 2 minutes": ("unit", ("add", ("mul", THREE, ONE), ("mul", TWO, num("1/60"))),
                          "s^1", Fraction(3600), "hours"),
    "3 million": ("mul", THREE, num(10**6)),
    "-3 cm": ("unit", ("neg", THREE), "m^1", Fraction(1, 100), "cm"),
}  # fmt: skip


def test_trees():
    for text, tree in TREES.items():
        assert checker.parse(text) == tree, (text, checker.parse(text))
    for unread in (
        "",
        "2 3",
        "(1",
        "1)",
        "hello there",
        "1 2/3 4",
        "x >",
        r"\unknown",
        "1" * 601,
        "(" * 41 + "x" + ")" * 41,
        r"1\pm2\pm3\pm4\pm5\pm6",
    ):
        with pytest.raises(checker.Limit):
            checker.parse(unread)
    assert checker.parse("1" * 600) == num("1" * 600)
    assert len(checker.parse(r"1\pm2\pm3\pm4\pm5")) == 17


def test_units():
    for text, key in (
        ("cm", ("m^1", Fraction(1, 100))),
        ("inches", ("m^1", Fraction("0.0254"))),
        ("m/s^2", ("m^1 s^-2", 1)),
        ("m s^{-2}", ("m^1 s^-2", 1)),
        ("meters per second squared", ("m^1 s^-2", 1)),
        ("km/h", ("m^1 s^-1", Fraction(5, 18))),
        ("square feet", ("m^2", Fraction("0.3048") ** 2)),
        ("cubic cm", ("m^3", Fraction(1, 10**6))),
        ("meters cubed", ("m^3", 1)),
        ("mph", ("m^1 s^-1", Fraction("1609.344") / 3600)),
        ("apples", ("apple^1", 1)),
        ("kJ", ("J^1", 1000)),
        ("mA", ("A^1", Fraction(1, 1000))),
        ("MHz", ("Hz^1", 10**6)),
        ("kilograms", ("g^1", 1000)),
        ("milligrams", ("g^1", Fraction(1, 1000))),
        ("days", ("s^1", 86400)),
        ("weeks", ("s^1", 604800)),
        ("minutes", ("s^1", 60)),
        ("cents", ("$^1", Fraction(1, 100))),
        ("m m", ("m^2", 1)),
        ("pounds", ("g^1", Fraction("453.59237"))),
        ("yards", ("m^1", Fraction("0.9144"))),
        ("sq m", ("m^2", 1)),
        ("m/m", ("m^0", 1)),
    ):
        assert checker.unit_key(text) == key, (text, checker.unit_key(text))
    assert len(checker.unit_key(" ".join("abcdefghijkl"))[0].split()) == 12
    for unread in ("more than m", " ".join("abcdefghijklm")):
        with pytest.raises(checker.Limit):
            checker.unit_key(unread)


def value(text: str, point: dict | None = None, **settings) -> complex:
    tree = checker.to_sympy(checker.parse(checker.clean(text)), [3000], {})
    return complex(checker.Number([3000], **settings)(tree, point or {}))


def test_values():
    """Against Python's own arithmetic."""
    third = {"x": Fraction(1, 3)}
    for text, expected in (
        (r"\frac{3}{7}+2^{-3}", 3 / 7 + 1 / 8),
        (r"\sqrt[3]{-8}", -2),
        (r"\sqrt{-4}", 2j),
        (r"\sqrt{2}^3", 2**1.5),
        (r"e^{2}", math.e**2),
        (r"e^{i\pi/3}", cmath.exp(1j * math.pi / 3)),
        (r"\sin 30\deg", 0.5),
        (r"\arctan 2", math.atan(2)),
        (r"\cosh 2", math.cosh(2)),
        (r"\log_3 7", math.log(7, 3)),
        (r"\ln 7", math.log(7)),
        (r"\log 7", math.log(7)),
        (r"\lfloor\sqrt{10}\rfloor", 3),
        (r"\lceil\sqrt{10}\rceil", 4),
        (r"|-\sqrt2|", 2**0.5),
        (r"|3+4i|", 5),
        (r"\max(\sqrt2,\pi)", math.pi),
        (r"\min(\sqrt2,\pi)", 2**0.5),
        (r"\gcd(12,18)", 6),
        (r"\operatorname{lcm}(4,6)", 12),
        (r"\binom{7}{3}", 35),
        ("6!", 720),
        ("7!!", 105),
        ("x!", math.gamma(4 / 3)),
        (r"\operatorname{cbrt}(-27)", -3),
        (r"\operatorname{cis}(x)", cmath.exp(1j / 3)),
        ("50%", 0.5),
        ("0^0", 1),
        ("x^0", 1),
        (r"\sum_{k=1}^{4} k^2", 30),
        (r"\prod_{k=2}^{4} k", 24),
        (r"\int_1^3 (x^2+1)\,dx", 32 / 3),
        (r"\sum_{k=0}^{\infty} \frac{1}{3^k}", 1.5),
        (r"\sum_{k=2}^{1} k", 0),
        (r"\prod_{k=2}^{1} k", 1),
        (r"\sum_{k=1}^{3} x^k", 1 / 3 + 1 / 9 + 1 / 27),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", -2),
        (r"\sin^{-1} 1", math.pi / 2),
    ):
        assert value(text, third) == pytest.approx(expected, rel=1e-12), text
    assert value(r"\log 1000", log10=True) == pytest.approx(3)
    assert value(r"\log_2 8", log10=True) == pytest.approx(3)
    for text, error in (
        (r"\frac{1}{0}", ZeroDivisionError),
        ("0^{-1}", ZeroDivisionError),
        (r"\sum_{k=0}^{201} k", checker.Limit),
        (r"\sum_{k=0}^{\infty} 2^k", checker.Limit),
        ("2^{99999999}", checker.Limit),
        (r"e^{99999}", checker.Limit),
        ("3001!", checker.Limit),
        (r"\gcd(\sqrt2,3)", checker.Limit),
    ):
        with pytest.raises(error):
            value(text, third)
    assert value(r"\sum_{k=0}^{200} k") == 20100
    for places, digits in ((0, 50), (1, 300)):
        assert checker.context(places).dps == digits
    budget = [1]
    with pytest.raises(checker.Limit):
        checker.Number(budget)(checker.to_sympy(checker.parse("x+1"), [9], {}), {"x": ONE[1]})
    with pytest.raises(checker.Limit):
        checker.to_sympy(checker.parse("x+1"), [2], {})
    checker.to_sympy(checker.parse("x+1"), [3], {})


def test_sizes_of_expressions():
    """Terms of the expanded form, or the degree, at most."""
    for text, size in (
        ("x", 1), ("x+y+1", 3), ("(x+y)(x+1)", 4), ("(x+1)^3", 8), ("x^5", 5), ("x^{-5}", 5),
        ("(x+1)^{30}", 10**6), ("(x+1)^2(y+1)^2", 16), ("(x+1)^2+y", 5),
    ):  # fmt: skip
        assert checker.size_of(checker.to_sympy(checker.parse(text), [99], {})) == size, text
    bits = checker.bits(checker.to_sympy(checker.parse(r"\frac{8}{3}x"), [99], {}))
    assert bits == 4 + 2
    near = [checker.near(checker.context().mpf(1) + checker.context().mpf(10) ** n, 1)
            for n in (-34, -36)]  # fmt: skip
    assert near == [False, True]
    infinite = checker.context().inf
    assert checker.near(infinite, infinite)
    assert not checker.near(infinite, -infinite)
    assert not checker.near(infinite, 1)


def test_places_of_comparison():
    """Consecutive numbers for letters that count, both signs for others, and beside the numbers
    that occur."""
    import sympy

    n, x, y = sympy.symbols("n x y")
    assert checker.points([sympy.Integer(3)]) == [{}]
    counted = [p["n"] for p in checker.points([n])]
    assert counted[:17] == list(range(1, 18))
    assert counted[17:] == [42, 60, 127, 37182145]
    k = sympy.Symbol("k")
    pairs = [(p["n"], p["k"]) for p in checker.points([n + k])[:4]]
    assert pairs == [(1, 1), (2, 1), (3, 3), (1, 4)]  # by 1 + (7j + 3) % (j + 1); then k leads
    real = [p["x"] for p in checker.points([x])]
    assert len(real) == 14
    assert min(real[:3]) > 0 > min(real)
    assert sum(value.denominator == 1 for value in real) == 2
    both = checker.points([x + y])
    assert all(p["x"] != p["y"] for p in both)
    assert len(checker.points([n + x])) == 21
    beside = checker.points([x + 29])[14:]
    shift = Fraction("0.3717")
    assert [p["x"] for p in beside] == [29 + shift, -29 - shift]
    assert [p["n"] for p in checker.points([n + 200 + x])[21:]] == [200, 200]
    numbers = [sympy.Integer(k) for k in (19, 20, -21, 10**9, 10**9 + 1, 500, 600, 700)]
    assert checker.constants(numbers) == [20, 21, 500, 600]
    assert checker.constants([sympy.Rational(41, 2)]) == [Fraction(41, 2)]


def test_pieces_of_the_comparison():
    tree = checker.parse
    names = ("x", "AB", "f(x)", "|x|", "(p,q)", r"\frac{a}{b}", "a:b", "i", "e", "ab")
    assert [checker.name(tree(text)) for text in names] == [True] * len(names)
    others = ("2", "x+1", "2x", r"\pi", "(x,1)", "x^2", "-x")
    assert [checker.name(tree(text)) for text in others] == [False] * len(others)
    assert checker.symbols(tree(r"ax+\sum_{k=1}^{n} k b")) == {"a", "x", "n", "b"}
    assert checker.contains(tree("1+(x,2)"), ("tuple", "(", ")"))
    assert not checker.contains(tree("1+(x,2]"), ("tuple", "(", ")"))
    for text, digits, ulp in (
        ("2.50", 3, "1/100"), ("-2.5", 2, "1/10"), ("2.5%", 2, "1/1000"), ("5", 0, "0"),
        (r"2.5\cdot10^3", 2, "100"), (r"2.5\cdot10^{-3}", 2, "1/10000"), ("x", 0, "0"),
        (r"2.5\cdot10^{399}", 2, "1" + "0" * 398), (r"2.5\cdot10^{400}", 0, "0"),
    ):  # fmt: skip
        assert checker.decimal(tree(text)) == (digits, Fraction(ulp)), text
    assert checker.without_constant(tree("x+C")) == ("add", X)
    assert checker.without_constant(tree("x+c+1")) == ("add", X, ONE)
    for text in ("x", "C+C", "Cx+C", "x+D", "xC"):
        assert checker.without_constant(tree(text)) is None, text
    assert checker.renamed(tree("2x+y"), "x", "z") == tree("2z+y")
    assert checker.spread(tree("(x,y)=(2,3)")) == tree("x=2,y=3")
    for text in ("(x,y)=(2,3,1)", "(x,1)=(2,3)", "x=2", "(x,y)"):
        assert checker.spread(tree(text)) == tree(text)
    inf = ("const", "inf")
    for text, ends in (
        ("1<x<2", "(1,2)"), (r"1\le x<2", "[1,2)"), (r"1<x\le2", "(1,2]"),
        ("x<2", ("tuple", "(", ")", ("neg", inf), TWO)),
        (r"x\le2", ("tuple", "(", "]", ("neg", inf), TWO)),
        ("x>2", ("tuple", "(", ")", TWO, inf)), (r"2\le x", ("tuple", "[", ")", TWO, inf)),
        ("2<x", ("tuple", "(", ")", TWO, inf)), (r"2\ge x", ("tuple", "(", "]", ("neg", inf), TWO)),
        ("x=2", ("set", TWO)), (r"x\ne2", ("minus", ("reals",), ("set", TWO))),
        ("x<y", "x<y"), ("x^2<4", "x^2<4"), ("|x|<2", "|x|<2"), ("x<x+1", "x<x+1"),
    ):  # fmt: skip
        expected = tree(ends) if isinstance(ends, str) else ends
        assert checker.interval(tree(text)) == expected, text
    assert checker.unknowns(tree("x>1 and y<2")) == {X, Y}
    assert checker.unknowns(tree("x^2>1")) == {X}
    assert checker.parts(tree("x<1 or x>5 or x=3")) == [
        tree("x<1"), tree("x>5"), tree("x=3"),
    ]  # fmt: skip


def test_letters_of_choices():
    for text, found in (
        ("(C)", ("C", True)), ("C", ("C", True)), ("C.", ("C", True)), ("(C) 12", ("C", False)),
        ("Option C", ("C", True)), (r"\text{(B)}", ("B", True)), ("C: as D is", ("C", False)),
        ("A and B", ("", False)), ("A, B", ("", False)), ("(A) or (B)", ("", False)),
        ("K", ("", False)), ("c", ("", False)), ("A+1", ("", False)), ("Bad", ("", False)),
        ("C. (D) is wrong", ("", False)), ("C. It is (C)", ("C", False)),
    ):  # fmt: skip
        assert checker._choice(text) == found, text


def test_readings_of_digit_groups():
    """A number; a list too where it may be one."""
    readings = checker._readings
    pair = ("list", num(1), num(234))
    assert readings("1,234", "5") == [num(1234)]
    assert readings("1,234", "1, 234") == [num(1234), pair]
    assert readings("1,034", "1, 34") == [num(1034)]
    assert readings("12", "x") == [num(12)]
    assert readings("(1,234)", "x") == [num(1234), ("tuple", "(", ")", num(1), num(234))]
    assert readings("100,200,300", "x")[1] == ("list", num(100), num(200), num(300))
    assert readings("1,234,567", "x") == [num(1234567)]


def test_more_pairs():
    """Each way in which two forms are compared, with a near miss beside."""
    for a, same, other in (
        ("5 cm", "0.05 m", "0.5 m"),
        ("5 cm", "5", "6"),
        (r"5\%", "0.05", "0.5"),
        (r"5\%", "5", "50"),
        ("5 cm", r"x=5\text{ cm}", r"x=6\text{ cm}"),
        ("x=5", "5", "4"),
        (r"180\deg", r"\pi", r"2\pi"),
        ("a+b=3+14=17", "17", "14"),
        ("2+3=5", "5", "6"),
        ("(1,2)", "x=1,y=2", "x=2,y=1"),
        ("1,2,3", "3,2,1", "3,2,2"),
        ("1,1,2", "2,1", "2,3"),
        ("x=2y", "2x=4y", "2x=5y"),
        ("f(x)=x+1", "f(t)=t+1", "f(t)=t+2"),
        ("2x<4", "x<2", "x<3"),
        ("-x<4", "x>-4", "x<-4"),
        ("x+y<4", "2x+2y<8", r"2x+2y\le8"),
        ("1:2", "2:4", "2:5"),
        ("1:2:3", "2:4:6", "2:4:7"),
        ("1:2", r"\frac12", r"\frac13"),
        ("9:05 AM", "9:05 am", "9:06"),
        (r"x\equiv1\pmod3", r"x\equiv4\pmod3", r"x\equiv4\pmod5"),
        ("1.0000000000", "1", "1.1"),
        (r"\{1,2\}", "1,2", "1,3"),
        (r"(-\infty,3)", "x<3", r"x\le3"),
        ("[1,2]", r"1\le x\le2", "1<x<2"),
        (r"\{1\}\cup\{2\}", r"\{1,2\}", r"\{1,3\}"),
        (r"[0,2]\cap[1,3]", "[1,2]", "[1,3]"),
        (r"[0,3]\setminus[1,3]", "[0,1)", "[0,1]"),
        ("x+C", "x+5+C", "2x+C"),
        ("3.1415926536", r"\pi", "3"),
        (r"\log 100", "2", "3"),
        ("x^2+1", "1+x^2", "1-x^2"),
        ("2^n", r"2\cdot2^{n-1}", "2^{n-1}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", "(2,1)"),
        (r"\text{yes, no}", r"\text{no, yes}", r"\text{no, no}"),
        ("AC", "C and A", "C and B"),
        ("16_8", "(16)_{8}", "16_9"),
        (
            r"\begin{cases}1&x>2\\3&x\le2\end{cases}",
            r"\begin{cases}3&x\le2\\1&x>2\end{cases}",
            r"\begin{cases}3&x>2\\1&x\le2\end{cases}",
        ),
        (r"\frac{x^2-1}{x-1}", "x+1", "x-1"),
    ):
        assert_equal(a, same)
        assert_different(a, other)
    assert checker.is_equal("x" * 2000, "x" * 1000 + " " + "x" * 1000) is False
    assert checker.is_equal("x " * 4000, "x  " * 4000)
    assert not checker.is_equal("x " * 4000, "x  " * 3999 + "y")


def test_gold_solutions():
    """A gold may be a whole solution: its own box, or where it is long its last value."""
    long = "Here there are many words about what should surely come before this: "
    assert checker.grade("\\boxed{5}", "We add and get \\boxed{5}")
    assert checker.grade("\\boxed{5}", "so\n#### 5")
    assert checker.grade("\\boxed{5}", long + "the answer is 5")
    assert not checker.grade("\\boxed{5}", long + "the answer is 6")
    assert checker.grade("no number here at all", "no number here at all")
    assert not checker.grade("a" * 1501, "a" * 1501)


def test_report_of_cases(tmp_path, capsys):
    """Counts, shares and what went wrong; a file that cannot be read is one line."""
    rows = [
        {"response": "\\boxed{1}", "gold": "1", "expect": True},
        {"response": "\\boxed{1}", "gold": "2", "expect": False},
        {"response": "\\boxed{1}", "gold": "1", "expect": False, "id": "a"},
        {"response": "\\boxed{3}", "gold": "2", "expect": True, "id": "b"},
        {"response": "\\boxed{3}", "gold": "4", "expect": True},
        {"response": "\\boxed{3}", "gold": "4"},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    assert checker.main([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "false accept a: '1' against '1'", "false reject b: '2' against '3'",
        "false reject : '4' against '3'",
    ]  # fmt: skip
    report = f"{file}: 6 rows; 40.00% right, 1 false accepts, 2 false rejects; median "
    assert lines[3].startswith(report)
    times = re.fullmatch(r"median ([\d.]+) ms, p99 ([\d.]+) ms, longest ([\d.]+) ms",
                         lines[3].split("; ")[-1])  # fmt: skip
    assert times
    assert float(times[1]) <= float(times[2]) <= float(times[3]) + 0.06
    file.write_text(json.dumps(rows[-1]))
    assert checker.main([str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 1 rows; median ")
    for text, said in (
        ('{"gold": 1}', "rows without response"), ("{}", "rows without gold and response"),
        ("", ""), ("{", "Expecting property name"), ("3", "'int' object is not iterable"),
    ):  # fmt: skip
        file.write_text(text)
        assert checker.main([str(file)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"checker.py: {file}: {said}")
        assert error.count("\n") == 1
    assert checker.main([str(tmp_path / "none")]) == 2
    capsys.readouterr()
    assert checker.main([]) == 2
    assert checker.main(["-h"]) == checker.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: python checker.py CASES.jsonl") == 3


# --------------------------------------------------------------------------------------------------
# Limits: the last that is read and the first that is not


def is_limit(function, *args) -> bool:
    try:
        function(*args)
    except checker.Limit:
        return True
    return False


def test_limits_of_trees():
    """Brackets 19 deep (each takes two of 40), 20 relations, five signs of two readings."""
    for last, first in (
        ("(" * 19 + "x" + ")" * 19, "(" * 20 + "x" + ")" * 20),
        ("2^" * 38 + "x", "2^" * 39 + "x"),
        ("<".join("x" * 21), "<".join("x" * 22)),
        (r"1\pm2\pm3\pm4\pm5", r"1\pm2\pm3\pm4\pm5\pm6"),
    ):
        assert not is_limit(checker.parse, last), last
        assert is_limit(checker.parse, first), first
    # beside \mp there are two readings, of however many signs
    assert len(checker.parse(r"1\pm2\mp3\pm4\pm5\pm6")) == 3
    many = [str(k) for k in range(21)]
    assert checker._items("".join(f"\n- {k}" for k in many)) == many[:20]
    assert checker._items("\n- 5") == []


def test_limits_of_exact_values():
    """40,000 bits of a result; 80,000 of a power; what is left to floating point beyond."""
    import sympy

    whole, part, x = sympy.Integer, sympy.Rational, sympy.Symbol("x")
    for function, last, first in (
        (checker.limited, [whole(2**39_998)], [whole(2**39_999)]),  # a bit for the denominator
        (checker.limited, [part(1, 2**39_998)], [part(1, 2**39_999)]),
        (checker.power, [whole(3), whole(40_000)], [whole(3), whole(40_001)]),
        (checker.power, [whole(1), whole(10**9)], [whole(2), whole(10**9)]),
        (checker.power, [part(1, 3), whole(-40_000)], [part(1, 3), whole(-40_001)]),
        (checker.function, ["factorial", [whole(3000)]], ["factorial", [whole(3001)]]),
    ):
        assert not is_limit(function, *last), last
        assert is_limit(function, *first), first
    # the terms of a sum may have 160,000 bits together
    assert checker.combined("add", [whole(2**39_998), whole(-(2**39_998))] * 2) == 0
    assert is_limit(checker.combined, "add", [whole(2**39_998), whole(-(2**39_998))] * 2 + [x])
    stays = sympy.Function("pow")
    for base, exponent, kept in (
        (whole(2), part(1, 12), False), (whole(2), part(1, 13), True),
        (whole(2), part(99, 5), False), (whole(2), part(101, 5), True),
        (whole(2**126), part(1, 3), False), (whole(2**127), part(1, 3), True),
        (x + 1, whole(60), False), (x + 1, whole(61), True), (x + 1, whole(-60), False),
        (2 * x, whole(2), True), (x**2, whole(2), True), (x, part(1, 2), True),
    ):  # fmt: skip
        assert (checker.power(base, exponent).func == stays) == kept, (base, exponent)
    for base, exponent, value in (
        (whole(10**100), part(-1, 2), part(1, 10**50)),  # more than 128 bits, but a square
        (part(9, 4), part(3, 2), part(27, 8)),
        (whole(-8), part(1, 3), -2),
        (whole(-8), part(2, 3), 4),
        (whole(0), part(1, 2), 0),
        (whole(0), whole(0), 1),
    ):
        assert checker.power(base, exponent) == value, (base, exponent)
    assert checker.function("det", [2 * sympy.eye(4)]) == 16
    assert is_limit(checker.function, "det", [sympy.eye(5)])


def test_limits_of_floating_point():
    """Sizes from which a value is not worked out, and what it costs."""
    import sympy

    mp, x = checker.context(), sympy.Symbol("x")
    named, whole = sympy.Function, sympy.Integer

    def of(expression, at):
        return checker.Number([10**6])(expression, {"x": mp.mpmathify(at)})

    for expression, last, first in (
        (named("floor")(x), "1e30", "1.0001e30"),
        (named("cosh")(x), 50_000, 50_001),
        (named("exp")(x), -50_000, -50_001),
        (named("pow")(whole(2), x), 50_000, 50_001),  # log2 2 + 1 for each
        (named("factorial")(x), 1500, 1501),
        (x + 1, mp.mpf(2) ** 199_999, mp.mpf(2) ** 200_000),
        (checker.to_sympy(checker.parse(r"\sum_{k=1}^{x} k"), [99], {}), 201, 202),
    ):
        assert not is_limit(of, expression, last), expression
        assert is_limit(of, expression, first), expression
    # whole but for rounding; real but for rounding
    assert of(named("floor")(x), mp.mpf(3) - mp.mpf(10) ** -41) == 3
    assert of(named("floor")(x), mp.mpf(3) - mp.mpf(10) ** -39) == 2
    assert isinstance(of(2 * x, mp.mpc(1, mp.mpf(10) ** -46)), mp.mpf)
    assert isinstance(of(2 * x, mp.mpc(1, mp.mpf(10) ** -44)), mp.mpc)
    for expression, at, precision, cost in (
        (x + 1, 2, 0, 3),
        (x + 1, 2, 1, 15),
        (named("factorial")(x), 2, 0, 2),
        (named("factorial")(x), 2.5, 0, 62),
        (whole(2**4000), 0, 0, 1 + 10),
    ):
        budget = [1000]
        checker.Number(budget, precision)(expression, {"x": mp.mpf(at)})
        assert 1000 - budget[0] == cost, expression
    assert checker.size_of((x + 1) ** 19) == 2**19
    assert checker.size_of((x + 1) ** 20) == 10**6


def test_limits_of_comparison():
    """900 pairs of items; a decimal of ten digits is that of a number that it is next to; a
    difference of 10^-200 is none, where other numbers are there."""
    same = checker.Same()
    assert same.unordered((1,) * 30, (1,) * 30, int.__eq__)
    assert is_limit(same.unordered, (1,) * 31, (1,) * 30, int.__eq__)
    for digits, near in (
        ("3.141592654", True), ("3.14159265", False), ("3.141592653", True),
        ("3.141592655", False), ("3.141592652", False),
    ):  # fmt: skip
        assert checker.is_equal(digits, r"\pi") == checker.is_equal(r"\pi", digits) == near, digits
    assert_equal(r"\sqrt2+10^{-210}\pi", r"\sqrt2")
    assert_different(r"\sqrt2+10^{-190}\pi", r"\sqrt2")


def test_limits_of_texts():
    """How far away and how long what counts may be."""
    for spaces, count in ((17, 0), (18, 1)):  # "not" within 20 characters of a box
        assert len(checker._meant("not" + " " * spaces + r"\boxed{1}")) == count
    for letters, found in ((19, None), (20, "5")):  # and 20 letters before a number
        assert checker._number("not " + "a" * letters + " 5", False) == found
    for later, found in ((5, "5"), (6, None)):  # the last six that name an answer
        text = "the answer is 5. " + "the answer is right. " * later
        assert checker._stated(text) == found
    for letters, found in ((180, "7"), (190, "3.1")):  # 200 characters on
        assert checker._clause("about 3.1 " + "a" * letters + ", exactly 7").split()[0] == found
    for letters, plain in ((49, "nosolution"), (50, "x" * 50 + "nosolution")):
        assert checker.words("x" * letters + "nosolution") == plain
    for digits, text in ((40, r"\frac"), (41, "0.222")):
        assert checker.clean("0." + "2" * digits + r"\overline{3}").startswith(text)
    for words, whole in ((10, True), (11, False)):  # more are a solution
        assert checker.grade(r"\boxed{5}", "abcd " * words + "is 5") != whole


def test_report_of_times(tmp_path, capsys, monkeypatch):
    """Of 200 rows that take 1 to 200 ms: the 101st, the 199th and the last."""
    row = json.dumps({"response": "1", "gold": "1"})
    file = tmp_path / "c.jsonl"
    seconds = [k / 1000 for k in range(1, 201)]
    random.Random(0).shuffle(seconds)
    clock = iter([time for spent in seconds for time in (5.0, 5.0 + spent)])
    monkeypatch.setattr(checker.time, "perf_counter", lambda: next(clock))
    file.write_text("\n".join([row] * 200))
    assert checker.main([str(file)]) == 0
    said = f"{file}: 200 rows; median 101.000 ms, p99 199.00 ms, longest 200.0 ms\n"
    assert capsys.readouterr().out == said


SPELLINGS = [  # every sign and command beside another way to write what it means
    ("3−1", "2"), ("3–1", "2"), ("2×3", "6"), ("2·3", "6"), ("2⋅3", "6"), ("6÷2", "3"),
    ("√9", "3"), ("2π", r"2\pi"), ("x≤2", r"x\le2"), ("x≥2", r"x\ge2"), ("x≠2", r"x\ne2"),
    ("(2,∞)", "x>2"), ("180°", r"\pi"), ("1±2", "3,-1"), ("a±b∓c", "a+b-c,a-b+c"),
    (r"\{1\}∪\{2\}", r"\{1,2\}"), ("[0,2]∩[1,3]", "[1,2]"), ("x∈[1,2]", "[1,2]"),
    ("∅", r"\{\}"), ("Ø", r"\{\}"), ("θ", r"\theta"), ("α", r"\alpha"), ("β", r"\beta"),
    ("2π≈6.28", r"2\pi"), ("ℝ", r"(-\infty,\infty)"), ("∠A", r"\angle A"),
    (r"x≡4\pmod3", r"x\equiv1\pmod3"), ("x′", "x'"), ("x’", "x'"), ("⟨1,2⟩", "(1,2)"),
    ("½", "0.5"), ("⅓", "1/3"), ("⅔", "2/3"), ("¼", "0.25"), ("¾", "0.75"), ("1½", "1.5"),
    ("2，1", "1,2"), ("2、1", "1,2"), ("1：2", "2:4"), ("（1,2）", "(1,2)"), ("5。", "5"),
    ("μ", r"\mu"), ("1,2,…,n", r"1,2,\dots,n"), ("Ω", r"\Omega"), ("∑_{k=1}^{3} k", "6"),
    (r"∫_0^1 2x\,dx", "1"), ("Δ", r"\Delta"), ("4\u200b2", "42"), ("4\ufe0f", "4"),
    ("4\u20e3", "4"), ("4\u202e2", "42"),
    (r"\dfrac12", "0.5"), (r"\tfrac12", "0.5"), (r"\cfrac12", "0.5"), (r"\dbinom52", "10"),
    (r"\tbinom52", "10"), (r"x\leq2", "2>=x"), (r"x\leqslant2", "2>=x"), ("x<=2", r"2\ge x"),
    (r"x\geq2", "2<=x"), (r"x\geqslant2", "2<=x"), ("x>=2", r"2\le x"), (r"x\neq 2", r"x\ne2"),
    ("x!=2", r"x\ne2"), (r"x\lt 2", "x<2"), (r"x\gt 2", "x>2"), (r"50\%", "0.5"),
    (r"\lvert-3\rvert", "3"), (r"\vert-3\vert", "3"), (r"\|-3\|", "3"), (r"\lVert-3\rVert", "3"),
    (r"\Vert-3\Vert", "3"), (r"\{x\mid x>3\}", "x>3"), (r"2\ast3", "6"), (r"2\cdot3", "6"),
    (r"2\times3", "6"), (r"6\div2", "3"), (r"x>2\land x<5", "(2,5)"), (r"x>2\wedge x<5", "(2,5)"),
    (r"x<2\lor x>5", r"x<2\text{ or }x>5"), (r"x<2\vee x>5", r"x<2\text{ or }x>5"),
    (r"\lbrace1,2\rbrace", r"\{1,2\}"), (r"x\equiv4\mod3", r"x\equiv1\pmod3"),
    (r"x\equiv4\bmod3", r"x\equiv1\pmod3"), (r"[0,3]\backslash[1,3]", "[0,1)"),
    (r"1,\ldots,n", r"1,\dots,n"), (r"1,\cdots,n", r"1,\dots,n"), ("1,...,n", r"1,\dots,n"),
    (r"f\prime(2)", "f'(2)"), (r"\tg\pi", "0"), ("€3", r"\$3"), ("£3", r"\$3"),
    (r"\epsilon", r"\varepsilon"), (r"\phi", r"\varphi"), (r"\varnothing", r"\emptyset"),
    (r"1\colon2", "2:4"), (r"\left\{x\middle|x>3\right\}", "x>3"),
    (r"\sum\limits_{k=1}^3 k", "6"), (r"\sum\nolimits_{k=1}^3 k", "6"),
]  # fmt: skip
SILENT = r"""\displaystyle \textstyle \rm \bf \it \large \Large \LARGE \huge \Huge \small \quad
    \qquad \, \; \: \! \boxed \fbox \underline \boldsymbol \bm \mathcal \mathfrak \mathscr \mathsf
    \therefore \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr"""
UNREAD = "is so we it to of by be he an at do if no as us my up was has not yes are the for"
WORDED = r"\text \textbf \textit \textnormal \textrm \textsf \texttt \mbox \hbox \mathrm \mathbf"


def test_spellings():
    """Each way to write a sign; commands that say nothing."""
    for text, same in SPELLINGS:
        assert_equal(text, same)
    for power, (high, low) in enumerate(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉", strict=True)):
        assert_equal(f"2{high}", str(2**power))
        assert_equal(f"a{low}", f"a_{power}")
    for command in SILENT.split():
        assert_equal(rf"3+{command}(4)", "7")
    for command in WORDED.split():
        assert_equal(rf"3+{command}{{4}}", "7")
    for mark in (r"\vec", r"\hat", r"\tilde"):  # of a letter, of a segment
        assert_equal(rf"{mark}{{v}}+1", "1+v")
        assert_different(rf"{mark}{{AB}}", "AB")
    for factor, product in (
        ("(3)", "6"), ("[3]", "6"), ("{3}", "6"), (r"\frac21", "4"), (r"\sqrt9", "6"),
        (r"\binom52", "20"), (r"\lfloor3.5\rfloor", "6"), (r"\lceil3.5\rceil", "8"), ("|-3|", "6"),
        (r"\sum_{k=1}^3 k", "12"), (r"\prod_{k=1}^3 k", "12"), (r"\int_0^1 2x\,dx", "2"),
        (r"\bar{x}", r"\bar{x}+\bar{x}"), (r"\angle A", r"\angle A+\angle A"),
    ):  # fmt: skip
        assert_equal(f"2{factor}", product)
    assert_equal("[1,2[", "[1,2)")
    assert_equal("]1,2[", "(1,2)")
    assert_equal("(1,2]", "]1,2]")
    assert_equal(r"[1,2[\cup]3,4[", r"[1,2)\cup(3,4)")
    assert_different("[1,2[", "[1,2]")
    assert checker.clean(r"x_1\approx 3") == "x_1= 3"
    for word in UNREAD.split():
        assert is_limit(checker.parse, word), word


def test_tables_of_units():
    """Each beside the base it is measured in; what counts several."""
    for text, same in (
        ("1 mm", "0.001 m"), ("1 cm", "0.01 m"), ("1 km", "1000 metres"), ("1 kg", "1000 g"),
        ("1 inch", "0.0254 m"), ("1 in", "2.54 cm"), ("1 foot", "12 inches"), ("1 ft", "0.3048 m"),
        ("1 yd", "3 feet"), ("1 yard", "0.9144 m"), ("1 mile", "1609.344 m"), ("1 mi", "1760 yd"),
        ("1 lb", "453.59237 g"), ("1 pound", "0.45359237 kg"), ("1 ml", "0.001 L"),
        ("1 liter", "1000 mL"), ("1 litre", "1 l"), ("1 hour", "3600 s"), ("1 hr", "60 min"),
        ("1 sec", "1 second"), ("1 day", "24 h"), ("1 week", "7 days"), ("100 cents", "1 dollar"),
        ("2 usd", r"\$2"), ("1 kilometer", "1000 meters"), ("1 centimeter", "0.01 m"),
        ("1 millimeter", "0.001 m"), ("1 megawatt", "1000 kilowatts"), ("1 MW", "10^6 W"),
        ("1 kJ", "1000 J"), ("1 mA", "0.001 A"), ("1 yr", "1 year"), ("1 mole", "1 mol"),
        ("60 mph", "1 mi/min"), ("5 dozen", "60"), ("3 hundred", "300"), ("2 thousand", "2000"),
        ("2 million", "2000000"), ("2 billion", "2000000000"),
    ):  # fmt: skip
        assert_equal(text, same)
        assert_different("1" + text, same)


NAMED = r"""\alpha \beta \gamma \delta \varepsilon \zeta \eta \theta \vartheta \iota \kappa
    \lambda \mu \nu \xi \rho \sigma \tau \varphi \chi \psi \omega \pi \Gamma \Delta \Theta
    \Lambda \Xi \Pi \Sigma \Phi \Psi \Omega \ell \hbar \partial \nabla \odot x Q \angle{A}
    \triangle{ABC} \overline{AB} \bar{x} \overrightarrow{AB} \dot{x} \ddot{x}
    \overleftarrow{AB}"""


def test_functions_and_letters():
    """Each function at a place where its value is known; each letter in two orders."""
    for text, same in (
        (r"\sin 60\deg", r"\sqrt3/2"), (r"\cos 60\deg", "1/2"), (r"\tan 60\deg", r"\sqrt3"),
        (r"\cot 60\deg", r"1/\sqrt3"), (r"\sec 60\deg", "2"), (r"\csc 30\deg", "2"),
        (r"\arcsin\frac12", r"\pi/6"), (r"\arccos\frac12", r"\pi/3"), (r"\arctan 1", r"\pi/4"),
        (r"\arccot\sqrt3", r"\pi/6"), (r"\arcsec 2", r"\pi/3"), (r"\arccsc 2", r"\pi/6"),
        ("asin(1)", r"\pi/2"), ("acos(0)", r"\pi/2"), ("atan(1)", r"\pi/4"),
        (r"\sinh(\ln 2)", "3/4"), (r"\cosh(\ln 2)", "5/4"), (r"\tanh(\ln 2)", "3/5"),
        (r"\ln(e^2)", "2"), (r"\lg 100", "2"), (r"\log_9 3", "1/2"), (r"\exp(2)", "e^2"),
        ("sqrt(9)", "3"), ("cbrt(-8)", "-2"), ("abs(-3)", "3"), ("floor(-2.5)", "-3"),
        ("ceil(-2.5)", "-2"), (r"\gcd(12,18)", "6"), ("lcm(4,6)", "12"), (r"\max(2,3)", "3"),
        (r"\min(2,3)", "2"), (r"\operatorname{cis}(\pi)", "-1"), ("2pi", r"2\pi"),
        ("(2,inf)", "x>2"), ("(2,infty)", "x>2"), ("(2,infinity)", "x>2"), ("2theta", r"2\theta"),
        ("2alpha", r"2\alpha"), ("2beta", r"2\beta"), ("2gamma", r"2\gamma"),
        ("2lambda", r"2\lambda"), (r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}", "-2"),
    ):  # fmt: skip
        assert_equal(text, same)
    for letter in NAMED.split():
        assert_equal(f"{letter}+1", f"1+{letter}")
        assert_different(f"{letter}+1", f"2+{letter}")


def test_second_looks():
    """What holds beyond the first of something."""
    parts = [(0, 1, "a"), (4, 5, "b"), (10, 11, "c")]
    assert checker._joined("x : y and z", parts) == [(0, 1, "a"), (4, 11, "b, c")]
    import sympy

    pairs = [(p["n"], p["k"]) for p in checker.points([sympy.Symbol("n") + sympy.Symbol("k")])]
    assert pairs[4] == (5, 1 + 31 % 5)
    assert pairs[7] == (1 + 52 % 8, 8)  # every fourth time k leads
    for text, same, other in (
        ("9:05", "9:05 PM", "9:06 PM"),
        ("9:15 AM", "9:15 a.m.", "9:15 p.m."),
        ("x", "x+e^{-500}", "x+e^{-200}"),
        ("x", "x", "x+10^{-30}"),
    ):
        assert_equal(text, same)
        assert_different(text, other)


def test_inequalities_either_way_round():
    """One that bounds a letter beside one that does not."""
    for bound, same, other in (
        ("x<y", "x+1<y+1", "x+1<y"),
        ("x<2y", "x<y+y", "x<y"),
        ("x<2", "x^3<8", "x^3<8.1"),
        (r"x\ge2", r"x^3\ge8", "x^3>8"),
        ("1<x<2", "2<2x<4", "2<2x<5"),
        ("-x<y+1", "x+1>-y", "x+1<-y"),
        ("x<2", "2x<4", r"2x\le4"),
    ):
        assert_equal(bound, same)
        assert_different(bound, other)
    assert_different("x^2<4", "x^2<4.1")
    assert_equal("20°C", "20")
    assert_different("20°C", "20°F")
