r"""Is a model's final answer right? Extraction, and equality of mathematical answers.

    extract_answer(r"... so it is \boxed{\frac12}.")   -> r"\frac12"
    is_equal("0.5", r"\frac{1}{2}")                    -> True
    grade(response, gold)                              -> True if the final answers are the same

    python checker.py cases.jsonl   # rows {"response", "gold", "expect"}: accuracy, errors, times

Five sections: extraction, text, tokens and parser, values, comparison. Both answers become trees
of tuples ("num", 3), ("add", a, b) by a parser of our own; nothing from a text is executed. Two
readable answers are equal if the mathematics says so and for no other reason; text decides only
where one of them cannot be read.

Trees become sympy's objects node by node, within limits of size; a rational difference decides, and
what sampling finds equal must not be another polynomial than 0. Our own, as sympy is unsafe or far
too slow there (sympy 1.14): the values of functions (mpmath in contexts of each thread: `evalf`
uses a precision that threads share, and nested functions ask sympy's assumptions without a bound),
expressions with letters (sampled: `simplify` has no bound and does not prove all identities), sets
of reals (compared at and between their ends: a `Union` of 20 intervals takes 92 ms).

Every limit comes before the work: characters, nesting, digits, exponents, evaluated nodes. No
signals, clocks, processes or caches; any object is a valid argument; works in any thread.
Conventions: docs/checker.md.
"""

import json
import re
import sys
import threading
import time
import unicodedata
import zlib
from fractions import Fraction
from functools import partial
from itertools import product
from math import gcd, isqrt, lcm, prod
from pathlib import Path

MAX_RESPONSE = 20_000  # characters at the end of a response where boxes are sought
MAX_TAIL = 5_000  # where other endings are
MAX_CHARS = 1500  # of one answer; a longer one is compared as text
MAX_DEPTH = 40  # nested brackets
MAX_DIGITS = 600  # of one number
MAX_BITS = 40_000  # of an exact result
MAX_LOG2 = 100_000  # |log2| of a floating-point result
MAX_NODES = 3000  # tree nodes evaluated for one question
MAX_TERMS = 200  # of a sum, a product or an expanded polynomial
DIGITS = (50, 300)  # of the two precisions


class Limit(Exception):
    """Not a form that we read, or more work than we do."""


# -------------------------------------------------------------------------------------------------
# Extraction: the final answer in a response

TURN_END = re.compile(
    r"<\|(?:im_end|im_start|eot_id|endoftext|end|start_header_id|eom_id|return)\|>"
    r"|<(?:end|start)_of_turn>|</s>|\[INST\]|<｜end▁of▁sentence｜>"
)
FINAL_CHANNEL = "<|channel|>final<|message|>"
BOX = re.compile(
    r"\\{1,4}(?:[bB]oxed|fbox|framebox)\s{0,9}(?:(\{)|(\d|(?<=\s)[^\s{}$\\]+))|\\[{}\\]|([{}])"
)
# What may stand between the parts of one answer.
JOINT = re.compile(
    r"(?:\s|\$|\\[()\[\]]|\\q?quad|\\[,;! ]|\\text\s?\{\s?(?:and|or|,)?\s?\}|\band\b|\bor\b|[,;]"
    r"|[和与或、，])*"
)
JOINING = re.compile(r"and|or|[,;和与或、，]")
NAMED = re.compile(r"[A-Za-z](?:_\{?\w{1,3}\}?)?\s?=\s?$")
OPENING = re.compile(r"\$\$|(?<!\\)\$|(?<!\\)\\\[|(?<!\\)\\\(")
CLOSING = {"$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)"}
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+\u2212]?[$\u20ac\u00a3]?"
    r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:e[-+]?\d+|\s?[\u00d7x]\s?10\^?\{?-?\d+\}?)?"
    r"(?:\s\d{1,4}/\d{1,4}|:\d+(?:\s?[ap]\.?m\b\.?)?|\s?/\s?\d+|\^\{?-?\d+\}?|\s?(?:\u03c0|pi\b)"
    r"|\s(?:hundred|thousand|million|billion)\b)?"
    r"(?:\s?\\?%|\s?percent|\u00b0)?",
    re.I,
)
ANSWER = (
    r"(?:\banswers?\b|答案|答え|答|정답|답|\bответ|\br[ée]ponse|\brespuesta|\bantwort|\brisposta"
    r"|\bresposta|\bsvar\b|\bcevap\b|\bodpowied[źz]|đáp (?:án|số))"
)
DECIMAL_COMMA = re.compile("ответ|r[ée]ponse|respuesta|antwort|risposta|resposta|svar|cevap", re.I)
IS = (
    r"(?:(?:is|are|was|equals|(?:must|should|would|will) be|est|es|ist|lautet|sind|är|são|wynosi)"
    r"\b|è|é\b|[:：=—]|为|是|は|은|는|이|\n)"
)
STATED = re.compile(
    rf"{ANSWER}(?:\s(?:to|for|of|here|finale?|final|donc|correcta|correcte|then|must be)\b"
    rf"[^.\n:=：$]{{0,80}}?)?[\s*_]{{0,6}}{IS}"
    rf"|\b(?:correct|best|right)\s(?:option|choice|statement)[\s*_]{{0,4}}{IS}"
    r"|\b(?:option|choice)[\s*_]{0,4}:"
    r"|\b(?:choose|pick|select|go with)\b(?:\s(?:option|choice|answer))?"
    r"(?=\s?[*(]{0,3}[A-J]\b)|(?:故选|应选|所以选|因此选|选择|选)[:：]?(?=\s?\(?[A-J])",
    re.I,
)
IS_THE_ANSWER = re.compile(
    r"(?:(\S{1,60})[*\s]{1,4}is the (?:final |correct |right )?answer"
    r"|\b([A-J])\)?[*\s]{1,3}is correct)\b|选项\s?([A-J])\s?是?正确"
)
# Marks and adverbs before an answer.
LEADING = re.compile(
    r"(?:[\s*#>:：=\"“”'`]|(?:is|are|was|be|exactly|precisely|approximately|about|around|roughly"
    r"|simply|just|then|thus|therefore|hence|clearly|indeed|found to be|equal to|equals|given by"
    r"|donc|also|either|now|obviously|option|choice|est|es|ist|la opción|a opção|вариант)\b)+",
    re.I,
)
# Where an answer ends: the sentence, a reason, a remark.
ENDING = re.compile(
    r"\n|[.!?](?=\s|$)|[。；！？，]|;\s|\s(?:since|because|which|where|as|so|while|but|not)\b"
    r"|\s\((?=(?!and\b|or\b|pi\b|sqrt|sin|cos|tan|log|ln)[a-z]{2})"
    r"|,\s+(?=(?!and\b|or\b|pi\b|sqrt|sin|cos|tan|log|ln|exp|where\b)[a-z]{2})"
)
COMPARED = r"(?:more|less|fewer|times|half|twice|higher|lower|older|younger|taller|longer|shorter)"
REASON = re.compile(
    r"\b(?:since|because|which(?! (?:is|makes|gives|means|leaves|equals) -?[$\d])|where"
    rf"|which(?= is [$\d][\d.,]*(?: \w+)? {COMPARED}\b)"
    r"|approximately|approx|about|roughly|i\.e|not|as required|(?:when|if)(?=[^,]*$)"
    r"|in order to|occurs?|attained|each \w+ing|after (?:\w+ing|he|she|they|it|we|you|I))\b"
    r"|[≈~]|\\approx",
    re.I,
)
SO = re.compile(
    r"^(?:[\s,:*]|so\b|thus|therefore|hence|then|either|finally|we (?:get|have|find|obtain))+\s",
    re.I,
)
DENIED = re.compile(r"\s(?:is|are|was|were)\s(?:wrong|incorrect|impossible|not\b)")
NOT = re.compile(r"\b(?:not|cannot|can't|isn't|never)\b[ a-z]{0,20}[$ ]{0,3}$", re.I)
COMPOUND = re.compile(r"(?<![\d.,])\b\d+ ([a-z]{3,12})(?:,? and|,)? \d+ ([a-z]{3,12})\b")
MIXED = (
    {"year", "yr", "month", "week", "day", "hour", "hr", "minute", "min", "second", "sec"},
    {"mile", "yard", "foot", "feet", "inch", "inche", "ft", "meter", "metre", "centimeter"},
    {"pound", "ounce", "kilogram", "gram"},
    {"dollar", "cent", "euro", "rupee", "paise"},
    {"gallon", "quart", "pint", "cup", "liter", "litre", "milliliter"},
)
DURATION = r"[ -](?:second|minute|hour|day|week|month|year)s?\b"
TIME = re.compile(DURATION)
# What was given, behind what it led to: 540 meters in 7 days, $18 left out of his $50.
GIVEN = re.compile(
    r"\b(?:in|after|over|within|during|for|every)\s(?:(?:the|these|those|all|just|only) )?"
    rf"(?:(?:first|last|next) )?([\d.,]+){DURATION}"
    r"|\bat (?:a (?:rate|speed|price) of )?([$\d][\d.,]*) (?:\w+ )?(?:per|an|each|every|apiece)\b"
    r"|\bfor (?:the )?(\d+) \w+ to\b"
    r"|\bout of (?:(?:the|his|her|their|its|a) )?(?:(?:original|initial|total|whole) )?([$\d]\S*)",
    re.I,
)
# What an article or a preposition marks as given, behind the answer: $36 on 4 books, 15 of the 45.
MARKED_GIVEN = re.compile(
    r"(?:(?<!\bis )(?<!\bare )\b(?:the|these|those|his|her|their|its|my|our|all|both)\s"
    r"(?:(?:first|last|next|original|initial|same|whole) )?"
    r"|\b(?:on|in|after|over|within|during|including|than|divided by|price of|\d [a-z]{1,12} of"
    r"|\d of)\s)$",
    re.I,
)
LISTED_ON = re.compile(r"[A-Za-z\s-]{0,40}(?:,|,? and)\s")  # the 3 cups, 2 forks and 6 spoons
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
FOR = re.compile(r"\bfor\s(?:the )?$", re.I)
ASIDE = re.compile(  # 15 boys (25% of 60)
    r"\s\((?!mod|sin|cos|tan|log|sqrt)[^()\n]{0,60}(?<![a-z\\])[a-z]{2,}\b[^()\n]{0,60}\)"
)
LENGTHY = re.compile(
    r"(?<=[a-z]) (?:long|tall|wide|deep|high|away|apart|left|in all|in total|altogether)$"
)
ASSUMED = re.compile(r"\b(?:with|if|when|since|for|given|as|because|from)\s*$", re.I)
REMARK = re.compile(r"(?<=[.!])\s*\([^()\n]{0,200}[A-Za-z]{2}[^()\n]{0,200}\)\s*$")
BOLD_WORD = re.compile(r"(?:^|\n)\s{0,9}\*\*([A-Za-z][A-Za-z ]{0,30}?)[.!]?\*\*[.!]?\s*$")
RATIO = re.compile(r"\bratio\b.*?(-?\d[\d.]*) (?:to|is to) (-?\d[\d.]*)\W*$", re.I)
# The formula that a sentence ends with, if it is more than a number.
FORMULA = re.compile(
    r"(?:(?<=\s)|^)(?:[^\sA-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]"
    r"|(?<![A-Za-z])(?:[A-Za-z]|pi|and|or|sqrt|sin|cos|tan|log|ln|exp)(?![A-Za-z])|\s)+$"
)
OPERATED = re.compile(r"[\dA-Za-z\u03c0\u221e)]\s?[-+*/^=<>\u2264\u2265]|\([^()]*,|\[[^\[\]]*,")
# Whole paragraphs behind an answer that only check it.
CHECK = re.compile(
    r"\n\s{0,9}[\W_]{0,4}(?:(?:let(?:'s| us| me) )?(?:double-?)?(?:check|verify)(?:ing)?"
    r"|verification|to (?:check|verify))\b[\s\S]*",
    re.I,
)
CONCLUDES = re.compile(r"\b(?:so|thus|therefore|hence|final|answer|wrong|mistake|but|not)\b", re.I)
CUT_OFF = re.compile(
    r"(?:[-+*/=\u00d7\u00f7(^]"
    r"|\b(?:(?<!it )is|are|equals|of|the|and|or|to|by|with|from|which|that|requires))\s*$"
)
# Closing courtesies, and what an answer means for repeated trials.
COURTESY = re.compile(
    r"[\n.!]\s{0,9}(?:(?:let me know|i hope|feel free|please (?:let|feel)"
    r"|if you (?:have|need|want|would))\b"
    r"|this means (?:that )?(?:in|on average|for every|about|out of|\d+ out of)\b)[^\n]*$",
    re.I,
)
BOLD_VALUE = re.compile(
    r"\b(?:so|thus|therefore|hence|is|are|total)\b[^.\n*]{0,80}"
    r"\*\*([-$\\(]{0,3}\d[^*\n]{0,40})\*\*",
    re.I,
)
REMAIN = re.compile(r"\b([A-Za-z-]+) [a-z]+ (?:remain|are left)\b")
WHILE = re.compile(r"(?<=\d)\s(?:when|if)\s[^,]*$")
# Of these a duration is the answer.
LASTS = re.compile(
    r"\b(?:finish|complete|reach|arrive|do it|done|empty|fill|meet)(?:e?s|e?d)?\b", re.I
)
# 2 + 1 = 3 bolts: what stands before the value is no part of it.
ARITHMETIC = re.compile(
    r"(?:[$(\\]*\d|[CP]\(\d)"
    r"(?:[-+*/\u2212\u00d7\u00f7\u00b7().,!\d\s$%^CP]|\\[$%]|\\times|\\cdot|\\div)*"
    r"=\s*(?=-?\\?[$\d])"
)
ITEM = re.compile(r"\s{0,9}(?:[-*\u2022]|\(?\d{1,2}[.)])[ \t]+(\S[^\n]{0,59})(?=\n|$)")
FIRST_STEP = re.compile(r"\n\s*1[.)]\s+[^\n]*[A-Za-z]{3}")
MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
DAY = r"\d{1,2}(?:st|nd|rd|th)?"
DATE = re.compile(rf"{MONTH} {DAY}(?:,? \d{{4}})?|{DAY} {MONTH}(?: \d{{4}})?", re.I)
PROSE = re.compile(r"[A-Za-z]{3}|[\u0400-\u1fff\u3040-\uffdc]")
SENTENCE = re.compile(r"[.!](?=\s|$)|[\n。]")
QUESTION = re.compile(r"[^.!?\n]{0,200}\?(?=\s|$)")
STATED_LAST = re.compile(r"(.*\b(?:is|are|equals?|be)\s)(.+)")
THERE_ARE = re.compile(
    r"\b[Tt]here (?:are|is|were)\s(?:exactly |only )?(\d[\d,]*|[a-z-]+)\b(?! more|.*, .*\d)"
)
# Formulas of a unit, a mark at the end of a proof.
NO_ANSWER = re.compile(r"[\^_]|\\(?:blacksquare|square|Box|therefore|checkmark)$")
# Between a value and where it is taken.
WHEN = re.compile(
    r"\s*[,(，]?\s*(?:(?:attained|achieved|reached|when|where|since|because|occurring)\b"
    r"|此时|当|其中)[^.\n]{0,40}"
)
NONE = re.compile(r"\bno (?:real )?solutions?\b|\bdoes not exist\b|\binfinitely many\b", re.I)
CORRECTION = re.compile(r"\b(?:wait|actually|correction|sorry|oops|hold on)\b", re.I)
JSON_FIELD = re.compile(
    r'"(?:final_?)?answer"\s?:\s?(?:"((?:[^"\\]|\\.)*)"|(\[[^\]"]*\]|[^,"}\]\s]+))', re.I
)
CHOICES = re.compile(r"(?:\\text\s?\{|[(){}\s,;]|\band\b|[A-J]){2,60}")
CHOICE_IN_TEXT = re.compile(r"\s*[*_(]{0,3}([A-J])[*_)]{0,3}(?:[.):*]|\s*$)")


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of the complete outermost \boxed{}s, in order. One pass over it."""
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []  # None: an ordinary brace
    for m in BOX.finditer(text):
        if m[1]:
            opened.append((m.start(), m.end()))
        elif m[2]:
            content = text[m.start(2) :].split(None, 1)[0] if m[2].isdigit() else m[2]
            found.append((m.start(), m.end(), content[:100].rstrip(".,;$")))
        elif m[3] == "{":
            opened.append(None)
        elif m[3] == "}" and opened and (box := opened.pop()):
            while found and found[-1][0] > box[0]:  # boxes inside this one
                found.pop()
            found.append((box[0], m.end(), text[box[1] : m.start()].strip()))
    return found


def _meant(text: str) -> list[tuple[int, int, str]]:
    r"""The boxes that say something, without "not \boxed{5}"."""
    boxes = [box for box in _boxes(text) if box[2]]
    return [box for box in boxes if not NOT.search(text[max(0, box[0] - 20) : box[0]])]


def _formulas(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the formulas between dollars or LaTeX's brackets. A dollar is one of
    money unless its formula begins and ends like one. Linear: an end that is missing is not sought
    twice."""
    found: list[tuple[int, int, str]] = []
    missing: set[str] = set()
    at = 0
    while m := OPENING.search(text, at):
        start, close = m.end(), CLOSING[m.group()]
        end = -1 if close in missing else text.find(close, start)
        while end > 0 and text[end - 1] == "\\" and close[0] == "$":
            end = text.find(close, end + 1)
        if end < 0:
            missing.add(close)
        elif m.group() == "$":
            content, after = text[start:end], text[end + 1 : end + 2]
            spaced = content[:1].isspace()
            like_formula = content.strip() and content[-1:].isspace() == spaced
            if not like_formula or after.isdigit() or "\n\n" in content:
                end = -1
        at = start
        if end >= 0:
            at = end + len(close)
            found.append((m.start(), at, text[start:end].strip()))
    return found


