r"""Is a model's final answer right? Extraction, and equality of mathematical answers.

    extract_answer(r"... so it is \boxed{\frac12}.")   -> r"\frac12"
    is_equal("0.5", r"\frac{1}{2}")                    -> True
    grade(response, gold)                              -> True if the final answers are the same

    python checker.py cases.jsonl   # rows {"response", "gold", "expect"}: accuracy, errors, times

Answers are LaTeX or plain text. Three stages, each small enough to check by reading:
1. `clean` and `Parser`: text -> a tree of tuples ("num", 3), ("add", a, b), ("tuple", "(", ")",
   items) ... by a hand-written parser. Nothing from the text is ever executed, and no sympy parser
   sees it.
2. `Value`: exact rationals and integers where possible; else numbers at 60 digits (mpmath, sympy's
   arithmetic).
3. `same`: equality in order of cost: text, exact value, structure (tuples, lists, sets, intervals,
   matrices, relations), 60-digit values, and for expressions with letters 60-digit values at four
   fixed random points of both signs, where the real domain decides. Two expressions of limited size
   that agree to 40 digits at four such points are equal for every purpose of grading; a symbolic
   prover after that would add time without bound and no rejection, so there is none.

Limits are checked before work: length, nesting, digits, exponents, and a budget of evaluated nodes
for each question. What exceeds one is compared as normalised text. No signals, threads, processes
or global state: works in any thread and after fork.

Conventions: a bare list has no order, a tuple has; a decimal equals another exact value only if it
gives 10 or more of its digits (3.14 is not pi, 0.33 is not 1/3); units and names ("x =") count only
where both sides have them; 12% is 0.12 (and 12 where only one side says %); a number in base b
equals the same digits in the same base; "exact \approx decimal" means the exact part.
"""

import functools
import json
import re
import sys
import threading
import time
import unicodedata
import zlib
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm
from pathlib import Path

MAX_CHARS = 1500  # of one answer; a longer one is compared as text
MAX_DEPTH = 40  # nested brackets
MAX_DIGITS = 600  # of one number
MAX_BITS = 20_000  # of an exact result
MAX_LOG2 = 100_000  # |log2| of a 60-digit result
MAX_NODES = 4000  # tree nodes evaluated for one question
DIGITS, AGREE = 60, 40  # decimal digits computed, and compared


class Limit(Exception):
    """Too large, or not a form that we read: the answers are compared as text."""


# -------------------------------------------------------------------------------------------------
# The final answer in a response