def _joined(text: str, parts: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Parts with only "and", "or" or commas between them, as one list each."""
    groups: list[tuple[int, int, str]] = []
    for start, end, content in parts:
        if groups:
            between = NAMED.sub("", text[groups[-1][1] : start])
            if len(between) <= 60 and JOINING.search(between) and JOINT.fullmatch(between):
                groups[-1] = (groups[-1][0], end, f"{groups[-1][2]}, {content}")
                continue
        groups.append((start, end, content))
    return groups


def _without_markdown(text: str) -> str:
    """`**` stays only between two operands, where it is a power."""
    text = re.sub(r"(?<![\w)\]}])\*\*|\*\*(?![\w(\\-])", "", text)
    text = re.sub(r"^```\w*$|`|__|</?(?:b|i|strong|em|p|br)\s?/?>", "", text, flags=re.M)
    return text


def _last_value(text: str) -> str | None:
    """The last formula or number, without what only explains or checks it."""
    text = REMARK.sub("", QUESTION.sub(" ", text))
    courtesy = COURTESY.search(text)
    if courtesy and re.search(r"\d", text[: courtesy.start()]):
        text = text[: courtesy.start() + 1]
    check = CHECK.search(text)
    if check and re.search(r"\d", text[: check.start()]) and not CONCLUDES.search(check[0]):
        text = text[: check.start()]
    formulas = []
    for start, end, content in _formulas(text):
        if NO_ANSWER.match(content):
            text = f"{text[:start]}{' ' * (end - start)}{text[end:]}"
        else:
            formulas.append((start, end, content))
    sentences = [t for t in SENTENCE.split(text) if re.search(r"[\w$]", t)]
    last = SO.sub("", sentences[-1][:400]) if sentences else ""
    if said := _said(last):
        return said
    groups = _joined(text, formulas)
    groups = [g for g in groups if len(g[2]) > 1 or g[2].isdigit()] or groups
    while len(groups) > 1 and WHEN.fullmatch(text[groups[-2][1] : groups[-1][0]]):
        groups.pop()
    after = groups[-1][1] if groups else 0
    for sentence in reversed(SENTENCE.split(text[after:])[-30:]):
        if number := _number(sentence, beside_formula=bool(groups)):
            return number
    if groups:
        return _with_unit(groups[-1][2], text[after:])
    word = None if re.search(r"\d", text) else re.search(r"\b(?:is|are) (\w+)$", last)
    return word[1] if word else None


def _said(sentence: str) -> str | None:
    """A sentence that is nothing but mathematics, or says it after "is", "there are" or a colon."""
    sentence = ASIDE.sub("", WHILE.sub("", sentence))
    if ratio := RATIO.search(sentence):
        return f"{ratio[1]}:{ratio[2]}"
    if formula := _formula_at_the_end(sentence):
        return _result(formula)
    stated = STATED_LAST.search(sentence)
    stated = stated[2] if stated and not NOT.search(stated[1]) else ""
    for whole in (sentence, stated, sentence.rpartition(": ")[2]):
        if not OPENING.search(sentence) and _readable(whole):
            return LENGTHY.sub("", _result(whole.strip()))
    there = THERE_ARE.search(sentence)
    if there and (there[1][0].isdigit() or spelled(there[1])):
        return there[1]
    if (remain := REMAIN.search(sentence)) and spelled(remain[1].lower()):
        return remain[1]
    none = NONE.search(sentence)
    return none[0] if none else None


def _formula_at_the_end(sentence: str) -> str | None:
    """x > 3 of "so we get x > 3": more than a number, and nothing but mathematics."""
    if OPENING.search(sentence):
        return None
    sentence = re.sub(r"(?:\bis )?\bequals?(?: to)?\b", "=", sentence)
    first = NUMBER.search(sentence)
    if first and (reason := REASON.search(sentence, first.start())):
        sentence = sentence[: reason.start()]
    m = FORMULA.search(sentence)
    if m and ASSUMED.search(sentence[: m.start()]):
        return m[0].rpartition(", ")[2].rpartition("=")[2].strip() or None
    formula = m[0].rpartition(": ")[2].strip(" ,:;=") if m else ""
    formula = re.sub(r"^(?:and|or|a|A|I)\s+", "", formula)
    return formula if OPERATED.search(formula) and _readable(formula) else None


def _result(text: str) -> str:
    """3 bolts of 2 + 1 = 3 bolts."""
    m = ARITHMETIC.match(text)
    return text[m.end() :] if m else text


def _number(sentence: str, beside_formula: bool) -> str | None:
    """The number that a sentence gives; after a formula, none that only explains it."""
    if re.search(r"\bneither\b", sentence, re.I):
        return sentence.strip()
    if compound := COMPOUND.search(sentence):
        units = {word.removesuffix("s") for word in compound.groups()}
        clock = re.search(r"\d:\d\d", sentence[compound.end() :])
        if not clock and any(units <= mixed for mixed in MIXED):
            return compound[0]
    numbers = [n for n in NUMBER.finditer(sentence) if not DENIED.match(sentence, n.end())]
    numbers = [n for n in numbers if not NOT.search(sentence[max(0, n.start() - 30) : n.start()])]
    if not numbers:
        return None
    numbers = _without_given(sentence, numbers)
    first = numbers[0].start()
    if beside_formula:
        reason = REASON.search(sentence) or re.search(r"\bor\b|[=(]", sentence)
        return numbers[-1].group().strip() if not reason or first < reason.start() else None
    if reason := REASON.search(sentence, first):
        numbers = [n for n in numbers if n.start() < reason.start()]
    if len(numbers) == 2 and re.search(r"\b(?:between|from)\b", sentence[:first], re.I):
        return sentence.strip()
    start, end = numbers[-1].span()
    for n in reversed(numbers[:-1]):  # 12 or 15
        if not JOINT.fullmatch(sentence[n.end() : start]):
            break
        start = n.start()
    if re.search(r"\b(?:and|or)\b", sentence[start:end]):
        return sentence[start:end]
    return _with_unit(numbers[-1].group().strip(), sentence[end:])


def _without_given(sentence: str, numbers: list[re.Match]) -> list[re.Match]:
    """The numbers without those behind the first that the sentence marks as given."""
    given = {m.start(m.lastindex) for m in GIVEN.finditer(sentence)}
    aside = [m.span() for m in ASIDE.finditer(sentence)]
    lasts = LASTS.search(sentence)
    kept: list[re.Match] = []
    dropped, money = None, False  # the number before, if it was; whether money is among them
    for n in numbers:
        before = sentence[max(0, n.start() - 30) : n.start()]
        beside = dropped and LISTED_ON.fullmatch(sentence, dropped.end(), n.start())
        dropped = None
        is_money = n[0].lstrip("+-")[0] in "$€£"
        stays = ORDINAL.match(sentence, n.end()) or lasts and TIME.match(sentence, n.end())
        is_given = (
            beside
            or n.start() in given
            or MARKED_GIVEN.search(before)
            or any(a < n.start() < b for a, b in aside)
            or (money and not is_money and FOR.search(before))
        )
        if kept and is_given and not stays:
            dropped = n
        else:
            kept.append(n)
            money = money or is_money
    return kept


def _with_unit(answer: str, rest: str) -> str:
    """The answer with the unit that the rest of the text begins with."""
    unit = re.match(r"\s?([A-Za-z]{1,12})((?:\^?[23²³])?)(?![\w(])", rest)
    if unit and unit[1] != "in" and known_unit(unit[1]) in UNITS.values():
        return rf"{answer}\text{{ {unit[1]}}}{unit[2]}"
    return answer


def _readable(text: str) -> bool:
    try:
        parse(clean(text))
    except Limit:
        return False
    return True


def _items(text: str) -> list[str]:
    """Those of a list of formulas that a text begins with, if it has two or more."""
    items, at = [], 0
    while (m := ITEM.match(text, at)) and len(items) < 20:
        items.append(m[1].strip(" .;,"))
        at = m.end()
    return items if len(items) > 1 and all(map(_readable, items)) else []


def _clause(text: str) -> str:
    """The answer at the start of what follows "the answer is"."""
    listed_below = text[:MAX_CHARS].lstrip(" *_:：")
    if items := _items(listed_below):
        return ", ".join(items)
    if FIRST_STEP.match(listed_below):
        return ""
    m = LEADING.match(text)
    text = text[m.end() if m else 0 :][:4000].lstrip()
    if m and re.search("approx|about", m.group(), re.I):
        exactly = re.search(r"\bexactly\s+(?=[\d$\\])", text[:200])
        text = text[exactly.end() :] if exactly else text
    groups = _joined(text, _formulas(text))
    if groups and groups[0][0] == 0:
        return _with_unit(groups[0][2], text[groups[0][1] :])
    end = ENDING.search(text)
    while end and any(g[0] < end.start() < g[1] for g in groups):
        end = ENDING.search(text, end.end())
    clause = text[: end.start() if end else len(text)].strip(" \t*\"“”'`,:：")
    if date := DATE.match(clause):
        return date[0]
    clause = _result(clause)
    if letter := CHOICE_IN_TEXT.match(text):
        return letter[1] if len(clause) > 3 and not _readable(clause) else clause
    bounds = re.match(r"(?:between|from|at least|at most|more|less)\b", clause, re.I)
    if (
        re.search(r"\d.*\bor\b.*\d", clause)
        or bounds
        or not re.search(r"\d|\$|\\[(\[]", clause)
        or _readable(clause)
    ):
        return clause
    first = NUMBER.match(clause)
    if first and re.match(r" [a-z]{2,}, (?!or|so|and|i\.e|that is)", clause[first.end() :]):
        return _with_unit(first[0].strip(), clause[first.end() :])
    return _last_value(clause) or clause


def _stated(text: str) -> str | None:
    """What the last sentence that names an answer says it is, or the correction that follows."""
    found = list(STATED.finditer(text))
    before = list(IS_THE_ANSWER.finditer(text))
    if before and (not found or found[-1].start() < before[-1].start()):
        return before[-1][before[-1].lastindex].strip("*$\"'")
    for m in reversed(found[-6:]):
        rest = text[m.end() :]
        if re.match(r"\s?not\b", rest):
            return None
        answer = _clause(rest)
        if not answer or answer.lower() in ("correct", "right", "wrong", "clear", "yes, correct"):
            continue
        if DECIMAL_COMMA.search(m.group()) and re.fullmatch(
            r"-?\d+,\d{1,2}(?:\s?[^\d\s]+)?", answer
        ):
            answer = answer.replace(",", ".", 1)
        corrected = CORRECTION.search(rest)
        if corrected and (later := _last_value(rest[corrected.end() :])):
            return later
        return answer
    return None


def _bold_value(text: str) -> re.Match | None:
    """The last "so it is **26**" that no other conclusion follows."""
    *_, last = None, *BOLD_VALUE.finditer(text)
    if last and _readable(last[1].strip(". ")) and not CONCLUDES.search(text, last.end()):
        return last
    return None


def extract_answer(text: str) -> str | None:
    r"""The final answer in a model's text, or None. In what follows the last </think>: the last
    complete \boxed{} (several joined by "and" or commas are one list) unless a statement after it
    corrects it, else the <answer> or "answer" field, "#### x", the last "the answer is", a bold
    value behind "so" or "is", a text that is nothing but mathematics, the last formula or number.
    Linear in its length."""
    answer = _extracted(text)
    if answer and "$" in answer and ARITHMETIC.match(answer):  # $20 + $4 = $24
        answer = re.sub(r"\\?\$", "", answer)
    return answer


def _extracted(text: str) -> str | None:
    """The answer as it stands there, dollars and all."""
    text = _text(text)
    text = text[text.rfind(FINAL_CHANNEL) + len(FINAL_CHANNEL) :] if FINAL_CHANNEL in text else text
    end = TURN_END.search(text, 1)
    text = text[: end.start()] if end else text
    text = text[text.rfind("</think>") + 8 :] if "</think>" in text else text
    text = text[-MAX_RESPONSE:]
    boxed = "oxed" in text or "fbox" in text or "framebox" in text
    if boxed and (boxes := _joined(text, _meant(text))):
        rest = _without_markdown(text[boxes[-1][1] :][:MAX_TAIL])
        later = _stated(rest) if STATED.search(rest) else None
        if later and len(later) < 60 and re.fullmatch(r"\(?[A-J]\)?|[-\d.,/ ]*\d", later):
            return later
        return boxes[-1][2]
    if boxed:  # never finished
        text = text[: max(text.rfind("\\boxed"), text.rfind("\\fbox"), 0)].rstrip(" $")
    if (at := text.rfind("<answer>")) >= 0:
        inside = text[at + 8 :].partition("</answer>")[0].strip()
        return inside if _readable(inside) else _extracted(inside) or inside
    if fields := list(JSON_FIELD.finditer(text[-MAX_TAIL:])):
        value = fields[-1][1] if fields[-1][1] is not None else fields[-1][2]
        return value.replace('\\"', '"').replace("\\\\", "\\").strip()
    bold = BOLD_WORD.search(text[-MAX_TAIL:]) or _bold_value(text[-MAX_TAIL:])
    text = _without_markdown(text[-MAX_TAIL:])
    if (at := text.rfind("####")) >= 0:
        line = text[at + 4 :].lstrip("# ").split("\n", 1)[0].strip()
        if re.search(r"\d", line) and not re.match(r"(?:step|part|case)\b|\d+[.)]\s", line, re.I):
            return line[:MAX_CHARS]
    if answer := _stated(text):
        return answer
    if bold:
        return bold[1].strip(". ")
    if CUT_OFF.search(text):
        return None
    formulas = _formulas(text[:300])
    prose = PROSE.search(text[: formulas[0][0]]) if formulas else None
    if len(text) <= 300 and text.strip() and not prose and _readable(text):
        return text.strip()
    return _last_value(text) or (m[1] if (m := CHOICE_IN_TEXT.fullmatch(text)) else None)


# -------------------------------------------------------------------------------------------------
# Text: one spelling for what means the same

MARKS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "√": r"\sqrt ",
    "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "°": r"^\circ ",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "Ø": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "≈": r"\approx ",
    "ℝ": r"\mathbb{R}", "∠": r"\angle ", "≡": r"\equiv ", "′": "'", "’": "'", "⟨": r"\langle ",
    "⟩": r"\rangle ", "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ",
    "¾": r"\frac34 ", "，": ",", "、": ",", "：": ":", "（": "(", "）": ")", "。": ".",
    "μ": r"\mu ", "…": r"\dots ", "Ω": r"\Omega ", "∑": r"\sum ", "∫": r"\int ", "Δ": r"\Delta ",
    "\u20e3": "", "\ufe0f": "", "\u200b": "", "\u202e": "",  # these do not show
}  # fmt: skip
for _digit, (_high, _low) in enumerate(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉", strict=True)):
    MARKS |= {_high: f"^{_digit}", _low: f"_{_digit}"}
TABLE = str.maketrans(MARKS)
REWRITE = {
    re.compile(pattern, re.S): replacement
    for pattern, replacement in {
        r"<\|.*": "",
        r"&nbsp;|~": " ",
        r"(?<=\d) ?[xX] ?(?=10 ?\^)": r"\\times ",
        r"(?<=\d)\\!(?=[:.])|(?<=[:.])\\!(?=\d)": "",
        r"(?<=\d)(?:,\\!|\{,\}\\?!?|\\,|\\ ) ?(?=\d{3}(?!\d))": "",  # digit groups
        r" ?\{ ?([,:.]) ?\} ?": r"\1",
        r"(?<=\d) ?\\mathrm\{e\} ?(?=[-+]?\d)": "e",
        r"\{([^{}]{1,200})\\choose([^{}]{1,200})\}": r"\\binom{\1}{\2}",
        r"\^ ?\{? ?(?:\\circ|\\degree)(?![A-Za-z]) ?\}?|\\degree(?![A-Za-z])": r"\\deg ",
        r"\bsq\. ?": "square ",
        r"\b[Aa]ll real numbers\b|\\Reals?\b|\\R\b": r"\\mathbb{R}",
        r"\\\{ ?\\\}": r"\\emptyset ",
    }.items()
}
WHOLE_TEXT = re.compile(r"^\\(?:text|mbox|textbf|textit|mathrm)\s?\{([^{}]*)\}\W*$")
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
    fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    eighty ninety"""
NUMBER_WORDS = dict(zip(NUMBER_WORDS.split(), (*range(20), *range(20, 100, 10)), strict=True))
NO_VALUE = re.compile(r"(dne|undefined|.*doesnotexist.*)|(none|.*no(?:real)?solution.*)")
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3}){1,200}(?![\d,])")
REPEATING = re.compile(
    r"(?<!\d)(\d{0,40})\.(\d{0,40})\\(?:overline|bar|dot) ?(?:\{(\d{1,40})\}|(\d))"
)


def _text(given) -> str:
    """Any object as a string."""
    if isinstance(given, str):
        return given
    if given is None:
        return ""
    try:
        return str(given)
    except Exception:  # an object's own __str__ may raise anything
        return ""


def _repeating(m: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    fixed, cycle = m[1] + m[2], m[3] or m[4]
    top = int(fixed + cycle) - int(fixed or 0)
    return rf"\frac{{{top}}}{{{(10 ** len(cycle) - 1) * 10 ** len(m[2])}}}"


def clean(s: str) -> str:
    """An answer without its delimiters, in ASCII where that says the same. Raises Limit where it is
    too long to be read."""
    s = " ".join(s[: 2 * MAX_CHARS].split()) if len(s) <= 4 * MAX_CHARS else s
    if len(s) > MAX_CHARS:
        raise Limit
    if not s.isascii():
        s = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾])", " ", s).translate(TABLE)
        s = unicodedata.normalize("NFKC", s)
    if "\\\\" in s and "\\begin" not in s:
        s = re.sub(r"\\\\(?=[A-Za-z(){}\[\]|,!;:$%])", r"\\", s)  # a doubled escape
    if m := re.fullmatch(r"\\[(\[](.*)\\[)\]]\.?", s):
        s = m[1]
    if s.count("$") == 1 and "\\$" not in s:
        s = s.replace("$", "\\$")  # money
    s = re.sub(r"(?<!\\)\$", " ", s)
    s = WHOLE_TEXT.sub(r"\1", s.strip())
    for pattern, replacement in REWRITE.items():
        s = pattern.sub(replacement, s)
    s = s.strip(' *"“”`').removeprefix("'").removesuffix("'") if s[:1] == "'" else s
    s = s.strip(' *"“”`').rstrip(".;,:? ").strip()
    if re.fullmatch(r"-?\d{1,3}( \d{3})+(\.\d+)?", s):
        s = s.replace(" ", "")
    s = REPEATING.sub(_repeating, s)
    if "\\approx" in s:  # "exact \approx decimal" is the exact part
        left, _, right = s.partition("\\approx")
        if not left.strip():
            s = right
        elif re.fullmatch(r"[A-Za-z](_\w)?", left.strip()):
            s = f"{left}={right}"
        else:
            s = left
    return spelled(s) or s.strip()


def spelled(s: str) -> str:
    """The digits of "twenty-one"; "" of what is no number in words."""
    done = hundreds = 0
    found = s.lower().replace("-", " ").replace(" and ", " ").split()
    for word in found:
        value = NUMBER_WORDS.get(word)
        if value is not None and hundreds % (10 if value < 10 else 100) == 0:
            hundreds += value
        elif word == "hundred":
            hundreds = 100 * max(1, hundreds)
        elif word in SCALES:
            done, hundreds = done + SCALES[word] * max(1, hundreds), 0
        else:
            return ""
    return str(done + hundreds) if found else ""


def words(s: str) -> str:
    """An answer that cannot be read, for comparison: without white space and the case of words."""
    s = re.sub(r"\\(?:text|mbox|mathrm|textbf)[a-z]{0,4}\s?\{([^{}]*)\}", r"\1", s)
    s = re.sub(r"^\s*(?:an?|the)\s+(?=[A-Za-z]{3})", "", s, flags=re.I)
    s = re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\[,;!]|(?<!\\)\$", "", s)  # "2 3" is not 23
    s = re.sub(r"[A-Za-z]{2,}", lambda m: m.group().lower(), s)
    none = NO_VALUE.fullmatch(s) if len(s) < 60 else None
    return {1: "doesnotexist", 2: "nosolution"}[none.lastindex] if none else s


# -------------------------------------------------------------------------------------------------
# Tokens and parser: text -> tree


def listed(text: str) -> list[str]:
    return text.split()