END_OF_TURN = re.compile(r"<\|(?:im_end|im_start|eot_id|endoftext|end)\|>|</s>")
BOX = re.compile(
    r"\\{1,4}(?:boxed|fbox)\s*(\{)|\\{1,4}(?:boxed|fbox)\s+([^\s{}$\\]+)|\\[{}\\]|([{}])"
)
JOINT = re.compile(
    r"(?:\s|\$|\\[()\[\]]|\\q?quad|\\[,;! ]|\\text\s*\{\s*(?:and|or|,)?\s*\}|and|or|,|;)*"
)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^$]+)\$", re.S)
NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?[$\u20ac\u00a3]?(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)?"
    r"(?:\.\d+|(?<=\d))(?:e[-+]?\d+)?(?::\d+|\s?/\s?\d+)?"
    r"(?:\s?\\?%|\s?percent|\u00b0)?",
    re.I,
)
NO_PROSE = re.compile(
    r"\\[A-Za-z]+|\\text\s*\{[^{}]*\}|a?(?:sin|cos|tan|sqrt|log|ln)|theta|\b(?:pi|and|or|inf(?:inity)?)\b|percent"
)
PROSE = re.compile(r"[A-Za-z]{4}|[A-Za-z]{2,3}\b.*\b[A-Za-z]{2,3}\b|\n.*\n")
STATED = re.compile(r"answer\b\W{0,6}(?:(?:is|are|equals)\b(?:\s*[:=])?|[:=])\s*(\S[^\n]*)", re.I)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of the complete outermost \boxed{}s, in order. One pass over it."""
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []  # None: an ordinary brace
    for m in BOX.finditer(text):
        if m[1]:
            opened.append((m.start(), m.end()))
        elif m[2]:
            found.append((m.start(), m.end(), m[2].rstrip(".,;")))
        elif m[3] == "{":
            opened.append(None)
        elif m[3] == "}" and opened and (box := opened.pop()):
            while found and found[-1][0] > box[0]:  # boxes inside this one
                found.pop()
            found.append((box[0], m.end(), text[box[1] : m.start()].strip()))
    return found


def _sentence(text: str) -> str:
    """The answer at the start of what follows "the answer is": its formulas, or the words to the
    end of the sentence."""
    text = text.replace('\\"', '"').strip('*"\u201c\u201d \t').strip()
    sentence = re.split(r"\.(?:\s|$)", re.sub(r"\*\*", "", text), maxsplit=1)[0]
    formulas = list(FORMULA.finditer(text))
    if formulas and (
        m := re.search(r"\b(?:is|are|equals)\s+(?!.*\$)(.+)$", sentence)
    ):  # the largest $n$ is 34
        return m[1]
    if formulas and formulas[0].start() < len(sentence):
        joined = [formulas[0]]
        while len(joined) < min(20, len(formulas)) and JOINT.fullmatch(
            text[joined[-1].end() : formulas[len(joined)].start()]
        ):
            joined.append(formulas[len(joined)])
        return ", ".join(next(filter(None, m.groups())).strip() for m in joined)
    return re.sub(r"^.*\b(?:is|are|equals)\s+", "", sentence).strip()


def extract_answer(text: str) -> str | None:
    r"""The final answer in a model's text, or None: the last complete \boxed{} (several joined by
    "and" or commas are one list), else "#### x", "the answer is ...", the last formula, the last
    number, in that order. Linear in the length of the text."""
    if cut := END_OF_TURN.search(text, 1):
        text = text[: cut.start()]
    if ("boxed" in text or "fbox" in text) and (boxes := _boxes(text)):
        first = len(boxes) - 1
        while first and len(boxes) - first < 20:
            between = text[boxes[first - 1][1] : boxes[first][0]]
            if (
                len(between) > 60
                or not re.search(r"and|or|,|;", between)
                or not JOINT.fullmatch(between)
            ):
                break
            first -= 1
        return ", ".join(b[2] for b in boxes[first:])
    if (
        (at := text.rfind("####")) >= 0
        and (line := text[at + 4 :].strip().split("\n")[0].strip())
        and re.search(r"\d", line)
    ):
        return line
    tail = text[-20_000:]
    if (stated := list(STATED.finditer(tail))) and (answer := _sentence(stated[-1][1])):
        return answer
    if len(text) <= 200 and not PROSE.search(NO_PROSE.sub("", text)) and text.strip():
        return text.strip()  # nothing but mathematics
    formula = max(FORMULA.finditer(tail), key=re.Match.end, default=None)
    after = tail[formula.end() :] if formula else tail
    numbers = list(NUMBER.finditer(after))
    if numbers and (
        not formula or re.fullmatch(r"[\s.!*]*", after[numbers[-1].end() :])
    ):  # "... $x$ grows by 100%."
        return numbers[-1].group().strip()
    return next(filter(None, formula.groups())).strip() if formula else None


# -------------------------------------------------------------------------------------------------
# Text: one spelling for what means the same

UNICODE = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "√": r"\sqrt ",
    "π": r"\pi ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "≈": r"\approx ",
    "ℝ": r"\mathbb{R}",
    "∠": r"\angle ",
    "≡": r"\equiv ",
    "′": "'",
    "’": "'",
    "€": "",
    "£": "",
    "½": r"\frac12 ",
    "⅓": r"\frac13 ",
    "⅔": r"\frac23 ",
    "¼": r"\frac14 ",
    "¾": r"\frac34 ",
    "\u20e3": "",
    "\ufe0f": "",
    "\u200b": "",
    "\u202e": "",
}  # marks that do not show
UNICODE |= {s: f"^{d}" for d, s in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {
    s: f"_{d}" for d, s in enumerate("₀₁₂₃₄₅₆₇₈₉")
}
TABLE = str.maketrans(UNICODE)
REWRITE = [
    (re.compile(a, re.S), b)
    for a, b in (
        (r"<\|.*", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|rm|bf)(?![A-Za-z])", ""),
        (r"\s*\{\s*([,:.])\s*\}\s*", r"\1"),
        (r"(?<!\\)\\!|\\\$|\$", ""),
        (r"\\q?quad|(?<!\\)\\[,;: ]|~|&nbsp;", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom", r"\\binom"),
        (r"\{([^{}]+)\\choose([^{}]+)\}", r"\\binom{\1}{\2}"),
        (
            r"\\(?:math(?:rm|bf|it|sf|cal|frak)|boldsymbol|bm|vec|hat|overrightarrow|operatorname\*?|textrm|fbox|boxed)\s*\{([^{}]*)\}",
            r"{\1}",
        ),
        (r"\\(?:textbf|textit|textnormal|mbox|textsf)(?![A-Za-z])", r"\\text"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\*\*", "^"),
        (r"\\%|\\text\{\s*%\s*\}|\s*percent(?:age)?\b", "%"),
        (r"\\varnothing|\\\{\s*\\\}|Ø", r"\\emptyset"),
        (r"\\mathbb\s*\{?R\}?|\\Reals?\b|\\R\b", r"\\Reals"),
        (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree|\bdegrees?\b", r"\\deg "),
        (r"\\text\{\s*\\deg\s*\}", r"\\deg "),
        (r"\\[lr]vert|\\mid(?![A-Za-z])|\\\||\\[lr]Vert", "|"),
        (r"\.\s*$", ""),
        (r"[ \t\n]+", " "),
    )
]
WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
]  # fmt: skip
NUMBER_WORDS = {word: str(i) for i, word in enumerate(WORDS)}
SYNONYMS = {
    "dne": "doesnotexist",
    "undefined": "doesnotexist",
    "nosolutions": "nosolution",
    "none": "nosolution",
    "infinity": r"\infty",
}
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")


def _repeating(m: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, cycle = m[1], m[2], m[3]
    if len(whole) + len(fixed) + len(cycle) > 60:
        return m.group()
    bottom = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int((whole + fixed + cycle) or 0) - int((whole + fixed) or 0)}}}{{{bottom}}}"


def clean(s: str) -> str:
    """An answer without what carries no meaning: delimiters, spacing commands, variants of one
    command, digit grouping."""
    s = s.strip()
    if len(s) > 20 * MAX_CHARS:
        return s
    if not s.isascii():
        s = unicodedata.normalize(
            "NFKC", re.sub(r"(?<=\d)(?=[\u00bd\u2153\u2154\u00bc\u00be])", " ", s.translate(TABLE))
        )
    if "\\\\" in s and "\\begin" not in s:
        s = re.sub(r"\\\\(?=[A-Za-z(){}\[\]|,!;:$%])", r"\\", s)  # a doubled escape
    if m := re.fullmatch(r"\\[(\[](.*)\\[)\]]\.?", s, re.S):
        s = m[1]
    s = re.sub(r"(?<=\d)(?:,\\!|\{,\}\\?!?|\\,|\\ )\s*(?=\d{3}(?!\d))", "", s)
    for pattern, replacement in REWRITE:
        s = pattern.sub(replacement, s)
    s = re.sub(r"(?<=[\d}]) *\\?% *", "%", s).strip()
    if re.fullmatch(r"-?\d{1,3}( \d{3})+(\.\d+)?", s):
        s = s.replace(" ", "")
    s = REPEATING.sub(_repeating, s)
    if "\\approx" in s:
        left, _, right = s.partition("\\approx")
        s = (
            right
            if not left.strip()
            else s.replace("\\approx", "=", 1)
            if re.fullmatch(r"[A-Za-z](_\w)?", left.strip())
            else left
        )
    word = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", s).strip().lower()
    return NUMBER_WORDS.get(word, s.strip().rstrip(".;,").strip())


def plain(s: str) -> str:
    """For comparison as text: no spaces, markup or final stop; the case of words (not of single
    letters) ignored."""
    s = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", s) if len(s) <= 20 * MAX_CHARS else s
    s = re.sub(r"[A-Za-z]{2,}", lambda m: m.group().lower(), s)
    s = re.sub(r"[\s{}$\"'\u2018\u201c\u201d]|(?<!\d)\.|\.(?!\d)", "", s)
    s = re.sub(r"^(?:the|an?)(?=[a-z]{3})", "", s) if " " in s else s
    return SYNONYMS.get(s, s)


# -------------------------------------------------------------------------------------------------
# Text -> tree

FUNCTIONS = (
    "arcsin",
    "arccos",
    "arctan",
    "arccot",
    "arcsec",
    "arccsc",
    "sinh",
    "cosh",
    "tanh",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "ln",
    "lg",
    "exp",
    "sqrt",
    "cbrt",
    "abs",
    "floor",
    "ceil",
    "gcd",
    "lcm",
    "max",
    "min",
    "cis",
    "asin",
    "acos",
    "atan",
)
NAMES = ("infinity", "infty", "theta", "alpha", "beta", "gamma", "lambda", "inf", "and", "or", "pi")
WORD = re.compile("|".join(sorted(FUNCTIONS + NAMES, key=len, reverse=True)) + "|[A-Za-z]")
TOKEN = re.compile(
    r"\\begin\{[a-z]*matrix\}|\\begin\{array\}\{[^{}]*\}|\\end\{[a-z]+\}|\\text\s*\{([^{}]*)\}|\\[A-Za-z]+|\\\\|\\.|"
    r"\d+(?:\.\d*)?(?:[eE][-+]?\d{1,4}(?![\dA-Za-z]))?|\.\d+|[A-Za-z]+|[-+*/^_=<>!(){}\[\]|,;:&%'⟨⟩]|\s+|.",
    re.S,
)
RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    r"\le": "<=",
    r"\ge": ">=",
    r"\ne": "!=",
    r"\equiv": "equiv",
    r"\in": "in",
}
LETTER_NAMES = [
    "delta", "epsilon", "varepsilon", "zeta", "eta", "kappa", "mu", "nu", "xi", "rho", "sigma",
    "tau", "phi", "varphi", "chi", "psi", "omega", "Delta", "Omega", "Phi", "ell",
]  # fmt: skip
LETTERS = {"\\" + name for name in LETTER_NAMES}
OPENERS = [
    r"(", r"[", r"{", r"\{", r"\frac", r"\sqrt", r"\binom", r"\langle", r"\lfloor", r"\lceil",
    r"\Reals", r"\emptyset", r"\angle", r"\triangle", r"\overline", r"\bar",
]  # fmt: skip
STARTS = LETTERS | set(OPENERS)
PAIRS = {
    "(": ")",
    "[": ")",
    r"\{": r"\}",
    r"\langle": r"\rangle",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
    "]": "[",
}


def tokenize(s: str) -> list:
    """[(kind, text)]: num, text, word (letters), op (commands and signs)."""
    out = []
    for m in TOKEN.finditer(s):
        t = m.group()
        if m[1] is not None:
            out.append(
                ("op", w)
                if (w := m[1].strip().lower()) in ("and", "or", ",")
                else ("text", m[1].strip())
            )
        elif t[0].isdigit() or t[0] == "." and len(t) > 1:
            out.append(("num", t))
        elif t.isascii() and t.isalpha():
            pieces = WORD.findall(t)
            if any(
                run
                for run in re.findall(r"(?:(?<= )|^)((?:[A-Za-z] ){3,})", " ".join(pieces) + " ")
                if set(run.lower()) & set("eiou")
            ):
                raise Limit  # a word, not a product of letters
            out += [("op", p) if p in ("and", "or") else ("word", p) for p in pieces]
        elif not t.isspace():
            if t == "\\" or (not t.isascii() and t not in "⟨⟩"):
                raise Limit
            out.append(
                ("word", t[1:]) if t[1:] in FUNCTIONS + NAMES and t[0] == "\\" else ("op", t)
            )
    return out


class Parser:
    """Recursive descent over tokens. `sign`: what \\pm means in this reading (+1 or -1)."""

    def __init__(self, text: str, sign: int):
        self.tokens, self.at, self.depth, self.sign, self.bars = tokenize(text), 0, 0, sign, 0

    def peek(self) -> str | None:
        return (
            self.tokens[self.at][1]
            if self.at < len(self.tokens) and self.tokens[self.at][0] != "text"
            else None
        )

    def kind(self) -> str | None:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else None

    def take(self, *expected: str) -> bool:
        if self.kind() in ("op", "word") and self.peek() in expected:
            self.at += 1
            return True
        return False

    def need(self, *expected: str) -> str:
        if not self.take(*expected):
            raise Limit
        return self.tokens[self.at - 1][1]

    def answer(self):
        tree = self.items()
        if self.at < len(self.tokens):
            raise Limit
        return tree

    def items(self, closing: tuple = ()):
        """relation , relation ... -> one tree, or ("list", trees)."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Limit
        found = [self.relation()]
        while self.take(",", ";", "and", "or"):
            while self.take(",", "and", "or"):
                pass
            if self.peek() in closing and closing:
                break
            found.append(self.relation())
        self.depth -= 1
        return found[0] if len(found) == 1 else ("list", *found)

    def relation(self):
        parts, ops = [self.sets()], []
        while self.peek() in RELATIONS and self.kind() == "op":
            ops.append(RELATIONS[self.peek()])
            self.at += 1
            parts.append(self.sets())
        if ops == ["in"]:
            return parts[1] if name(parts[0]) else ("rel", ("in",), *parts)
        if "equiv" in ops:
            self.take("(")
            self.need(r"\pmod", r"\bmod", r"\mod")
            modulus = self.atom()
            self.take(")")
            return ("mod", *parts, modulus)
        if ops and all(op[0] == ">" for op in ops):  # read from left to right: a < b < c
            ops, parts = [op.replace(">", "<") for op in ops[::-1]], parts[::-1]
        return ("rel", tuple(ops), *parts) if ops else parts[0]

    def sets(self):
        tree = self.ratio()
        while self.peek() in (r"\cup", r"\cap", r"\setminus", r"\backslash"):
            op = {"up": "union", "ap": "cap"}.get(self.peek()[-2:], "minus")
            self.at += 1
            tree = (op, tree, self.ratio())
        return tree

    def ratio(self):
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *parts)

    def sum(self):
        terms = []
        while True:
            sign = 1
            while self.peek() in ("+", "-", r"\pm", r"\mp") and self.kind() == "op":
                sign *= {"+": 1, "-": -1, r"\pm": self.sign, r"\mp": -self.sign}[self.peek()]
                self.at += 1
            term = self.product()
            terms.append(term if sign == 1 else ("neg", term))
            if not (self.kind() == "op" and self.peek() in ("+", "-", r"\pm", r"\mp")):
                return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self):
        tree = self.power()
        while True:
            if self.take("*", r"\cdot", r"\times"):
                tree = ("mul", tree, self.signed())
            elif self.take("/", r"\div"):
                tree = ("div", tree, self.signed())
            elif self.starts_factor():
                if self.kind() == "num":  # "2 3" is no product; "1 1/2" is a mixed number
                    raise Limit
                tree = ("mul", tree, self.power())
            else:
                return tree

    def signed(self):
        return (
            ("neg", self.signed())
            if self.take("-")
            else self.signed()
            if self.take("+")
            else self.power()
        )

    def starts_factor(self) -> bool:
        r"""Whether a factor follows without a sign: 2x, x(x+1), 2\pi r."""
        return (
            self.kind() in ("num", "word")
            or self.peek() in STARTS
            or self.peek() == "|"
            and not self.bars
        )

    def power(self):
        tree = self.atom()
        while True:
            if self.take("^"):
                tree = ("pow", tree, self.exponent())
            elif self.take("!"):
                tree = ("fun", "factorial", tree)
            elif self.take("%"):
                tree = ("div", tree, ("num", Fraction(100)))
            elif self.take(r"\deg"):
                tree = ("deg", tree)
            elif self.take("'", r"\prime"):
                tree = ("sym", f"{tree}'")
            else:
                return tree

    def exponent(self):
        """2^{3^2} also where it is written 2^3^2."""
        tree = ("neg", self.atom()) if self.take("-") else self.atom()
        return ("pow", tree, self.exponent()) if self.take("^") else tree

    def group(self):
        """{...} or one token: the argument of \\frac, \\sqrt, ^, _."""
        if self.take("{"):
            tree = self.items(("}",))
            self.need("}")
            return tree
        if (
            self.kind() == "num" and len(self.peek()) > 1 and self.peek().isdigit()
        ):  # \frac12, x^23: one digit
            digits = self.peek()
            self.tokens[self.at : self.at + 1] = [("num", digits[0]), ("num", digits[1:])]
        return self.atom()

    def number(self, text: str):
        if len(text) > MAX_DIGITS:
            raise Limit
        if self.take("_"):
            base = self.group()
            if base[0] == "num" and base[1] == 10:
                return ("num", Fraction(text))
            return ("based", text, base)
        value = Fraction(text.rstrip("."))
        if "." in text.rstrip(".") or "e" in text.lower():
            return ("dec", value, len(re.sub(r"[eE].*|\.", "", text).lstrip("0")), _ulp(text))
        if self.peek() == r"\frac" or self.kind() == "num":  # a mixed number: 3\frac12, 3 1/2
            start = self.at
            if self.kind() == "num":
                top = self.peek()
                self.at += 1
                if (
                    self.take("/")
                    and self.kind() == "num"
                    and top.isdigit()
                    and self.peek().isdigit()
                    and int(self.peek())
                ):
                    self.at += 1
                    return ("num", value + Fraction(int(top), int(self.tokens[self.at - 1][1])))
            else:
                fraction = self.atom()
                if (
                    fraction[1][0] == fraction[2][0] == "num"
                    and 0 < fraction[1][1] < fraction[2][1]
                ):
                    return ("num", value + fraction[1][1] / fraction[2][1])
            self.at = start
        return ("num", value)

    def atom(self):
        if self.kind() in (None, "text"):
            if self.kind() == "text":
                self.at += 1
                return ("text", plain(self.tokens[self.at - 1][1]))
            raise Limit
        kind, t = self.tokens[self.at]
        self.at += 1
        if kind == "num":
            return self.number(t)
        if kind == "word":
            return self.function(t) if t in FUNCTIONS else self.symbol(t)
        if t in (r"\frac", r"\binom"):
            top = self.group()
            return (
                ("div", top, self.group())
                if t == r"\frac"
                else ("fun", "binomial", top, self.group())
            )
        if t == r"\sqrt":
            return self.root()
        if t == "|":
            self.bars += 1
            tree = self.items(("|",))
            self.need("|")
            self.bars -= 1
            return ("fun", "abs", tree)
        if t == "{":
            self.at -= 1
            return self.group()
        if t in PAIRS or t == "⟨":
            tree = self.bracket(t)
            if tree[0] == "num" and tree[1].denominator == 1 and self.take("_"):
                return ("based", str(tree[1]), self.group())
            return tree
        if t.startswith(r"\begin"):
            return self.matrix(t)
        if t in (r"\emptyset", r"\Reals"):
            return (
                ("set",)
                if t == r"\emptyset"
                else ("tuple", "(", ")", ("neg", ("const", "inf")), ("const", "inf"))
            )
        if t in (r"\angle", r"\triangle", r"\overline", r"\bar"):
            return ("sym", f"{t}{self.group()}")
        if t in LETTERS:
            return self.symbol(t[1:])
        raise Limit

    def symbol(self, t: str):
        if self.take("_"):
            t += f"_{self.group()}"
        elif t in ("pi", "e", "i"):
            return ("const", t)
        elif t in ("infty", "infinity", "inf"):
            return ("const", "inf")
        following = [
            x for _, x in self.tokens[self.at : self.at + 3]
        ]  # f(x + 1), V(t), I(0) are values of functions; x(x + 1) is a product
        if following[:1] == ["("] and (
            t in "fgh" or following[2:] == [")"] and (t.isupper() or following[1] in ("t", "0"))
        ):
            self.at += 1
            return ("sym", f"{t}{self.bracket('(')}")
        return ("sym", t)

    def function(self, f: str):
        f = {"lg": "log", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(f, f)
        if f == "sqrt":
            return self.root()
        base = power = None
        while self.peek() in ("_", "^"):
            if self.take("_"):
                base = self.group()
            elif self.take("^"):
                power = self.group()
        if self.take("("):
            argument = self.bracket("(")
        else:  # \sin 2x: the factors up to the next sign or function
            argument = ("neg", self.power()) if self.take("-") else self.power()
            while (
                self.starts_factor()
                and self.kind() != "num"
                and self.peek() not in (*FUNCTIONS, "(", "|")
            ):
                argument = ("mul", argument, self.power())
        if power == ("neg", ("num", Fraction(1))) and f in ("sin", "cos", "tan"):
            f, power = "arc" + f, None
        arguments = argument[3:] if argument[0] == "tuple" else (argument,)
        tree = ("fun", f, *arguments) if base is None else ("fun", "log", argument, base)
        return ("pow", tree, power) if power else tree

    def root(self):
        index = None
        if self.take("["):
            index = self.items(("]",))
            self.need("]")
        radicand = self.bracket("(") if self.take("(") else self.group()
        return ("pow", radicand, ("div", ("num", Fraction(1)), index or ("num", Fraction(2))))

    def bracket(self, opening: str):
        ends = {"(": (")", "]"), "[": ("]", ")", "["), "]": ("[", "]"), "⟨": ("⟩",)}.get(
            opening, (PAIRS.get(opening),)
        )
        bars, self.bars = self.bars, 0
        tree = self.items(ends)
        closing = self.need(*ends)
        self.bars = bars
        if opening in (r"\lfloor", r"\lceil"):
            return ("fun", "floor" if opening == r"\lfloor" else "ceil", tree)
        items = tree[1:] if tree[0] == "list" else (tree,)
        if opening == r"\{":
            return ("set", *items)
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return tree
        if opening in (r"\langle", "⟨"):
            opening, closing = "(", ")"
        return (
            "tuple",
            "(" if opening == "]" else opening,
            ")" if closing == "[" else closing,
            *items,
        )

    def matrix(self, begin: str):
        rows, row = [], []
        while True:
            row.append(self.relation())
            if self.take("&"):
                continue
            rows.append(tuple(row))
            row = []
            if self.take(r"\\") and not (self.peek() or "").startswith(r"\end"):
                continue
            self.at += 1
            if self.at > len(self.tokens) or not self.tokens[self.at - 1][1].startswith(r"\end"):
                raise Limit
            if begin == r"\begin{vmatrix}" or any(len(r) != len(rows[0]) for r in rows):
                raise Limit
            return ("matrix", *rows)


def _ulp(text: str) -> Fraction:
    """The weight of a decimal's last digit."""
    mantissa, _, exponent = text.lower().partition("e")
    return Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


@functools.lru_cache(4096)
def parse(s: str):
    """Tree of an answer. Raises Limit where it is too large or not mathematics that we read."""
    if len(s) > MAX_CHARS:
        raise Limit
    try:
        if "\\pm" not in s and "\\mp" not in s:
            return Parser(s, 1).answer()
        both = [Parser(s, sign).answer() for sign in (1, -1)]
    except (IndexError, ValueError, ZeroDivisionError, RecursionError):
        raise Limit from None
    items = [(t[1:] if t[0] == "list" else (t,)) for t in both]
    return ("list", *items[0], *(t for t in items[1] if t not in items[0]))


# -------------------------------------------------------------------------------------------------
# Values


def name(tree) -> bool:
    """A left side that only names the value: x, f(x), AB, (p, q), S_1 : S_2, \\frac{NO}{BO}."""
    return (
        tree[0] in ("sym", "text")
        or tree == ("const", "i")
        or tree == ("const", "e")
        or (tree[0] in ("mul", "div", "ratio") and all(name(t) for t in tree[1:]))
        or tree[0] == "tuple"
        and all(name(t) for t in tree[3:])
        or (tree[0] == "fun" and tree[1] == "abs" and name(tree[2]))
    )


@functools.lru_cache(4096)
def symbols(tree) -> frozenset:
    if not isinstance(tree, tuple) or not tree:
        return frozenset()
    if tree[0] == "sym":
        return frozenset([tree[1]])
    return frozenset().union(*(symbols(t) for t in tree if isinstance(t, tuple)))


def contains(tree, head: tuple) -> bool:
    """Whether a node of the tree begins like `head`."""
    return tree[: len(head)] == head or any(contains(t, head) for t in tree if isinstance(t, tuple))


_local = threading.local()


def _mp():
    """This thread's own arithmetic at DIGITS digits (threads share mpmath's global context)."""
    if not hasattr(_local, "mp"):
        from mpmath.ctx_mp import MPContext

        _local.mp = MPContext()
        _local.mp.dps = DIGITS
    return _local.mp


def real(v):
    """A Fraction as a 60-digit number; other values as they are."""
    return _mp().mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v


def close(a, b) -> bool:
    """Equal: exactly for two rationals, else to 40 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp, a, b = _mp(), real(a), real(b)
    if mp.isinf(a) or mp.isinf(b):
        return a == b
    return abs(a - b) <= mp.mpf(10) ** -AGREE * max(abs(a), abs(b), mp.mpf(10) ** -15)


def rational(op: str, args: list[Fraction]) -> Fraction | None:
    """An operation on rationals where its result is one. Raises Limit, ZeroDivisionError."""
    whole = all(a.denominator == 1 for a in args)
    match op, args:
        case "neg", [x]:
            return -x
        case "add", _:
            return sum(args, Fraction())
        case "mul", [x, y]:
            return x * y
        case "div", [x, y]:
            return x / y
        case "pow", [x, y] if y.denominator == 1:
            if abs(y) * max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
                raise Limit
            return x ** int(y)
        case "pow", [x, y] if y.denominator == 2 and x >= 0:
            root = Fraction(isqrt(x.numerator), isqrt(x.denominator))
            return rational("pow", [root, 2 * y]) if root * root == x else None
        case "abs", [x]:
            return abs(x)
        case "floor", [x]:
            return Fraction(x.__floor__())
        case "ceil", [x]:
            return Fraction(x.__ceil__())
        case "max" | "min", _:
            return (max if op == "max" else min)(args)
        case "gcd" | "lcm", _ if whole:
            return Fraction((gcd if op == "gcd" else lcm)(*map(int, args)))
        case "factorial", [n] if whole and n >= 0:
            if n > 1500:
                raise Limit
            return Fraction(factorial(int(n)))
        case "binomial", [n, k] if whole and n >= 0 and k >= 0:
            if n > 5000:
                raise Limit
            return Fraction(comb(int(n), int(k)))
    return None


class Value:
    """Evaluates trees at a point {symbol: Fraction}, on a budget of nodes: exactly where the result
    is rational, else to 60 digits. log10: what a bare \\log means."""

    def __init__(self, budget: list[int], point: dict, log10: bool = False):
        self.budget, self.point, self.log10, self.mp = budget, point, log10, _mp()

    def __call__(self, tree):
        """A Fraction, a finite mpf or mpc, or +-inf. Raises Limit, ZeroDivisionError."""
        self.budget[0] -= 1
        if self.budget[0] < 0:
            raise Limit
        mp, op = self.mp, tree[0]
        if op in ("num", "dec"):
            return tree[1]
        if op == "sym":
            return self.point[tree[1]]
        if op == "const":
            return {"pi": mp.pi, "e": mp.e, "i": mp.j, "inf": mp.inf}[tree[1]] * 1
        if op not in ("neg", "add", "mul", "div", "pow", "deg", "fun"):
            raise Limit
        args = [self(t) for t in tree[1 + (op == "fun") :]]
        op = tree[1] if op == "fun" else op
        if all(isinstance(a, Fraction) for a in args):
            try:
                if (value := rational(op, args)) is not None:
                    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
                        raise Limit
                    return value
            except Limit:
                if not self.point:  # a constant is compared exactly or not at all
                    raise
        value = self.number(op, [real(a) for a in args], args)
        if mp.isnan(value) or (op != "neg" and mp.isinf(value)):
            raise Limit
        if isinstance(value, mp.mpc) and abs(value.imag) < abs(value.real) * mp.mpf(10) ** (
            5 - DIGITS
        ):
            value = value.real
        return value

    def number(self, op: str, args: list, given: list):
        """The operation on 60-digit numbers; `given` are the same with their exact values."""
        mp, x, y = self.mp, args[0], args[-1]
        if op in ("add", "mul", "div", "neg"):
            return (
                mp.fsum(args)
                if op == "add"
                else x * y
                if op == "mul"
                else x / y
                if op == "div"
                else -x
            )
        if op == "pow":
            if x == 0:
                if isinstance(y, mp.mpc) or y < 0:
                    raise ZeroDivisionError
                return mp.mpf(y == 0)
            if abs(y) * (abs(mp.log(abs(x), 2)) + 1) > MAX_LOG2:
                raise Limit
            if (
                isinstance(x, mp.mpf)
                and x < 0
                and isinstance(q := given[1], Fraction)
                and q.denominator % 2
                and q.denominator > 1
            ):
                return (-1) ** q.numerator * (-x) ** y  # the real root
            return x**y
        if abs(x) > (
            MAX_LOG2 / 2 if op in ("exp", "cis", "sinh", "cosh", "tanh") else mp.mpf(10) ** 30
        ):
            raise Limit
        if op == "log":
            return mp.log(x) / (mp.log(y) if len(args) == 2 else mp.log(10) if self.log10 else 1)
        if op in ("abs", "cis", "deg"):
            return abs(x) if op == "abs" else mp.expj(x) if op == "cis" else x * mp.pi / 180
        plain_real = all(isinstance(a, mp.mpf) and abs(a) < 1000 for a in args)
        if op in ("floor", "ceil", "max", "min", "factorial", "binomial", "cbrt"):
            if not plain_real:
                raise Limit
            return {
                "floor": mp.floor,
                "ceil": mp.ceil,
                "max": max,
                "min": min,
                "factorial": mp.factorial,
                "binomial": mp.binomial,
                "cbrt": lambda a: mp.sign(a) * mp.cbrt(abs(a)),
            }[op](*args)
        if len(args) > 1 or op not in FUNCTIONS:
            raise Limit
        return getattr(mp, op.replace("arc", "a"))(x)


def _points(names: list[str]) -> list[dict]:
    """Four fixed points: two positive, two of both signs. Letters that count (n, k, m) are whole
    numbers."""
    points = []
    for j in range(4):
        seeds = {s: zlib.crc32(f"{s}/{j}".encode()) for s in names}
        points.append(
            {
                s: Fraction(3 + seed % 37)
                if s in ("n", "k", "m", "N")
                else Fraction(seed % 9973 + 570, 3989)
                * (-1 if j >= 2 and (seed >> 16) % 2 == j % 2 else 1)
                for s, seed in seeds.items()
            }
        )
    return points


# -------------------------------------------------------------------------------------------------
# Equality of trees

STRUCTURES = (
    "tuple",
    "list",
    "set",
    "union",
    "cap",
    "minus",
    "matrix",
    "rel",
    "mod",
    "ratio",
    "based",
    "text",
)


class Same:
    """Equality of two trees, on one budget of evaluated nodes."""

    def __init__(self):
        self.budget = [MAX_NODES]

    def __call__(self, a, b) -> bool:
        if a == b:
            return True
        for x, y in ((a, b), (b, a)):
            if (
                x[0] == "rel" and set(x[1]) == {"="} and not (y[0] == "rel" and "=" in y[1])
            ):  # x = 5 against 5
                return (
                    (name(x[2]) and self(x[-1], y))
                    or (name(x[-1]) and len(x) == 4 and self(x[2], y))
                    or (
                        not symbols(x)
                        and x[2][0] not in STRUCTURES
                        and all(self.scalars(x[2], t) for t in x[3:])
                        and self(x[-1], y)
                    )
                )
        kinds = {a[0], b[0]}
        if kinds == {"rel"} and set(a[1]) == set(b[1]) == {"="}:
            return self.equations(a, b)
        if kinds & {"list"} and any(
            t[0] == "rel" and t[1] != ("=",) for x in (a, b) if x[0] == "list" for t in x[1:]
        ):
            return self.regions(a, b)
        if kinds <= {"list", "set"}:
            return self.unordered(a[1:], b[1:])
        for x, y in ((a, b), (b, a)):
            if (
                x[0] in ("list", "set") and len(x) > 1 and y[0] not in STRUCTURES
            ):  # {5}, or one value said twice
                return all(self(t, y) for t in x[1:])
        if kinds & {"list"}:
            return False
        if a[0] == b[0] == "matrix":
            return len(a) == len(b) and all(
                len(r) == len(s) and all(map(self, r, s)) for r, s in zip(a[1:], b[1:], strict=True)
            )
        for x, y in ((a, b), (b, a)):
            if x[0] == "matrix" and y[0] == "tuple":  # a vector as a column or a row
                entries = [t for row in x[1:] for t in row]
                return (
                    y[1:3] == ("(", ")")
                    and 1 in (len(x) - 1, len(x[1]))
                    and len(entries) == len(y) - 3
                    and all(map(self, entries, y[3:]))
                )
        if a[0] == b[0] == "tuple" and a[1:3] == b[1:3]:
            return len(a) == len(b) and all(map(self, a[3:], b[3:]))
        if a[0] == b[0] == "mod":
            return self(a[1], b[1]) and self.scalars(a[3], b[3]) and self.congruent(a, b)
        if a[0] == b[0] == "ratio":
            clock = [
                len(x) == 3 and len(x[2]) == 2 and x[2][0] == "num" and 10 <= x[2][1] < 60
                for x in (a, b)
            ]
            return len(a) == len(b) and (
                all(map(self.scalars, a[1:], b[1:]))
                or not all(clock)
                and all(
                    self.scalars(("mul", a[1], y), ("mul", b[1], x))
                    for x, y in zip(a[2:], b[2:], strict=True)
                )
            )
        if "ratio" in kinds:
            x, y = (a, b) if a[0] == "ratio" else (b, a)
            return len(x) == 3 and y[0] == "div" and self.scalars(("div", x[1], x[2]), y)
        if kinds & {"tuple", "union", "cap", "minus", "set", "rel"}:
            return self.regions(a, b)
        if kinds & set(STRUCTURES):
            return False
        return self.scalars(a, b)

    def unordered(self, xs, ys) -> bool:
        """Equal as sets: every item has its partner on the other side."""
        return all(any(self(x, y) for y in ys) for x in xs) and all(
            any(self(x, y) for x in xs) for y in ys
        )

    def equations(self, a, b) -> bool:
        if name(a[2]) and name(b[2]) and a[2] == b[2] and self(a[-1], b[-1]):
            return True
        if any(
            len(x) != 4 or x[2][0] in STRUCTURES or x[3][0] in STRUCTURES for x in (a, b)
        ) or symbols(a) != symbols(b):
            return False
        f, g = (
            ("add", x[2], ("neg", x[3])) for x in (a, b)
        )  # f = 0 and g = 0 are the same curve if f / g is a constant
        values = [
            (Value(self.budget, p)(f), Value(self.budget, p)(g))
            for p in _points(sorted(symbols(a)))
        ]
        return all(v[0] != 0 and v[1] != 0 for v in values) and all(
            close(values[0][0] * g, values[0][1] * f) for f, g in values[1:]
        )

    def congruent(self, a, b) -> bool:
        r, q, modulus = (Value(self.budget, {})(t) for t in (a[2], b[2], a[3]))
        return modulus > 0 and (r - q) % modulus == 0

    # Sets of reals: intervals, unions, differences, inequalities. Two are equal if they agree at
    # every end point, between and beyond.

    def regions(self, a, b) -> bool:
        names = [set(self.variables(x)) for x in (a, b)]
        if a[0] == b[0] == "rel" and not (
            len(names[0]) == len(names[1]) == 1 and names[0] == names[1]
        ):  # between expressions or several letters
            return (
                self.inequality(a, b)
                or a[1] == b[1]
                and len(a) == len(b)
                and all(map(self, a[2:], b[2:]))
            )
        if names[0] and names[1] and names[0] != names[1]:
            return False
        if max(map(len, names)) > 1 or any(symbols(t) for x in (a, b) for t in self.ends(x)):
            if a[0] == b[0]:
                return (
                    self.inequality(a, b)
                    if a[0] == "rel"
                    else a[0] in ("union", "cap") and self.unordered(a[1:], b[1:])
                )
            x, y = (a, b) if b[0] == "tuple" else (b, a)  # a < x < b
            return (
                x[0] == "rel"
                and len(x) == 5
                and set(x[1]) <= {"<", "<="}
                and y[0] == "tuple"
                and y[1:3] == ("(["[x[1][0] == "<="], ")]"[x[1][1] == "<="])
                and self(x[2], y[3])
                and self(x[4], y[4])
            )
        mp, value = _mp(), Value(self.budget, {})
        ends = sorted(
            {v for x in (a, b) for t in self.ends(x) if isinstance(v := real(value(t)), mp.mpf)}
        )
        finite = []
        for v in ends:
            if not mp.isinf(v) and not (finite and close(v, finite[-1])):
                finite.append(v)
        if not finite:
            probes = [mp.mpf(0)]
        else:
            probes = [
                finite[0] - 1,
                *finite,
                *((u + v) / 2 for u, v in zip(finite, finite[1:], strict=False)),
                finite[-1] + 1,
            ]
        return all(self.inside(a, p) == self.inside(b, p) for p in probes)

    def variables(self, tree) -> list:
        """The unknowns of inequalities in the tree."""
        if tree[0] == "rel":
            return [t for t in tree[2:] if name(t)]
        return (
            [v for t in tree[1:] if isinstance(t, tuple) for v in self.variables(t)]
            if tree[0] in ("list", "union", "cap", "minus")
            else []
        )

    def ends(self, tree) -> list:
        if tree[0] == "tuple" and len(tree) == 5:
            return list(tree[3:])
        if tree[0] == "rel" and "equiv" not in tree[1]:
            if not any(name(t) for t in tree[2:]):
                raise Limit
            return [t for t in tree[2:] if not name(t)]
        if tree[0] in ("union", "cap", "minus", "set", "list"):
            return [e for t in tree[1:] for e in (self.ends(t) if tree[0] != "set" else [t])]
        raise Limit

    def inside(self, tree, p) -> bool:
        op, evaluate = tree[0], Value(self.budget, {})
        value = lambda t: real(evaluate(t))  # noqa: E731
        if op == "tuple":
            low, high = value(tree[3]), value(tree[4])
            if low > high:
                raise Limit  # a pair, not an interval
            return (
                (low < p or tree[1] == "[" and close(low, p))
                and (p < high or tree[2] == "]" and close(high, p))
                and not (tree[1] == "(" and close(low, p))
                and not (tree[2] == ")" and close(high, p))
            )
        if op == "set":
            return any(close(value(t), p) for t in tree[1:])
        if op in ("union", "list"):
            return any(self.inside(t, p) for t in tree[1:])
        if op in ("cap", "minus"):
            return self.inside(tree[1], p) and self.inside(tree[2], p) == (op == "cap")
        values = [p if name(t) else value(t) for t in tree[2:]]
        for relation, x, y in zip(tree[1], values, values[1:], strict=False):
            equal = close(x, y)
            if not {
                "=": equal,
                "!=": not equal,
                "<": x < y and not equal,
                ">": x > y and not equal,
                "<=": x < y or equal,
                ">=": x > y or equal,
            }[relation]:
                return False
        return True

    def inequality(self, a, b) -> bool:
        """2x + 3y < 6 and 4x + 6y < 12: the same up to a positive factor."""
        if len(a) != 4 or len(b) != 4 or symbols(a) != symbols(b):
            return False
        signs = [{"<": 1, ">": -1}.get(x[1][0][0], 0) for x in (a, b)]
        if 0 in signs or a[1][0][1:] != b[1][0][1:]:
            return False
        f, g = (("add", x[2], ("neg", x[3])) for x in (a, b))
        values = [
            (signs[0] * Value(self.budget, p)(f), signs[1] * Value(self.budget, p)(g))
            for p in _points(sorted(symbols(a)))
        ]
        return all(f * g > 0 for f, g in values) and all(
            close(values[0][0] * g, values[0][1] * f) for f, g in values[1:]
        )

    def scalars(self, a, b) -> bool:
        if any(x[0] in STRUCTURES for x in (a, b)):
            return self(a, b) if all(x[0] in STRUCTURES for x in (a, b)) else False
        for d, other in ((a, b), (b, a)):  # a decimal against another exact value
            inner = d[1] if d[0] == "neg" else d
            if (
                inner[0] == "dec"
                and not symbols(other)
                and other[0] != "dec"
                and (other[0] != "neg" or other[1][0] != "dec")
            ):
                value = Value(self.budget, {})
                x, y = value(d), value(other)
                if x == y or inner[2] < 10:
                    return isinstance(y, Fraction) and x == y
                return (
                    abs(x - y) < inner[3]
                    if isinstance(y, Fraction)
                    else abs(real(x) - y) < real(inner[3])
                )
        return (
            self.agree(a, b, False)
            or contains(("add", a, b), ("fun", "log"))
            and self.agree(a, b, True)
        )

    def agree(self, a, b, log10: bool) -> bool:
        """Equal at the points where both are real; at all of them where neither side stays real or
        i occurs."""
        mp, anywhere, compared = _mp(), contains(("add", a, b), ("const", "i")), 0
        names = sorted(symbols(a) | symbols(b))
        pairs = []
        for point in _points(names)[: 4 if names else 1]:
            value = Value(self.budget, point, log10)
            try:
                pairs.append((value(a), value(b)))
            except ZeroDivisionError:
                continue
            if anywhere or not names or not any(isinstance(v, mp.mpc) for v in pairs[-1]):
                compared += 1
                if not close(*pairs[-1]):
                    return False
        return compared > 0 or bool(pairs) and all(close(*p) for p in pairs)


# -------------------------------------------------------------------------------------------------
# Equality of answers

UNIT = re.compile(
    r"(?:(?<=[\d})!.\]])|(?<=\\pi))\s*((?:\\deg|%|\\text\s*\{[^{}]*\}|\b(?:cm|mm|km|kg|ft|mi|lbs?|hrs?|mph|[mMgsL](?=$))\b|"
    r"(?<![A-Za-z\\])(?!and\b|or\b|pi\b|sqrt|sin|cos|tan|log)[A-Za-z]{3,}\b|[/. ]|\^\{?[23]\}?)+)$"
)
UNIT_WORDS = [
    (re.compile(a), b)
    for a, b in (
        (r"meters?|metres?", "m"),
        (r"centim", "cm"),
        (r"seconds?|sec\b", "s"),
        (r"hours?|hrs?\b", "h"),
        (r"minutes?|mins?\b", "min"),
        (r"\bper\b", "/"),
        (r"squared?|sq", "^2"),
        (r"inch(?:es)?", "in"),
        (r"f(?:ee|oo)t", "ft"),
        (r"(?<=[a-z]{3})s\b", ""),
        (r"[\s{}.]|text|\\", ""),
    )
]


def split_unit(s: str) -> tuple[str, str]:
    """("25", "cm"): the number and what is measured."""
    m = UNIT.search(s)
    if not m or not m[1].strip(" ./"):
        return s, ""
    if re.fullmatch(r"\s*[mMgsL]\s*", m[1]) and not s[: m.start(1)].endswith(" "):
        return s, ""  # 2m is a product
    unit = m[1].lower()
    for pattern, replacement in UNIT_WORDS:
        unit = pattern.sub(replacement, unit)
    return s[: m.start(1)].strip(), unit


def _choice(s: str) -> str | None:
    """The letter of "(C)", "C", "C.", "(C) 12"."""
    m = re.match(
        r"\(?([A-J])(?:\)|[.:](?=\s|$)|$)(?!\s*(?:[-+*/^=(,&]|and\b|or\b))",
        re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", s).strip(),
    )
    return m[1] if m else None


def _compare(p: str, g: str) -> bool:
    """Equality of two cleaned strings as mathematics, thousands separators read both ways."""
    readings = []
    for s, other in ((p, g), (g, p)):
        grouped = THOUSANDS.search(s)
        forms = {THOUSANDS.sub(lambda m: m.group().replace(",", ""), s)} if grouped else {s}
        if grouped and (
            re.search(r"[(\[]|\\\{", s)
            or not THOUSANDS.search(other)
            and "," in other
            and not re.search(r",0\d\d", s)
        ):
            forms.add(s)
        readings.append(forms)
    for x in readings[0]:
        for y in readings[1]:
            try:
                if Same()(parse(x), parse(y)):
                    return True
            except (
                Limit,
                ZeroDivisionError,
                ArithmeticError,
                ValueError,
                TypeError,
                KeyError,
                RecursionError,
                MemoryError,
            ):
                pass
    return False


def is_equal(prediction: str, gold: str) -> bool:
    """Whether two answers are the same. Symmetric but for multiple choice, where the gold is the
    letter. Never raises."""
    p, g = clean(prediction), clean(gold)
    if not p or not g:
        return False
    if p == g:
        return True
    same_text = plain(p) == plain(g) != ""
    if len(p) > MAX_CHARS or len(g) > MAX_CHARS:
        return same_text
    if any(
        re.search(r"\\\$|[€£]", x) and re.search(r"%|percent", y)
        for x, y in ((prediction, gold), (gold, prediction))
    ):
        return False  # dollars are no percent
    if (letter := _choice(g)) and len(plain(g).strip("()")) == 1 and _choice(p) == letter:
        return True
    if same_text or _compare(p, g):
        return True
    (pv, pu), (gv, gu) = split_unit(p), split_unit(g)
    units_fit = bool(pu) != bool(gu) or (pu and pu == gu)
    if units_fit and pv and gv and (pv == gv or _compare(pv, gv)):
        return True
    if "text" in p + g or not re.search(r"\d|\\", p + g):  # names in any order
        parts = [
            sorted(
                plain(t)
                for t in re.split(r",|;|\band\b|\bor\b", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", s))
                if t.strip()
            )
            for s in (p, g)
        ]
        return parts[0] == parts[1] and len(parts[0]) > 1
    return False


def _gold(gold: str) -> str:
    """A gold answer may come as a whole solution."""
    if (
        "\\boxed" in gold
        or "\\fbox" in gold
        or "####" in gold
        or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{4,}", gold[:5000])) > 10
    ):
        return extract_answer(gold) or gold
    return gold


def grade(response: str, gold: str) -> bool:
    """Whether the final answer of a model's response equals the gold answer. Never raises."""
    answer = extract_answer(response)
    if answer is None:
        answer = response if len(response) <= MAX_CHARS else ""
    return is_equal(answer, _gold(gold))


# -------------------------------------------------------------------------------------------------


def main(paths: list[str]) -> int:
    if not paths or paths[0] in ("-h", "--help"):
        print(
            "usage: python checker.py CASES.jsonl ...   "
            "rows with response, gold and, to count errors, expect (true or false)"
        )
        return 0 if paths else 2
    for path in paths:
        try:
            rows = [
                json.loads(line)
                for line in Path(path).read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
            if missing := {"response", "gold"} - set.intersection(*(set(r) for r in rows)):
                raise ValueError(f"rows without {' and '.join(sorted(missing))}")
        except (OSError, ValueError, TypeError) as e:
            print(
                f"checker.py: {path}: {str(e).splitlines()[0] if str(e) else 'no rows'}",
                file=sys.stderr,
            )
            return 2
        times, wrong = [], []
        for row in rows:
            start = time.perf_counter()
            verdict = grade(row["response"], row["gold"])
            times.append(time.perf_counter() - start)
            if "expect" in row and verdict != row["expect"]:
                wrong.append((row, verdict))
        for row, verdict in wrong:
            print(
                f"{'false accept' if verdict else 'false reject'} {row.get('id', '')}: "
                f"{row['gold'][:100]!r} against {(extract_answer(row['response']) or '')[:100]!r}"
            )
        times.sort()
        report = f"{path}: {len(rows)} rows; "
        if judged := sum("expect" in r for r in rows):
            accepts = sum(v for _, v in wrong)
            report += (
                f"{100 * (1 - len(wrong) / judged):.2f}% right, {accepts} false accepts, "
                f"{len(wrong) - accepts} false rejects; "
            )
        median, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
        print(
            f"{report}median {1e3 * median:.3f} ms, p99 {1e3 * p99:.2f} ms, "
            f"longest {1e3 * times[-1]:.1f} ms"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