FUNCTIONS = listed(
    "arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh sin cos tan cot sec csc log ln lg "
    "exp sqrt cbrt abs floor ceil gcd lcm max min cis asin acos atan det"
)
NAMES = listed("infinity infty theta alpha beta gamma lambda inf pi")
WORD = re.compile("|".join(sorted(FUNCTIONS + NAMES, key=len, reverse=True)) + "|[A-Za-z]")
LETTERS = listed(
    r"\alpha \beta \gamma \delta \varepsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu "
    r"\nu \xi \rho \sigma \tau \varphi \chi \psi \omega \pi \Gamma \Delta \Theta \Lambda \Xi \Pi "
    r"\Sigma \Phi \Psi \Omega \ell \hbar \partial \nabla \dots \infty \odot"
)
ALIASES = {  # what we read: how else it is written
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom \tbinom", r"\le": r"\leq \leqslant <=",
    r"\ge": r"\geq \geqslant >=", r"\ne": r"\neq !=", "<": r"\lt", ">": r"\gt", "%": r"\%",
    "|": r"\lvert \rvert \vert \mid \lVert \rVert \Vert \|", "*": r"\ast \cdot \times",
    "and": r"\land \wedge", "or": r"\lor \vee", r"\{": r"\lbrace", r"\}": r"\rbrace",
    r"\mod": r"\bmod \pmod", r"\setminus": r"\backslash", r"\dots": r"\ldots \cdots ...",
    "'": r"\prime", "tan": r"\tg", r"\$": "€ £", r"\varepsilon": r"\epsilon", r"\varphi": r"\phi",
    r"\emptyset": r"\varnothing", ":": r"\colon", "/": r"\div",
}  # fmt: skip
ALIASES = {other: name for name, others in ALIASES.items() for other in others.split()}
DROPPED = {"\\ ", *listed(
    r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \middle \limits "
    r"\displaystyle \textstyle \nolimits \rm \bf \it \large \Large \LARGE \huge \Huge \small "
    r"\quad \qquad \, \; \: \! \boxed \fbox \underline \boldsymbol \bm \mathcal \mathfrak \mathscr "
    r"\mathsf \therefore"
)}  # fmt: skip
TEXT_SIGNS = {"and": "and", "or": "or", ",": ",", "%": "%", r"\%": "%", "percent": "%"}
TEXT_SIGNS |= {"degrees": r"\deg", "degree": r"\deg", "if": "if"}
TEXTS = listed(r"\text \textbf \textit \textnormal \textrm \textsf \texttt \mbox \hbox")
STYLES = listed(r"\mathrm \mathbf \mathit \mathtt \operatorname \mathbb")
MARKED = listed(r"\angle \triangle \overline \bar \overrightarrow \overleftarrow \dot \ddot")
STARTS = {"(", "[", "{", *MARKED, *listed(
    r"\{ \frac \sqrt \binom \langle \lfloor \lceil \Reals \emptyset \sum \prod \int"
)}  # fmt: skip
TOKEN = re.compile(
    r"\\q?quad|(?<![\d:])\d{1,2}:\d\d(?![\d:.])(?: ?[aApP]\.?[mM]\b\.?)?"
    r"|\\(?:begin|end) ?\{[a-z]+\*?\}(?:\{[^{}]{0,20}\})?|\\[A-Za-z]+|\\\\|\\.|\*\*|\d+(?:\.\d*)?"
    r"(?:[eE][-+]?\d{1,4}(?![\dA-Za-z]))?|\.\d+|\.\.\.|[A-Za-z]+|[<>!]=| +|.",
    re.S,
)
STOP = listed("is so we it to of by be he an at do if no as us my up was has not yes are the for")
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
UNITS = {
    name: (base, Fraction(factor))
    for base, factor, names in (
        ("m", 1, "m meter metre"), ("m", "0.01", "cm"), ("m", 1000, "km"), ("m", "0.001", "mm"),
        ("m", "0.0254", "in inch inche"), ("m", "0.3048", "ft foot feet"), ("g", 1, "g gram"),
        ("m", "0.9144", "yd yard"), ("m", "1609.344", "mi mile"), ("mph", 1, "mph"),
        ("g", 1000, "kg"), ("g", "453.59237", "lb lbs pound"), ("s", 1, "s sec second"),
        ("s", 60, "min minute"), ("s", 3600, "h hr hour"), ("s", 86400, "day"),
        ("s", 604800, "week"), ("year", 1, "yr year"), ("L", 1, "L l liter litre"),
        ("L", "0.001", "ml mL"), ("$", 1, "$ dollar usd"), ("$", "0.01", "cent"),
        ("unit", 1, "unit"), ("mol", 1, "mol mole"),
    )
    for name in names.split()
}  # fmt: skip
PREFIXES = {"k": 1000, "kilo": 1000, "c": Fraction(1, 100), "centi": Fraction(1, 100)}
PREFIXES |= {"m": Fraction(1, 1000), "milli": Fraction(1, 1000), "M": 10**6, "mega": 10**6}
PREFIXED = re.compile(
    r"([kcmM](?=(?:[mgsLlJNWVACFT]|Hz|Pa|eV|mol)$)|(?:kilo|centi|milli|mega)(?=[a-z]{3}))(.+)"
)
SYMBOL = r"(?:[kcmnMµ]?(?:m|g|s|L|l|J|N|W|V|A|C|K|F|T|Hz|Pa|eV|mol)|h|ft|mi|lb|erg|min)"
SYMBOL += r"(?:\^?\{?-?\d\}?)?"
PLAIN_UNIT = re.compile(rf"{SYMBOL}(?:[/ ]{SYMBOL})* *$")
AREA = re.compile(r"[kcm]?m\^?\{?[23]\}? *$")  # also where it has no space before it
NO_UNIT = listed("for where if when with otherwise then more less least most about than or is any")
RELATIONS = dict(zip(
    ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\equiv", r"\in", r"\notin"),
    ("=", "<", ">", "<=", ">=", "!=", "equiv", "in", "notin"), strict=True,
))  # fmt: skip
SEPARATORS = (",", ";", "and", "or")
SET_SIGNS = {r"\cup": "union", r"\cap": "cap", r"\setminus": "minus"}
PAIRS = {
    "(": (")", "]"), "[": ("]", ")", "["), "]": ("[", "]"), r"\{": (r"\}",),
    r"\langle": (r"\rangle",), r"\lfloor": (r"\rfloor",), r"\lceil": (r"\rceil",),
}  # fmt: skip


def _braced(s: str, at: int) -> tuple[str, int]:
    """The content of the braces that open at `at`, or one character, and where it ends."""
    at += len(s[at:]) - len(s[at:].lstrip(" "))
    depth = 0
    for end in range(at, len(s)):
        depth += (s[end] == "{") - (s[end] == "}")
        if not depth:
            return (s[at + 1 : end] if s[at] == "{" else s[at]), end + 1
    raise Limit


def _takes_unit(tokens: list) -> bool:
    """Whether what was read so far is a value, which may have a unit."""
    kind, t = tokens[-1] if tokens else ("", "")
    return kind in ("num", "letter", "text") or t in (")", "}", "]", "!", "%", r"\$", r"\deg")


def tokenize(s: str, tokens: list) -> list:
    """[(kind, text)]: num, time, letter, fun (a function), text (words, units), op (the rest)."""
    at = 0
    while m := TOKEN.match(s, at):
        at, t = m.end(), ALIASES.get(m.group(), m.group())
        if t in DROPPED or t.isspace():
            continue
        if t in (r"\vec", r"\hat", r"\tilde"):
            if len(_braced(s, at)[0]) > 1:  # \vec{v} is v; \vec{AB} is not AB
                tokens.append(("op", r"\overrightarrow"))
        elif t in (r"\color", r"\textcolor"):
            at = _braced(s, at)[1]
        elif t in TEXTS or t in STYLES:
            content, at = _braced(s, at)
            _text_token(t, " ".join(content.replace(r"\,", " ").split()), tokens)
        elif t[0].isdigit() or (t[0] == "." and t[1:].isdigit()):
            tokens.append(("time" if ":" in t else "num", t))
        elif t.isascii() and t.isalpha():
            spaced = s[m.start() - 1 : m.start()] == " "
            unit = (PLAIN_UNIT if spaced else AREA).match(s, m.start())
            if unit and _takes_unit(tokens) and tokens[-1][0] != "letter":
                tokens.append(("text", unit.group().strip()))
                return tokens
            _word_token(t, spaced, tokens)
        elif t in LETTERS:
            micro = t == r"\mu" and s[at:].lstrip().startswith((r"\mathrm", r"\text"))
            unit = (micro or (t == r"\Omega" and not s[at:].strip())) and _takes_unit(tokens)
            tokens.append(("text", t[1:]) if unit else ("letter", t))
        elif t[0] == "\\" and t[1:] in FUNCTIONS:
            tokens.append(("fun", t[1:]))
        elif t == "\\" or (not t.isascii() and not (t.isalpha() and _takes_unit(tokens))):
            raise Limit
        else:
            tokens.append(("op" if t.isascii() else "text", t))
    return tokens


def _text_token(command: str, content: str, tokens: list) -> None:
    r"""\text{...}, \mathrm{...}: words, or mathematics in another font."""
    lower, styled = content.lower(), command in STYLES
    if command == r"\mathbb":
        tokens.append(("op", r"\Reals") if content == "R" else ("letter", rf"\mathbb {content}"))
    elif lower in TEXT_SIGNS:
        tokens.append(("op", TEXT_SIGNS[lower]))
    elif styled and content in FUNCTIONS:
        tokens.append(("fun", content))
    elif styled and content.isalpha() and (len(content) == 1 or content.isupper()):
        last = tokens[-1] if tokens else ("", "")
        after_unit = last[1] == "/" and len(tokens) > 1 and tokens[-2][0] == "text"
        after_value = command == r"\mathrm" and last[0] != "letter" and _takes_unit(tokens)
        long = len(content) > 1 and _takes_unit(tokens)
        if content not in "eidx" and (after_value or after_unit or long):
            tokens.append(("text", content))
        else:
            tokens += [("letter", letter) for letter in content]
    elif not re.search(r"[^\W\d]", content) or (content[0] == "\\" and content[1:] in LETTERS):
        tokenize(content, tokens)
    elif m := re.fullmatch(r"(\D+?),? (and|or)", content):  # hours and
        tokens += [("text", m[1]), ("op", m[2])]
    else:
        tokens.append(("text", content))


def _word_token(t: str, spaced: bool, tokens: list) -> None:
    """A run of letters: a unit, functions and letters, or else a word, which is not read."""
    lower, (kind, last) = t.lower(), tokens[-1] if tokens else ("", "")
    pieces = WORD.findall(t)
    word = len(pieces) == len(t)
    follows_unit = (kind == "text" and last not in NO_UNIT) or (
        last == "/" and len(tokens) > 1 and tokens[-2][0] == "text"
    )
    unit = len(t) > 1 and (lower in UNITS or lower.removesuffix("s") in UNITS)
    if t in ("and", "or"):
        tokens.append(("op", t))
    elif lower in ("percent", "percentage", "degrees", "degree") and _takes_unit(tokens):
        tokens.append(("op", "%" if lower[0] == "p" else r"\deg"))
    elif (
        follows_unit
        or (unit and (kind == "num" or (spaced and _takes_unit(tokens))))
        or (word and spaced and len(t) > 2 and set(lower) & set("aeiou") and _takes_unit(tokens))
    ):
        tokens.append(("text", t))
    elif word and (
        (lower in STOP and not t.isupper()) or (len(t) > 2 and set(lower) & set("eiou"))
    ):
        raise Limit
    else:
        if t in "CF" and last == r"\deg":
            tokens.append(("text", t))
            return
        for p in pieces:
            command = r"\infty" if p[:3] == "inf" else "\\" + p
            tokens.append(
                ("fun", p) if p in FUNCTIONS else ("letter", command if p in NAMES else p)
            )


def known_unit(word: str) -> tuple:
    """(base unit, factor); a word that is no unit we know is a base unit of its own."""
    singular = word.lower().removesuffix("s") if len(word) > 3 else word
    if known := UNITS.get(word) or UNITS.get(singular) or UNITS.get(word.lower()):
        return known
    if m := PREFIXED.fullmatch(singular):
        base, factor = known_unit(m[2])
        return base, factor * PREFIXES[m[1]]
    return singular if len(word) > 2 else word, Fraction(1)


def unit_key(text: str) -> tuple[str, Fraction]:
    """(base units, factor): one reading of "m/s^2", "m s^{-2}" and "meters per second squared"."""
    found: list[list] = []
    sign, power = 1, 1
    text = text.replace("mph", "mi/h")
    for word, exponent, other in re.findall(r"([^\W\d_]+|\$)(?:\^?\{?(-?\d)\}?)?|(\S)", text):
        lower = word.lower()
        if lower in NO_UNIT:
            raise Limit
        if other == "/" or lower == "per":
            sign = -1
        elif lower in ("square", "sq", "cubic"):
            power = 3 if lower == "cubic" else 2
        elif lower in ("squared", "cubed") and found:
            found[-1][2] *= 3 if lower == "cubed" else 2
        elif word:
            found.append([*known_unit(word), sign * int(exponent or power)])
            power = 1
    if len(found) > 12:
        raise Limit
    powers = {base: sum(n for b, _, n in found if b == base) for base, _, _ in found}
    factor = prod((f**n for _, f, n in found), start=Fraction(1))
    return " ".join(f"{base}^{n}" for base, n in sorted(powers.items())), factor


def negate(tree):
    """-(5 cm) is (-5) cm."""
    if tree[0] in ("unit", "percent", "deg"):
        return (tree[0], negate(tree[1]), *tree[2:])
    return ("neg", tree)


def number(n) -> tuple:
    return ("num", Fraction(n))


class Parser:
    """Recursive descent over tokens."""

    def __init__(self, tokens: list):
        self.tokens, self.at, self.depth, self.bars = list(tokens), 0, 0, 0
        self.indices: list[str] = []  # of the sums around

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def peek(self, ahead: int = 0) -> str:
        """The next sign or name; "" at the end and before words."""
        kind, t = (self.tokens[self.at + ahead : self.at + ahead + 1] or [("", "")])[0]
        return "" if kind == "text" else t

    def take(self, *expected: str) -> str:
        """The next sign or name if it is one of these, and past it."""
        t = self.peek()
        if t not in expected or self.kind() in ("num", ""):
            return ""
        self.at += 1
        return t

    def need(self, *expected: str) -> str:
        if not (t := self.take(*expected)):
            raise Limit
        return t

    def deeper(self, rule):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Limit
        tree = rule()
        self.depth -= 1
        return tree

    def answer(self):
        tree = self.items()
        if self.at < len(self.tokens):
            raise Limit
        return tree

    def items(self, *closing: str):
        """relation, relation ... -> one tree, a list, or the set that relations make."""
        found, either = [self.deeper(self.relation)], False
        while between := self.take(*SEPARATORS):
            while between:
                either |= between == "or"
                between = self.take(*SEPARATORS)
            if not self.kind() or self.peek() in closing:
                break
            found.append(self.deeper(self.relation))
        return joined(found, either)

    def relation(self):
        if self.take("=", r"\equiv"):  # "= 42"
            return self.sets()
        sides, ops = [self.sets()], []
        while op := self.take(*RELATIONS):
            ops.append(RELATIONS[op])
            sides.append(self.sets())
        if len(ops) > 20:
            raise Limit
        if ops == ["in"] and name(sides[0]):
            return sides[1]
        if ops == ["notin"]:
            return ("minus", ("reals",), sides[1])
        if "equiv" in ops:
            self.take("(")
            self.need(r"\mod")
            modulus = self.sum()
            self.take(")")
            return ("mod", *sides, modulus)
        if ops and all(op[0] == ">" for op in ops):  # read from left to right: a < b < c
            ops, sides = [op.replace(">", "<") for op in ops[::-1]], sides[::-1]
        return ("rel", tuple(ops), *sides) if ops else sides[0]

    def sets(self):
        tree = self.ratio()
        while op := self.take(*SET_SIGNS):
            tree = (SET_SIGNS[op], tree, self.ratio())
        return tree

    def ratio(self):
        sides = [self.sum()]
        while not self.bars and self.take(":"):
            sides.append(self.sum())
        return sides[0] if len(sides) == 1 else ("ratio", *sides)

    def sum(self):
        terms = []
        while not terms or (self.kind() == "op" and self.peek() in ("+", "-")):
            minus = False
            while sign := self.take("+", "-"):
                minus ^= sign == "-"
            term = self.product()
            terms.append(negate(term) if minus else term)
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self):
        tree = factor = self.power()
        while True:
            if sign := self.take("*", "/"):
                tree = ("mul" if sign == "*" else "div", tree, factor := self.signed())
            elif self.kind() == "text":
                tree = factor = self.unit(tree)
            elif self.take(r"\$"):
                tree = ("unit", tree, *unit_key("$"), "$")
            elif self.kind() == "num" and tree[0] == "unit":  # 2 hours 15 minutes
                tree = joined([tree, self.deeper(self.product)], False)
                if tree[0] != "unit":
                    raise Limit
            elif (
                self.kind() == "num"
                and factor[0] not in ("pow", "div")
                and not (factor[0] == "sym" and self.peek(1) == "^")  # n2^n
                and self.peek(-1) not in (")", "}", "]", "!")
            ):
                raise Limit  # "2 3" is no product; 2^6 3^5 and \frac12 3^n are
            elif self.starts_factor():
                tree = ("mul", tree, factor := self.power())
            else:
                return tree

    def unit(self, tree):
        """The words after a value: a scale ("million"), a unit, or what we do not read."""
        text = ""
        while self.kind() == "text" or (text and self.peek() in ("/", "*", "^")):
            start, t = self.at, self.tokens[self.at][1]
            self.at += 1
            if t == "^":
                self.skip_group()
            text += " " * (t != "^") + "".join(x for _, x in self.tokens[start : self.at])
        scale = re.match(rf" ?({'|'.join(SCALES)})s?\b", text, re.I)
        if scale:
            factor, text = number(SCALES[scale[1].lower()]), text[scale.end() :]
            money = tree[0] == "unit"
            tree = (
                (*tree[:1], ("mul", tree[1], factor), *tree[2:]) if money else ("mul", tree, factor)
            )
        return ("unit", tree, *unit_key(text), text.strip()) if text.strip() else tree

    def signed(self):
        if self.take("-"):
            return ("neg", self.deeper(self.signed))
        return self.deeper(self.signed) if self.take("+") else self.power()

    def starts_factor(self) -> bool:
        r"""Whether a factor follows without a sign: 2x, x(x+1), 2\pi r."""
        t = self.peek()
        if self.kind() != "op":
            return self.kind() in ("num", "letter", "fun")
        if t == "[" and self.peek(1) in ("", ",", ")", *SET_SIGNS):  # the end of [1, 2[
            return False
        return t in STARTS or (t == "|" and not self.bars) or t.startswith(r"\begin")

    def power(self):
        tree = self.deeper(self.atom)
        while mark := self.take("^", "**", "!", "%", r"\deg"):
            if mark == "!":
                tree = ("fun", "factorial2" if self.take("!") else "factorial", tree)
            elif mark in ("%", r"\deg"):
                tree = ("percent" if mark == "%" else "deg", tree)
            else:
                tree = ("pow", tree, self.deeper(self.exponent))
        return tree

    def exponent(self):
        """2^{3^2} also where it is written 2^3^2."""
        minus = self.take("-")
        self.take("+")
        tree = self.deeper(self.atom)
        tree = ("neg", tree) if minus else tree
        return ("pow", tree, self.deeper(self.exponent)) if self.take("^", "**") else tree

    def group(self):
        r"""{...} or one token, of a number its first digit: the argument of \frac, \sqrt."""
        if self.kind() == "num" and len(self.peek()) > 1 and self.peek().isdigit():
            digits = self.peek()
            self.tokens[self.at : self.at + 1] = [("num", digits[0]), ("num", digits[1:])]
        return self.deeper(self.atom)

    def skip_group(self) -> None:
        """Past one token or one balanced pair of brackets, whatever is in it."""
        opening, depth = self.peek(), 0
        closing = {"{": "}", "(": ")"}.get(opening)
        while self.at < len(self.tokens):
            t = self.tokens[self.at][1]
            depth += (t == opening) - (t == closing)
            self.at += 1
            if closing is None or depth == 0:
                return
        raise Limit

    def numeral(self, text: str):
        if len(text) > MAX_DIGITS:
            raise Limit
        if self.take("_"):
            return ("based", text, self.group())
        value = Fraction(text.rstrip("."))
        if "." in text.rstrip(".") or "e" in text.lower():
            mantissa, _, exponent = text.lower().partition("e")
            ulp = Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
            return ("dec", value, len(mantissa.replace(".", "").lstrip("0")), ulp)
        top, sign, bottom = (self.peek(i) for i in range(3))
        if self.kind() == "num" and sign == "/":  # a mixed number: 3 1/2
            if top.isdigit() and bottom.isdigit() and int(top) < int(bottom):
                self.at += 3
                return ("num", value + Fraction(int(top), int(bottom)))
        elif top == r"\frac":  # 3\frac12
            start, fraction = self.at, self.deeper(self.atom)
            if fraction[1][0] == fraction[2][0] == "num" and 0 < fraction[1][1] < fraction[2][1]:
                return ("num", value + fraction[1][1] / fraction[2][1])
            self.at = start
        return ("num", value)

    def atom(self):
        kind, t = self.tokens[self.at]
        self.at += 1
        if kind == "num":
            return self.numeral(t)
        if kind == "fun":
            return self.function(t)
        if kind == "letter" or t in MARKED:
            return self.symbol(t)
        if kind == "time":
            half = self.tokens[self.at][1] if self.kind() == "text" else t.lstrip("0123456789:")
            self.at += self.kind() == "text"
            half = half.replace(".", "").strip().lower()
            hours, minutes = t[:5].split(":")
            return ("time", int(hours), int(minutes[:2]), half if half in ("am", "pm") else "")
        if kind == "text":
            if t[-1:].isdigit() or " " in t or self.starts_factor():
                raise Limit
            return ("sym", t) if len(t) == 1 else ("text", t.lower())
        if t == r"\frac":
            return ("div", self.group(), self.group())
        if t == r"\binom":
            return ("fun", "binomial", self.group(), self.group())
        if t == r"\sqrt":
            return self.root()
        if t == "|":
            self.bars += 1
            tree = self.items("|")
            self.need("|")
            self.bars -= 1
            return ("fun", "abs", tree)
        if t == "{":
            tree = self.items("}")
            self.need("}")
            return tree
        if t in PAIRS:
            tree = self.bracket(t)
            if tree[0] == "num" and tree[1].denominator == 1 and self.take("_"):
                return ("based", str(tree[1]), self.group())
            return tree
        if t == r"\$":
            tree = self.power()
            tree = self.unit(tree) if self.kind() == "text" else tree
            return tree if tree[0] == "unit" else ("unit", tree, *unit_key("$"), "$")
        if t in (r"\sum", r"\prod", r"\int"):
            return self.series(t[1:])
        if t.startswith(r"\begin"):
            return self.matrix(t.partition("{")[2].partition("}")[0].rstrip("*"))
        if t in (r"\emptyset", r"\Reals"):
            return ("set",) if t == r"\emptyset" else ("reals",)
        raise Limit

    def symbol(self, t: str):
        """A letter with its subscripts, primes and arguments; its name is how it is written."""
        start = self.at - 1
        if t == r"\infty":
            return ("const", "inf")
        if t in ("e", "i", r"\pi") and self.peek() != "_" and t not in self.indices:
            return ("const", t.lstrip("\\"))
        if t in MARKED:
            self.skip_group()
        while t in (r"\angle", r"\triangle") and self.kind() == "letter" and self.peek().isupper():
            self.at += 1
        while mark := self.take("_", "'"):
            if mark == "_":
                self.skip_group()
        if t in ("f", "g", "h") and [self.peek(i) for i in range(6)] == listed("^ { - 1 } ("):
            self.at += 5
        # f(x + 1), V(t), I(0) are values of functions; x(x + 1) is a product
        opening, inner, closing = (self.peek(i) for i in range(3))
        if opening == "(" and (
            t in ("f", "g", "h")
            or self.tokens[self.at - 1][1] == "'"
            or (closing == ")" and (t.isupper() or inner in ("t", "0")))
        ):
            argument = [inner] if closing == ")" and inner.isalpha() else []
            self.skip_group()
            written = [x for _, x in self.tokens[start : self.at] if x not in "{}"]
            return ("sym", " ".join(written), *argument)
        return ("sym", " ".join(x for _, x in self.tokens[start : self.at] if x not in "{}"))

    def function(self, f: str):
        f = {"lg": "log", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(f, f)
        if f == "sqrt":
            return self.root()
        base = power = None
        while mark := self.take("_", "^"):
            if mark == "_":
                base = self.group()
            else:
                power = self.group()
        if self.take("("):
            argument = self.bracket("(")
        else:  # \sin 2x: the factors up to the next sign or function
            minus = self.take("-")
            argument = self.power()
            while self.starts_factor() and self.kind() not in ("num", "fun"):
                if self.peek() in ("(", "|"):
                    break
                argument = ("mul", argument, self.power())
            argument = ("neg", argument) if minus else argument
        if power == ("neg", number(1)) and f in ("sin", "cos", "tan"):
            f, power = "arc" + f, None
        arguments = argument[3:] if argument[0] == "tuple" else (argument,)
        arguments = argument[1:] if argument[0] == "set" else arguments  # \max\{a, b\}
        tree = ("fun", f, *arguments) if base is None else ("fun", "log", argument, base)
        return ("pow", tree, power) if power else tree

    def root(self):
        index = number(2)
        if self.take("["):
            index = self.items("]")
            self.need("]")
        radicand = self.bracket("(") if self.take("(") else self.group()
        return ("pow", radicand, ("div", number(1), index))

    def series(self, kind: str):
        r"""\sum_{k=1}^{n} k, \prod, \int_0^1 x dx -> ("sum", letter, low, high, body)."""
        low = high = letter = None
        while mark := self.take("_", "^"):
            if mark == "^":
                high = self.group()
            elif kind == "int":
                low = self.group()
            else:
                self.need("{")
                letter, low = self.tokens[self.at][1], self.tokens[self.at + 1][1] == "=" or None
                self.at += 2
                low = low and self.sum()
                self.need("}")
        if kind == "int":
            pairs = zip(self.tokens, self.tokens[1:], strict=False)
            ends = [i for i, (d, x) in enumerate(pairs) if d[1] == "d" and x[0] == "letter"]
            end = min(i for i in ends if i >= self.at)
            letter = self.tokens[end + 1][1]
            self.tokens[end : end + 2] = [("op", ";")]
        if None in (low, high):
            raise Limit
        self.indices.append(letter)
        body = self.sum() if kind == "int" else self.product()
        self.indices.pop()
        if kind == "int":
            self.need(";")
        return (kind, letter, low, high, body)

    def bracket(self, opening: str):
        ends, bars = PAIRS[opening], self.bars
        self.bars = int(opening == r"\{")  # in {x | x > 3} the bar is no factor
        tree = self.items(*ends)
        if opening == r"\{" and self.take("|", ":"):
            tree, among = self.items(*ends), tree
            if not name(among):  # {x in A : ...}
                tree = ("cap", among, tree)
            self.need(*ends)
            self.bars = bars
            return tree
        closing = self.need(*ends)
        self.bars = bars
        if opening in (r"\lfloor", r"\lceil"):
            return ("fun", "floor" if opening == r"\lfloor" else "ceil", tree)
        items = tree[1:] if tree[0] == "list" else (tree,)
        if opening == r"\{":
            return ("set", *items)
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return tree
        if opening == r"\langle":
            return ("tuple", "(", ")", *items)
        return ("tuple", opening.replace("]", "("), closing.replace("[", ")"), *items)

    def matrix(self, environment: str):
        """Rows and columns; the cases of a function; relations in lines."""
        cases = environment == "cases"
        if not cases and not environment.endswith(("matrix", "array")):  # aligned, gathered
            rest = range(self.at, len(self.tokens))
            end = min(i for i in rest if self.tokens[i][1].startswith(r"\end"))
            lines = [t for t in self.tokens[self.at : end] if t[1] != "&"]
            lines = [("op", ",") if t[1] == "\\\\" else t for t in lines]
            self.at = end + 1
            return self.deeper(Parser(lines).answer)
        rows, row = [], []
        while True:
            while cases and (self.kind() == "text" or self.peek() in (",", "if")):
                self.at += 1  # "if x > 0"
            row.append(
                ("text", "else") if self.peek()[:4] in ("\\\\", r"\end") else self.relation()
            )
            self.take(",")
            if self.take("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.take("\\\\") or self.peek().startswith(r"\end"):
                break
        if not self.peek().startswith(r"\end") or len({len(r) for r in rows}) > 1:
            raise Limit
        self.at += 1
        if cases and len(rows[0]) == 1:
            return joined([r[0] for r in rows], False)
        tree = ("cases" if cases else "matrix", *rows)
        return ("fun", "det", tree) if environment == "vmatrix" else tree


def joined(found: list, either: bool):
    """A list; with relations other than =, one set: "or" unites, everything else intersects."""
    if len(found) > 1 and all(t[0] == "unit" for t in found):  # 3 hours and 20 minutes
        bases, factors = {t[2] for t in found}, [t[3] for t in found]
        if len(bases) == 1 and factors == sorted(set(factors), reverse=True):
            terms = [("mul", t[1], number(t[3] / factors[0])) for t in found]
            return ("unit", ("add", *terms), *found[0][2:])
    strict = [t for t in found if t[0] == "rel" and set(t[1]) - {"="}]
    sets = ("rel", "union", "cap", "minus", "tuple", "set", "reals")
    if len(found) == 1 or not strict or not all(t[0] in sets for t in found):
        return found[0] if len(found) == 1 else ("list", *found)
    either &= any(t[1] != ("!=",) for t in found)
    tree = found[0]
    for t in found[1:]:
        tree = ("union" if either else "cap", tree, t)
    return tree


def parse(s: str):
    """Tree of a cleaned answer. Raises Limit where it is too large or not mathematics that we
    read."""
    if not s or len(s) > MAX_CHARS:
        raise Limit
    try:
        tokens = tokenize(s, [])
        places = [i for i, t in enumerate(tokens) if t[1] in (r"\pm", r"\mp")]
        choices = list(product((True, False), repeat=min(len(places), 5)))
        if ("op", r"\mp") in tokens:  # all take the upper sign, or all the lower one
            choices = [(upper,) * len(places) for upper in (True, False)]
        elif len(places) > 4:
            raise Limit
        readings: list = []
        for uppers in choices:
            signed = list(tokens)
            for at, upper in zip(places, uppers, strict=True):
                signed[at] = ("op", "+" if upper == (tokens[at][1] == r"\pm") else "-")
            tree = Parser(signed).answer()
            items = tree[1:] if tree[0] == "list" else (tree,)
            readings += [t for t in items if t not in readings]
        return joined(readings, False)
    except (IndexError, ValueError, ZeroDivisionError, RecursionError, KeyError, TypeError):
        raise Limit from None


# -------------------------------------------------------------------------------------------------
# Values


def to_sympy(tree, budget: list, indices: dict):
    """The tree as sympy's number, root, polynomial or matrix, built node by node; a function of
    anything but rational numbers stays a name with arguments. `indices`: the values of those of
    sums."""
    import sympy

    budget[0] -= 1
    if budget[0] < 0:
        raise Limit
    op = tree[0]
    if op in ("num", "dec"):
        return sympy.Rational(tree[1].numerator, tree[1].denominator)
    if op == "const" and tree[1] != "inf":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[tree[1]]
    if op == "sym":
        return indices[tree[1]] if tree[1] in indices else sympy.Symbol(tree[1])
    if op == "expr":
        return tree[1]
    if op in ("sum", "prod", "int"):
        return series(tree, budget, indices)
    if op == "matrix" or (op == "tuple" and tree[1:3] == ("(", ")")):
        rows = tree[1:] if op == "matrix" else [[t] for t in tree[3:]]
        return sympy.Matrix([[to_sympy(t, budget, indices) for t in row] for row in rows])
    if op not in ("neg", "add", "mul", "div", "pow", "deg", "percent", "fun"):
        raise Limit
    children = factors(tree) if op == "mul" else tree[1 + (op == "fun") :]
    args = [to_sympy(t, budget, indices) for t in children]
    if args[-1].is_Matrix and op in ("pow", "div", "percent", "deg"):
        raise Limit
    if op == "fun":
        return function(tree[1], args)
    if op == "pow":
        return limited(power(*args))
    if op == "div" and args[1] == 0:
        raise ZeroDivisionError
    if op in ("add", "mul"):
        return combined(op, args)
    if op == "div":
        return limited(args[0] / args[1])
    return {"neg": -1, "percent": sympy.Rational(1, 100), "deg": sympy.pi / 180}[op] * args[0]


def factors(tree) -> list:
    found = []
    while tree[0] == "mul":
        found.append(tree[2])
        tree = tree[1]
    return [tree, *reversed(found)]


def combined(op: str, args: list):
    """The sum or product, in one step: sympy sorts all terms in each."""
    import sympy

    if any(x.is_Matrix for x in args):
        return sum(args[1:], args[0]) if op == "add" else prod(args[1:], start=args[0])
    if sum(bits(x) for x in args) > 4 * MAX_BITS:
        raise Limit
    return limited(sympy.Add(*args) if op == "add" else sympy.Mul(*args))


def bits(x) -> int:
    """The size of an expression's rational factor."""
    n = x.as_coeff_Mul()[0]
    return n.p.bit_length() + n.q.bit_length() if n.is_Rational else 0


def limited(value):
    if not value.is_Matrix and bits(value) > MAX_BITS:
        raise Limit
    return value


def power(base, exponent):
    """Evaluated where it is a rational number, a root of one, or a polynomial's power."""
    import sympy

    if base.is_Matrix:
        raise Limit
    if base == 0 and exponent.is_Rational:
        if exponent < 0:
            raise ZeroDivisionError
        return sympy.Integer(exponent == 0)
    if base.is_Rational and exponent.is_Integer:
        bits = max(base.p.bit_length(), base.q.bit_length())
        if bits > 1 and abs(exponent) * bits > 2 * MAX_BITS:
            raise Limit
        return base**exponent
    if base.is_Rational and exponent.is_Rational and exponent.q <= 12 and abs(exponent.p) < 100:
        root = sympy.Rational(isqrt(abs(base.p)), isqrt(base.q))
        if exponent.q == 2 and root * root == base:  # sympy would factor a large number
            return power(root, sympy.Integer(exponent.p))
        if base.p.bit_length() + base.q.bit_length() <= 128:
            odd = base < 0 and exponent.q % 2  # then the real root
            return (-1) ** exponent.p * (-base) ** exponent if odd else base**exponent
    if exponent.is_Integer and abs(exponent) <= 60 and not (base.is_Mul or base.is_Pow):
        return base**exponent
    return sympy.Function("pow")(base, exponent)  # sympy evaluates its own in a product


def function(f: str, args: list):
    """A function of rational numbers that has a rational value; another stays a name."""
    import sympy

    if f == "det" and args[0].is_Matrix and args[0].rows == args[0].cols <= 4:
        return args[0].det(method="berkowitz")
    if any(x.is_Matrix for x in args):
        raise Limit
    exact = {"floor": sympy.floor, "ceil": sympy.ceiling, "abs": sympy.Abs, "max": max, "min": min}
    if f in exact and all(x.is_Rational for x in args):
        return exact[f](args) if f in ("max", "min") else exact[f](args[0])
    if all(x.is_Integer for x in args):
        if f in ("gcd", "lcm"):
            return getattr(sympy, f)(args)
        if f in ("factorial", "factorial2", "binomial") and min(args) >= 0:
            if args[0] > 3000:
                raise Limit
            return getattr(sympy, f)(*args)
    return sympy.Function(f)(*args)


def series(tree, budget: list, indices: dict):
    """A sum or product with numbers as its ends is added up; an integral is one of a polynomial."""
    import sympy

    kind, letter, low, high, body = tree
    low = to_sympy(low, budget, indices)
    index = sympy.Symbol("#" + letter)  # no letter of the answer
    infinite = high == ("const", "inf")
    high = sympy.oo if infinite else to_sympy(high, budget, indices)
    inner = to_sympy(body, budget, indices | {letter: index})
    if kind == "int":
        if size_of(inner) > MAX_TERMS or not inner.is_polynomial(index) or infinite:
            raise Limit
        ends = []
        for end in (low, high):
            value = sympy.Integer(0)
            for coefficient in sympy.Poly(inner, index).integrate().all_coeffs():
                value = limited(value * end + coefficient)
            ends.append(value)
        return ends[1] - ends[0]
    if not (low.is_Integer and high.is_Integer):
        return sympy.Function(kind)(index, low, high, inner)
    if high - low > MAX_TERMS:
        raise Limit
    steps = [indices | {letter: sympy.Integer(k)} for k in range(int(low), int(high) + 1)]
    terms = [to_sympy(body, budget, values) for values in steps]
    return combined("add" if kind == "sum" else "mul", terms or [sympy.Integer(kind == "prod")])


def size_of(expression) -> int:
    """How many terms the expanded expression has, or its degree, at most."""
    if expression.is_Add:
        return min(sum(map(size_of, expression.args)), 10**6)
    if expression.is_Mul:
        return min(prod(map(size_of, expression.args)), 10**6)
    if expression.is_Pow and expression.exp.is_Integer:
        n, exponent = size_of(expression.base), min(abs(int(expression.exp)), 10**6)
        return min(n ** min(exponent, 20) if n > 1 else exponent, 10**6)
    return 1


_local = threading.local()


def context(precision: int = 0):
    """This thread's own arithmetic at DIGITS[precision] digits."""
    if not hasattr(_local, "contexts"):
        from mpmath.ctx_mp import MPContext

        _local.contexts = [MPContext() for _ in DIGITS]
        for mp, digits in zip(_local.contexts, DIGITS, strict=True):
            mp.dps = digits
    return _local.contexts[precision]


class Number:
    """Evaluates expressions at a point {letter: number} in floating point, on a budget of nodes.
    log10: what a bare \\log means."""

    def __init__(self, budget: list, precision: int = 0, log10: bool = False):
        self.budget, self.mp, self.log10 = budget, context(precision), log10
        self.cost = 1 + 4 * precision

    def __call__(self, x, point: dict):
        """A finite mpf or mpc. Raises Limit, ZeroDivisionError."""
        self.budget[0] -= self.cost
        if self.budget[0] < 0:
            raise Limit
        mp = self.mp
        if x.is_Rational:
            self.budget[0] -= (x.p.bit_length() + x.q.bit_length()) // 400
            return mp.mpf(x.p) / x.q
        if x.is_Symbol:
            n = point[x.name]
            return mp.mpf(n.numerator) / n.denominator if isinstance(n, Fraction) else n
        f = type(x).__name__
        if f in ("Pi", "Exp1", "ImaginaryUnit"):
            return {"Pi": mp.pi, "Exp1": mp.e, "ImaginaryUnit": mp.j}[f] * 1
        if f in ("sum", "prod"):
            return self.series(f, x.args, point)
        args = [self(t, point) for t in x.args]
        if x.is_Add or x.is_Mul:
            value = mp.fsum(args) if x.is_Add else mp.fprod(args)
        elif x.is_Pow or f == "pow":
            value = self.power(*args, x.args[1])
        else:
            value = self.function(f, args)
        if mp.isnan(value) or mp.isinf(value):
            raise Limit
        for component in (value.real, value.imag):  # mpmath adds squares of any sizes exactly
            if component and abs(mp.mag(component)) > 2 * MAX_LOG2:
                raise Limit
        small = mp.mpf(10) ** (5 - mp.dps)
        if isinstance(value, mp.mpc) and abs(value.imag) <= abs(value.real) * small:
            return value.real
        return value

    def power(self, x, y, exponent):
        mp = self.mp
        if x == 0:
            if isinstance(y, mp.mpc) or y < 0:
                raise ZeroDivisionError
            return mp.mpf(y == 0)
        if abs(y) * (abs(mp.log(abs(x), 2)) + 1) > MAX_LOG2:
            raise Limit
        if isinstance(y, mp.mpf) and mp.isint(y):
            return x ** int(y)
        odd = exponent.is_Rational and exponent.q % 2
        if odd and isinstance(x, mp.mpf) and x < 0:
            return (-1) ** exponent.p * (-x) ** y  # the real root
        return x**y

    def function(self, f: str, args: list):
        mp, x, y = self.mp, args[0], args[-1]
        if abs(x) > (MAX_LOG2 / 2 if f in ("exp", "cis", "sinh", "cosh", "tanh") else 10**30):
            raise Limit
        if f == "log":
            return mp.log(x) / (mp.log(y) if len(args) == 2 else mp.log(10) if self.log10 else 1)
        if f in ("abs", "cis", "ln"):
            return {"abs": abs, "cis": mp.expj, "ln": mp.log}[f](x)
        gamma = f in ("factorial", "factorial2", "binomial")
        if gamma or f in ("floor", "ceil", "max", "min", "gcd", "lcm", "cbrt"):
            whole = [mp.nint(v) if abs(v - mp.nint(v)) < 1e-40 else v for v in args]
            self.budget[0] -= 60 * self.cost * (gamma and not all(map(mp.isint, args)))
            if any(isinstance(v, mp.mpc) or (gamma and abs(v) > 1500) for v in args):
                raise Limit
            if f in ("gcd", "lcm"):
                if not all(map(mp.isint, whole)):
                    raise Limit
                return mp.mpf({"gcd": gcd, "lcm": lcm}[f](*map(int, whole)))
            if f in ("max", "min"):
                return (max if f == "max" else min)(args)
            if f == "cbrt":
                return mp.sign(x) * mp.cbrt(abs(x))
            args = whole if f in ("floor", "ceil") else args
            return getattr(mp, {"factorial2": "fac2"}.get(f, f))(*args)
        if len(args) > 1 or f not in FUNCTIONS:
            raise Limit
        return getattr(mp, f.replace("arc", "a"))(x)

    def series(self, kind: str, args: tuple, point: dict):
        """Up to MAX_TERMS terms, or a geometric series."""
        mp, (index, low, high, body) = self.mp, args
        infinite = high.is_infinite
        start = self(low, point)
        end = start + 5 if infinite else self(high, point)
        if not (mp.isint(start) and mp.isint(end)) or end - start > MAX_TERMS:
            raise Limit
        places = range(int(start), int(end) + 1)
        terms = [self(body, point | {index.name: mp.mpf(k)}) for k in places]
        if not infinite:
            return mp.fsum(terms) if kind == "sum" else mp.fprod(terms)
        ratio = terms[1] / terms[0]
        pairs = zip(terms, terms[1:], strict=False)
        if kind == "prod" or abs(ratio) >= 1 or not all(near(x * ratio, y) for x, y in pairs):
            raise Limit
        return terms[0] / (1 - ratio)


COUNTING = ("N", "n", "m", "k")  # letters for whole numbers
LARGE = (42, 60, 127, 37182145)
REALS = listed("0.7133 2.3617 31.47 -0.3841 -3.7219 0.1093 -12.63 4 87.91 -71.33 -3 1.2749")
REALS = [Fraction(x) for x in (*REALS, "12345.7", "-13579.3")]
SHIFT = Fraction("0.3717")


def points(expressions: list) -> list[dict]:
    """Where expressions are compared: letters that count at consecutive numbers and some large
    ones, the others at reals of both signs, two of them whole; and all of them beside the numbers
    that occur, where \\max(x, 200) or \\gcd(n, 29) change."""
    names = sorted(letters(*expressions))
    counting = [s for s in COUNTING if s in names]
    if not names:
        return [{}]
    chosen = []
    for j in range(17 + len(LARGE) if counting else len(REALS)):
        point = {}
        for i, s in enumerate(names):
            seed = zlib.crc32(s.encode())
            x = REALS[(j + seed * min(i, 1)) % len(REALS)]
            x = abs(x) if j < 3 else x
            # letters at the same place still differ
            point[s] = x if x.denominator == 1 else x * (1 + Fraction(seed % 97, 1000))
        n = LARGE[j - 17] if j >= 17 else j + 1
        for place, s in enumerate(counting[::-1] if j % 4 == 3 else counting):  # also k > n
            point[s] = Fraction(1 + (7 * j + 3 * place) % n if place else n)
        chosen.append(point)
    for c in constants(expressions):
        for sign in (1, -1):
            beside = {s: sign * (c + SHIFT * (i + 1)) for i, s in enumerate(names)}
            chosen.append(beside | {s: c * (i + 1) for i, s in enumerate(counting)})
    return chosen


def constants(expressions: list) -> list[Fraction]:
    """The sizes of some numbers from 20 to 10^9 in expressions."""
    atoms = set().union(*(e.atoms() for e in expressions))
    sizes = {abs(n) for n in atoms if n.is_Rational and 20 <= abs(n) <= 10**9}
    return [Fraction(int(n.p), int(n.q)) for n in sorted(sizes)[:4]]


def near(x, y) -> bool:
    """Equal to 35 digits."""
    mp = context()
    if mp.isinf(x) or mp.isinf(y):
        return x == y
    return abs(x - y) <= mp.mpf(10) ** -35 * max(abs(x), abs(y))


# -------------------------------------------------------------------------------------------------
# Comparison

MEASURES = ("unit", "percent", "deg")
SETS = ("tuple", "union", "cap", "minus", "set", "rel", "reals")
STRUCTURES = (*SETS, *listed("list matrix mod ratio time based text cases unit"))


def name(tree) -> bool:
    """A left side that only names the value: x, f(x), AB, (p, q), S_1 : S_2, \\frac{NO}{BO}."""
    if tree[0] in ("mul", "div", "ratio", "tuple"):
        return all(name(t) for t in tree[3 if tree[0] == "tuple" else 1 :])
    named = tree[0] in ("sym", "text") or tree in (("const", "i"), ("const", "e"))
    return named or (tree[:2] == ("fun", "abs") and name(tree[2]))


def symbols(tree) -> set:
    """The letters that the tree's value depends on."""
    if tree[0] == "sym":
        return {tree[1]}
    inner = [t for t in tree if isinstance(t, tuple) and t]
    found = set().union(*map(symbols, inner))
    return found - {tree[1]} if tree[0] in ("sum", "prod", "int") else found


def contains(tree, head: tuple) -> bool:
    """Whether a node of the tree begins like `head`."""
    return tree[: len(head)] == head or any(contains(t, head) for t in tree if isinstance(t, tuple))


class Same:
    """Equality of two trees, on one budget of nodes built and evaluated."""

    def __init__(self):
        self.budget = [MAX_NODES]

    def __call__(self, a, b) -> bool:
        if a == b:
            return True
        a, b = self.shaped(a), self.shaped(b)
        kinds = {a[0], b[0]}
        if kinds & set(MEASURES):
            return self.measured(a, b)
        if kinds == {"rel"} and set(a[1] + b[1]) == {"="}:
            return self.equations(a, b)
        for x, y in ((a, b), (b, a)):
            if x[0] == "rel" and set(x[1]) == {"="} and y[0] not in ("list", "set", "union", "rel"):
                return self.named(x, y)
            if x[0] in ("list", "set") and y[0] not in (*SETS, "list"):  # one value said twice
                return len(x) > 1 and all(self(t, y) for t in x[1:])
        if kinds <= {"list", "set"} or "list" in kinds:
            return self.lists(a, b)
        if kinds == {"cases"}:
            return self.unordered(a[1:], b[1:], self.rows)
        for x, y in ((a, b), (b, a)):
            if x[0] == "matrix" and y[0] == "tuple":  # a vector as a column or a row
                entries = [t for row in x[1:] for t in row]
                one = 1 in (len(x) - 1, len(x[1]))
                return one and y[1:3] == ("(", ")") and self.rows(entries, y[3:])
        if kinds == {"matrix"}:
            return len(a) == len(b) and all(map(self.rows, a[1:], b[1:]))
        if kinds == {"mod"}:
            r, q, modulus = (to_sympy(t, self.budget, {}) for t in (a[2], b[2], a[3]))
            same = self(a[1], b[1]) and self.scalars(a[3], b[3])
            return bool(same and modulus.is_Integer and modulus > 0 and (r - q) % modulus == 0)
        if kinds & {"ratio", "time"}:
            return self.ratios(a, b)
        if kinds & set(SETS):
            return self.regions(a, b)
        if kinds & set(STRUCTURES):
            return kinds == {"based"} and a[1] == b[1] and self(a[2], b[2])
        return self.scalars(a, b)

    def rows(self, xs, ys) -> bool:
        return len(xs) == len(ys) and all(map(self, xs, ys))

    def shaped(self, tree):
        """Sums and multiples of matrices and of points as one matrix."""
        shapes = ("matrix",), ("tuple", "(", ")")
        if tree[0] not in ("mul", "div", "neg", "add") or not any(
            contains(tree, s) for s in shapes
        ):
            return tree
        value = to_sympy(tree, self.budget, {})
        if not value.is_Matrix:
            return tree
        return ("matrix", *(tuple(("expr", x) for x in row) for row in value.tolist()))

    def measured(self, a, b) -> bool:
        """Values with a unit, degrees, per cent: the mark may be missing on one side."""
        if a[0] == b[0]:
            if a[2:4] != b[2:4]:  # 100 cm and 1 m
                x, y = (("mul", t[1], number(t[3])) for t in (a, b))
                return a[2] == b[2] and self(x, y)
            return self(a[1], b[1])
        x, y = (a, b) if a[0] in MEASURES else (b, a)
        if y[0] == "rel":
            return set(y[1]) == {"="} and self.named(y, x)
        if y[0] == "list":
            return all(self(t, x) for t in y[1:])
        if y[0] in MEASURES or (y[0] in STRUCTURES and x[0] != "unit"):
            return False
        if x[0] != "unit":
            return self.scalars(x, y) or self(x[1], y)
        if x[4] in symbols(y):  # 5 m is five metres, or 5 times m
            return self(("mul", x[1], ("sym", x[4])), y)
        return self(x[1], y)

    def named(self, x, y) -> bool:
        """x = 5 against 5."""
        if name(x[2]) and self(x[-1], y):
            return True
        if len(x) == 4 and name(x[-1]):
            return self(x[2], y)
        if len(x) > 4 and symbols(x[2]) and not symbols(x[3:]):
            x = (*x[:2], *x[3:])  # a + b = 3 + 14 = 17
        if x[2][0] in STRUCTURES:
            return False
        return all(self.scalars(x[2], t) for t in x[3:]) and self(x[-1], y)

    def lists(self, a, b) -> bool:
        a, b = spread(a), spread(b)
        for x, y in ((a, b), (b, a)):
            lefts = [t[2] for t in x[1:] if t[0] == "rel" and t[1] == ("=",) and name(t[2])]
            if y[0] == "tuple" and len(lefts) == len(x) - 1 == len(set(lefts)):  # x = 1, y = 2
                return y[1:3] == ("(", ")") and self.rows([t[-1] for t in x[1:]], y[3:])
        items = [t[1:] if t[0] in ("list", "set") else (t,) for t in (a, b)]
        return self.unordered(*items, self)

    def unordered(self, xs, ys, equal) -> bool:
        """Equal as sets: every item has its partner on the other side, if there are as many on both
        sides one of its own."""
        if len(xs) * len(ys) > 900:
            raise Limit
        tried = partial(self.tried, equal)
        if len(xs) == len(ys):
            for x in xs:
                partner = next((i for i, y in enumerate(ys) if tried(x, y)), None)
                if partner is None:
                    return False
                ys = ys[:partner] + ys[partner + 1 :]
            return True
        left = all(any(tried(x, y) for y in ys) for x in xs)
        return left and all(any(tried(x, y) for x in xs) for y in ys)

    def tried(self, equal, x, y) -> bool:
        """Two that cannot be compared are not equal."""
        try:
            return equal(x, y)
        except (Limit, ArithmeticError):
            if self.budget[0] < 0:
                raise
            return False

    def equations(self, a, b) -> bool:
        if name(a[2]) and a[2] == b[2] and self(a[-1], b[-1]):
            return True
        if len(a[2]) == len(b[2]) == 3 and a[2][0] == b[2][0] == "sym":  # f(t) = ..., f(x) = ...
            if a[2][1][0] != b[2][1][0] or a[2][2] in symbols(b[-1]):
                return False
            return self(a[-1], renamed(b[-1], b[2][2], a[2][2]))
        left, right = spread(a), spread(b)
        if "list" in (left[0], right[0]):
            return left[0] == right[0] and self.lists(left, right)
        if a[2][0] in STRUCTURES or b[2][0] in STRUCTURES:
            return self(a[2], b[2]) and self(a[-1], b[-1])
        return self.proportional(a[2:], b[2:], signed=False)

    def proportional(self, a, b, signed: bool) -> bool:
        """Whether left minus right of both are the same up to a factor (a positive one)."""
        if len(a) != 2 or len(b) != 2 or symbols(a) != symbols(b) or not symbols(a):
            return False
        first, compared = None, 0
        for _, (u, v) in self.values([self.apart(*a), self.apart(*b)]):
            if context().mpc in (type(u), type(v)):
                continue
            if (u == 0) != (v == 0) or (signed and u * v < 0):
                return False
            first = first or (u and (u, v))
            if first and not near(first[0] * v, first[1] * u):
                return False
            compared += u != 0
        return compared >= 3

    def ratios(self, a, b) -> bool:
        if a[0] == b[0] == "time":
            return a[1:3] == b[1:3] and (a[3] == b[3] or "" in (a[3], b[3]))
        if any(t[0] == "time" and (t[3] or t[2] < 10) for t in (a, b)):  # no ratio
            return False
        a, b = (("ratio", number(t[1]), number(t[2])) if t[0] == "time" else t for t in (a, b))
        for x, y in ((a, b), (b, a)):
            if y[0] != "ratio":
                return len(x) == 3 and y[0] == "div" and self.scalars(("div", *x[1:]), y)
        if len(a) != len(b) or number(0) in a + b:
            return False
        pairs = list(zip(a[2:], b[2:], strict=True))
        return all(self.scalars(("mul", a[1], y), ("mul", b[1], x)) for x, y in pairs)

    # Sets of reals: equal if they agree at every end point, beside it, between and beyond

    def regions(self, a, b) -> bool:
        if a[0] == b[0] == "tuple":
            return a[1:3] == b[1:3] and self.rows(a[3:], b[3:])
        if a[0] == b[0] == "rel":
            if a[1] == b[1] and self.rows(a[2:], b[2:]):
                return True
            bounded = [name(x[2]) or name(x[3]) for x in (a, b)]  # like x < 5
            if not all(bounded):
                turned = [x[3:1:-1] if x[1][0][0] == ">" else x[2:] for x in (a, b)]
                strict = {x[1][0].lstrip("<>") for x in (a, b)}
                if len(strict) == 1 and self.proportional(*turned, signed=True):
                    return True
                if not any(bounded):
                    return False
        subjects = [unknowns(t) for t in (a, b)]
        if a[0] == b[0] in ("cap", "union") and self.unordered(parts(a), parts(b), self):
            return True
        if max(map(len, subjects)) > 1:
            return False
        if subjects[0] and subjects[1] and subjects[0] != subjects[1]:
            return False
        a, b = interval(a), interval(b)
        if a[0] == b[0] == "tuple" and len(a) == len(b) == 5:
            return a[1:3] == b[1:3] and self.rows(a[3:], b[3:])
        (ends, in_a), (more, in_b) = self.region(a), self.region(b)
        ends = sorted(ends + more)
        mp = context()
        probes = [mp.mpf(x.numerator) / x.denominator for x in REALS] + [mp.mpf(0)]
        for low, high in zip(ends, ends[1:] or ends, strict=False):
            probes += [low, high, (low + high) / 2]
        probes += [end * (1 + d) + d for end in ends for d in (mp.mpf("1e-9"), mp.mpf("-1e-9"))]
        return all(in_a(p) == in_b(p) for p in probes)

    def region(self, tree):
        """(the finite ends of a set of reals, whether a number is in it)"""
        tree = interval(tree)
        if tree[0] == "reals":
            return [], lambda p: True
        if tree[0] in ("union", "cap", "minus"):
            (first, in_first), (second, in_second) = map(self.region, tree[1:])
            if tree[0] == "union":
                return first + second, lambda p: in_first(p) or in_second(p)
            return first + second, lambda p: in_first(p) and in_second(p) == (tree[0] == "cap")
        if tree[0] == "set":
            members = [self.real(t) for t in tree[1:]]
            return members, lambda p: any(near(v, p) for v in members)
        if tree[0] == "rel" and len(symbols(tree)) == 1:
            return [], partial(
                self.holds, tree[1], [to_sympy(t, self.budget, {}) for t in tree[2:]]
            )
        if tree[0] != "tuple" or len(tree) != 5:
            raise Limit
        low, high = (self.real(t) for t in tree[3:])
        if low > high:
            raise Limit  # a pair, not an interval

        def inside(p) -> bool:
            at_low, at_high = near(low, p), near(high, p)
            if at_low or at_high:
                return (tree[1] == "[" or not at_low) and (tree[2] == "]" or not at_high)
            return low < p < high

        return [v for v in (low, high) if not context().isinf(v)], inside

    def real(self, tree):
        """A bound's value: a real number or an infinity."""
        infinite = {("const", "inf"): 1, ("neg", ("const", "inf")): -1}.get(tree)
        if infinite:
            return context().inf * infinite
        value = Number(self.budget)(to_sympy(tree, self.budget, {}), {})
        if isinstance(value, context().mpc):
            raise Limit
        return value

    def holds(self, relations: tuple, sides: list, p) -> bool:
        """Whether an inequality of one unknown is true; where a side is not real it is not."""
        point = dict.fromkeys(letters(*sides), p)
        try:
            values = [Number(self.budget)(side, point) for side in sides]
        except ZeroDivisionError:
            return False
        for relation, x, y in zip(relations, values, values[1:], strict=False):
            if context().mpc in (type(x), type(y)):
                return False
            equal = near(x, y) or abs(x - y) < 1e-30
            true = {"<": x < y, ">": x > y}.get(relation[0], False) and not equal
            if relation == "!=":
                true = not equal
            if not true and not (equal and relation in ("=", "<=", ">=")):
                return False
        return True

    # Numbers and expressions

    def scalars(self, a, b) -> bool:
        if a[0] in STRUCTURES or b[0] in STRUCTURES:
            return a[0] in STRUCTURES and b[0] in STRUCTURES and self(a, b)
        if a[0] == b[0] == "num":
            return a[1] == b[1]
        constant = [without_constant(t) for t in (a, b)]
        if all(constant):  # F + C and G + C: F - G is the same everywhere
            apart = self.apart(*constant)
            found = [v for _, (v,) in self.values([apart])]
            enough = len(found) > 2 or not letters(apart)
            return enough and all(abs(v - found[0]) < 1e-25 for v in found)
        x, y = (to_sympy(t, self.budget, {}) for t in (a, b))
        if self.agree(x, y, False):
            return True
        for d, other, exact in ((a, b, y), (b, a, x)):  # a decimal that is right in 10 digits
            digits, ulp = decimal(d)
            if digits >= 10 and not decimal(other)[0] and not letters(exact):
                apart = Number(self.budget)(x - y, {})
                return bool(abs(apart) * ulp.denominator < ulp.numerator)
        has_log = contains(a, ("fun", "log")) or contains(b, ("fun", "log"))
        return has_log and self.agree(x, y, True)

    def apart(self, a, b):
        return to_sympy(("add", a, ("neg", b)), self.budget, {})

    def values(self, expressions: list, log10: bool = False):
        """(point, the expressions' values) wherever they have one."""
        evaluate = Number(self.budget, 0, log10)
        for point in points(expressions):
            try:
                found = [evaluate(e, point) for e in expressions]
            except (ZeroDivisionError, ValueError, Limit):  # ValueError: at a pole
                if self.budget[0] < 0:
                    raise
                continue
            yield point, found

    def agree(self, x, y, log10: bool) -> bool:
        """sympy's verdict on numbers, else equal wherever both are real (everywhere, where i occurs
        or neither side is real) and not refuted by sympy."""
        import sympy

        apart = x - y
        if apart.is_Rational:
            return apart == 0
        mpc, high = context().mpc, Number(self.budget, 1, log10)
        constant = not letters(apart)
        everywhere = constant or apart.has(sympy.I)
        compared, complex_values = 0, []
        for point, (u, v) in self.values([x, y], log10):
            if not everywhere and mpc in (type(u), type(v)):
                complex_values.append(near(u, v))
                continue
            gap, alike = abs(u - v), near(u, v)
            if not alike and gap > 1e-25 * max(1, abs(u)):
                return False
            if not alike or compared < 2:  # at 300 digits a true zero shrinks
                s, t = high(x, point), high(y, point)
                least = high.mp.mpf(10) ** -200
                if abs(s - t) > least * max(abs(s), abs(t)) and abs(s - t) > least * gap:
                    return False
            compared += 1
        if compared < 2 - constant:
            return compared == 0 and len(complex_values) > 2 and all(complex_values)
        return constant or not refuted(apart)


def letters(*expressions) -> set[str]:
    """The free letters of sympy's expressions; "#k" is an index."""
    return {s.name for e in expressions for s in e.free_symbols if s.name[0] != "#"}


def refuted(apart) -> bool:
    """Whether sympy finds that a difference is another polynomial than 0; not asked where that
    would have many terms."""
    import sympy

    if size_of(apart) > MAX_TERMS:
        return False
    try:
        return not sympy.Poly(apart, *apart.free_symbols, domain="QQ").is_zero
    except (sympy.PolynomialError, sympy.CoercionFailed):
        return False


def decimal(tree) -> tuple:
    """(significant digits, weight of the last one) of a decimal, also one times a power of ten."""
    if tree[0] == "dec":
        return tree[2:]
    if tree[0] in ("neg", "percent"):
        digits, ulp = decimal(tree[1])
        return digits, ulp / (100 if tree[0] == "percent" else 1)
    if tree[0] == "mul" and tree[2][:2] == ("pow", number(10)):
        digits, ulp = decimal(tree[1])
        exponent = tree[2][2]
        n = exponent[1] if exponent[0] == "num" else -exponent[1][1] if exponent[0] == "neg" else 0
        if abs(n) < 400:
            return digits, ulp * Fraction(10) ** int(n)
    return 0, Fraction(0)


def without_constant(tree):
    """F of F + C, or None."""
    rest = [t for t in tree[1:] if t not in (("sym", "C"), ("sym", "c"))]
    once = tree[0] == "add" and len(rest) == len(tree) - 2
    return ("add", *rest) if once and not {"C", "c"} & symbols(("add", *rest)) else None


def renamed(tree, old: str, new: str):
    if tree == ("sym", old):
        return ("sym", new)
    return tuple(renamed(t, old, new) if isinstance(t, tuple) else t for t in tree)


def spread(tree):
    """(p, q) = (2, 3) as p = 2, q = 3."""
    if tree[0] != "rel" or tree[1] != ("=",) or not name(tree[2]):
        return tree
    left, right = tree[2:]
    if left[0] != "tuple" or right[0] != "tuple" or len(left) != len(right):
        return tree
    pairs = zip(left[3:], right[3:], strict=True)
    return ("list", *(("rel", ("=",), x, y) for x, y in pairs))


def interval(tree):
    """An inequality between a name and bounds as an interval; another tree as it is."""
    if tree[0] != "rel" or symbols(tree[2]) & symbols(tree[3]):
        return tree
    ops, sides, infinite = tree[1], tree[2:], ("const", "inf")
    if len(sides) == 3 and name(sides[1]) and set(ops) <= {"<", "<="}:
        opening, closing = "(" if ops[0] == "<" else "[", ")" if ops[1] == "<" else "]"
        return ("tuple", opening, closing, sides[0], sides[2])
    if len(sides) != 2 or name(sides[0]) == name(sides[1]) or "fun" in (sides[0][0], sides[1][0]):
        return tree
    (op,), bound = ops, sides[1] if name(sides[0]) else sides[0]
    if not name(sides[0]):
        op = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(op, op)
    if op in ("=", "!="):
        return ("set", bound) if op == "=" else ("minus", ("reals",), ("set", bound))
    if op[0] == "<":
        return ("tuple", "(", ")" if op == "<" else "]", ("neg", infinite), bound)
    return ("tuple", "(" if op == ">" else "[", ")", bound, infinite) if op[0] == ">" else tree


def unknowns(tree) -> set:
    """The names that inequalities in the tree are about."""
    if tree[0] == "rel":
        return {t for t in tree[2:] if name(t) and t[0] != "fun"} or {
            ("sym", s) for s in symbols(tree)
        }
    inner = tree[1:] if tree[0] in ("cap", "union", "minus") else ()
    return set().union(*map(unknowns, inner))


def parts(tree) -> list:
    """The members of a chain of unions, or of intersections."""
    return [p for t in tree[1:] for p in (parts(t) if t[0] == tree[0] else [t])]


def _choice(s: str) -> tuple[str, bool]:
    """The letter of "(C)", "C", "C.", "(C) 12", "Option C", none where another follows it; and
    whether there is nothing else."""
    s = re.sub(r"\\(?:text|math)[a-z]*\s?\{([^{}]*)\}", r"\1", s)
    s = re.sub(r"^\W*(?:option|choice|answer)\s", "", s, flags=re.I).strip(" *$")
    m = re.match(r"\(?([A-J])(?:\)|[.:,](?=\s|$)|$)(?!\s*(?:[-+*/^=(,&]|and\b|or\b))", s)
    if not m:
        return "", False
    others = re.findall(r"\(([A-J])\)|[,;]\s?\(?([A-J])\b(?!\s[a-z])", s[m.end(1) :])
    return ("" if any((a or b) != m[1] for a, b in others) else m[1]), m.end() == len(s)


def _readings(s: str, other: str) -> list:
    """The trees of an answer: of "1,234" the number, and the list too where that may be meant."""
    if not GROUPED.search(s):
        return [parse(s)]
    forms = [GROUPED.sub(lambda m: m.group().replace(",", ""), s)]
    listed_too = not GROUPED.search(other) and "," in other and not re.search(r",0\d\d", s)
    listed_too |= re.fullmatch(r"\d{3}(,\d{3}){2,200}", s) is not None
    if listed_too or re.search(r"[(\[]|\\\{", s):
        forms.append(s)
    return [parse(form) for form in forms]


def _compare(p: str, g: str) -> bool:
    """Equality of two cleaned answers: by mathematics where both can be read, else as text."""
    try:
        pairs = list(product(_readings(p, g), _readings(g, p)))
    except Limit:
        return _same_words(p, g)
    for x, y in pairs:
        try:
            if Same()(x, y):
                return True
        except Exception:  # a limit, a pole, shapes that do not fit: whatever sympy raises
            continue
    return False


def _same_words(p: str, g: str) -> bool:
    if words(p) == words(g) != "":
        return True
    if not re.search("[A-Za-z]{3}", p) or re.search(r"\d|\\(?!text)", p + g):
        return False
    sides = [re.split(r"[,;]|\band\b|\bor\b", re.sub(r"\\text|[{}]", " ", s)) for s in (p, g)]
    names = [sorted(words(t) for t in side if t.strip()) for side in sides]  # in any order
    return len(names[0]) > 1 and names[0] == names[1]


def is_equal(prediction: str, gold: str) -> bool:
    """Whether two answers are the same. Symmetric but for multiple choice, where the gold is the
    letter. Any objects give a verdict."""
    prediction, gold = _text(prediction), _text(gold)
    try:
        p, g = clean(prediction), clean(gold)
    except Limit:
        return prediction.split() == gold.split()
    if not p or not g:
        return False
    if p == g:
        return True
    letter, alone = _choice(g)
    small = re.fullmatch(r"\(?[a-j]\)?", p)  # (c) for C
    if letter and alone and _choice(p.upper() if small else p)[0] == letter:
        return True
    if CHOICES.fullmatch(p) and CHOICES.fullmatch(g):  # "A and C" is "AC"
        found = [re.findall(r"\b[A-J]+\b", re.sub("text", "", s)) for s in (p, g)]
        if "".join(sorted("".join(found[0]))) == "".join(sorted("".join(found[1]))):
            return True
    return _compare(p, g)


def grade(response: str, gold: str) -> bool:
    """Whether the final answer of a model's response equals the gold answer, which may come as a
    whole solution. Any objects give a verdict."""
    response, gold = _text(response), _text(gold)
    answer = extract_answer(response)
    if answer is None:
        answer = response if len(response) <= MAX_CHARS else ""
    long_words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{4,}", gold[:5000])
    if re.search(r"\\boxed|\\fbox|####", gold) or len(long_words) > 10:
        gold = extract_answer(gold) or gold
    return is_equal(answer, gold)


# -------------------------------------------------------------------------------------------------


def main(paths: list[str]) -> int:
    if not paths or paths[0] in ("-h", "--help"):
        print(
            "usage: python checker.py CASES.jsonl ...   rows: response, gold; expect, true or false"
        )
        return 0 if paths else 2
    for path in paths:
        times, right, wrong = [], 0, {True: 0, False: 0}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            if missing := {"response", "gold"} - set.intersection(*map(set, rows)):
                raise ValueError(f"rows without {' and '.join(sorted(missing))}")
        except (OSError, ValueError, TypeError) as e:
            message = (str(e) or "no rows").splitlines()[0]
            print(f"checker.py: {path}: {message}", file=sys.stderr)
            return 2
        for row in rows:
            start = time.perf_counter()
            verdict = grade(row["response"], row["gold"])
            times.append(time.perf_counter() - start)
            right += verdict == row.get("expect")
            if verdict != row.get("expect", verdict):
                wrong[verdict] += 1
                gold, answer = str(row["gold"])[:100], (extract_answer(row["response"]) or "")[:100]
                kind = "false accept" if verdict else "false reject"
                print(f"{kind} {row.get('id', '')}: {gold!r} against {answer!r}")
        times = sorted(1e3 * seconds for seconds in times)
        report = f"{path}: {len(rows)} rows; "
        if judged := right + sum(wrong.values()):
            report += f"{100 * right / judged:.2f}% right, {wrong[True]} false accepts, "
            report += f"{wrong[False]} false rejects; "
        report += f"median {times[len(times) // 2]:.3f} ms, p99 {times[int(len(times) * 0.99)]:.2f}"
        print(f"{report} ms, longest {times[-1]:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
