"""Verdicts on answers, from 0 to 1: what benchmarks count as right. Each is a pure function of texts.

`choice` counts an answer that names no option as wrong. HRM-Text's own evaluation gives it the share that guessing gives.
`boxed` compares LaTeX as text, after the differences that do not count are taken out; it knows no algebra.
"""

import re
import string
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple


class Expected(NamedTuple):
    """What an answer is compared with."""

    answers: tuple[tuple[str, ...], ...]
    """Each is right. An answer of several spans has them apart; any other has one."""
    options: tuple[str, ...] = ()
    """The texts of options A, B, ..., where the answer is to name one of them by its letter."""


def exact_match(answer: str, expected: Expected) -> float:
    """Whether the answer is one of those expected, but for white space around it and within."""
    return float(words(answer) in {words(", ".join(spans)) for spans in expected.answers})


def contains(answer: str, expected: Expected) -> float:
    """Whether an expected answer stands in the answer, with all of its spans; capitals do not count."""
    there = words(answer).casefold()
    return float(any(all(words(span).casefold() in there for span in spans) for spans in expected.answers))


def words(text: str) -> str:
    return " ".join(text.split())


# --- numbers and mathematics --------------------------------------------------------------------------------------------


NUMBER = re.compile(r"(?:(?<![\d.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def number(answer: str, expected: Expected) -> float:
    """Whether the answer's number is the expected one: the number in `\\boxed{}`, else the first after `####`, else the
    last in the text.
    """
    found = final_number(answer)
    return float(found is not None and any(found == final_number(spans[0]) for spans in expected.answers))


def final_number(text: str) -> float | None:
    boxed = last_boxed(text)
    if boxed is None and "####" in text:
        found = NUMBER.findall(text.rpartition("####")[2])[:1]
    else:
        found = NUMBER.findall(text if boxed is None else boxed)
    return float(found[-1].replace(",", "")) if found else None


def boxed(answer: str, expected: Expected) -> float:
    """Whether what stands in the last `\\boxed{}`, or else the whole answer, is that of an expected one."""
    found = plain_latex(answer)
    return float(any(found == plain_latex(spans[0]) for spans in expected.answers))


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` or `\\fbox{...}`; None where there is none, or where it does not end."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    if unbraced := re.match(r"\\f?boxed?\s+([^{\s]\S*?)(?=[$.,]|\s|$)", text[start:]):
        return unbraced[1]
    depth, first = 0, text.find("{", start)
    for i in range(first, len(text)) if first >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[first + 1 : i]
    return None


DROPPED = re.compile(r"\\left|\\right|\\[!,;: ]|\\(?:displaystyle|limits)|\\?\$|\^\\circ|\^{\\circ}|\\?%|\\degree|~")
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*{([^{}]*)}")
FRACTION = re.compile(r"\\[dtc]frac")
SHORT_FRACTION = re.compile(
    r"\\frac\s*([^{\s\\])\s*([^{\s\\])|\\frac\s*([^{\s\\])\s*({[^{}]*})|\\frac\s*({[^{}]*})\s*([^{\s\\])"
)
RATIO = re.compile(r"-?\d+/0*[1-9]\d*")
SHORT_ROOT = re.compile(r"\\sqrt\s*([^{\[\s\\])")


def plain_latex(text: str) -> str:
    """An answer without what does not change its meaning: `\\left`, spaces, `\\dfrac` for `\\frac`, braces that may be left
    out, units in `\\text{}`, a variable before an equals sign. A decimal number becomes a fraction.
    """
    found = last_boxed(text)
    text = (text if found is None else found).strip().rstrip(".")
    text = FRACTION.sub(r"\\frac", DROPPED.sub("", text))
    text = SHORT_FRACTION.sub(
        lambda m: "\\frac" + "".join(part if part[0] == "{" else f"{{{part}}}" for part in m.groups() if part), text
    )
    text = SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    unit = TEXT.search(text)
    if unit and unit.start() and text[: unit.start()].strip():  # a unit behind a number; alone it is the answer
        text = text[: unit.start()] + text[unit.end() :]
    text = re.sub(r"\s+", "", TEXT.sub(r"\1", text))
    text = re.sub(r"^[a-zA-Z]\\?=", "", text)
    text = re.sub(r"^(-?)\\frac{(-?[\d.]+)}{([\d.]+)}$", r"\1\2/\3", text)
    if NUMBER.fullmatch(text):
        return str(Fraction(text.replace(",", "")))
    if RATIO.fullmatch(text):
        return str(Fraction(text))
    return text


# --- options ---------------------------------------------------------------------------------------------------------------


def choice(answer: str, expected: Expected) -> float:
    """Whether the answer names the right option; see `chosen`."""
    return float(chosen(answer, expected.options) == expected.answers[0][0])


def chosen(answer: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that an answer names, None where it names none. The first of these ways that finds a
    letter counts: what is in `\\boxed{}`; a letter at the beginning that nothing but a mark follows; the text of an option;
    the letter after "answer is" or "Answer:"; the last letter in parentheses.
    """
    letters = string.ascii_uppercase[: len(options)]
    text = words(last_boxed(answer) or answer)
    if first := re.match(rf"[(\[*]*([{letters}{letters.lower()}])(?:[)\].:,*]|$)", text):
        return first[1].upper()
    for letter, option in zip(letters, options, strict=True):
        if words(option).casefold() == text.rstrip(".").casefold():
            return letter
    said = re.findall(rf"[Aa]nswer(?: is|:)?:? *[(\[*]*([{letters}])\b", text) or re.findall(
        rf"\(([{letters}])\)", text
    )
    return said[-1] if said else None


# --- reading comprehension ---------------------------------------------------------------------------------------------


ARTICLES = re.compile(r"\b(a|an|the)\b")


def f1(answer: str, expected: Expected) -> float:
    """DROP's F1, of an answer that is a single span, against the expected answer that it comes closest to.

    Words in common, without articles and punctuation; numbers must agree. As `lm_eval`'s task does.
    """
    return max((bag_f1(answer, spans) for spans in expected.answers if spans[0].strip()), default=0.0)


def bag_f1(answer: str, spans: tuple[str, ...]) -> float:
    """An answer has one span, so it can only be aligned with one of the expected spans; the others count nothing."""
    said, best = bag(answer), 0.0
    for span in spans:
        right = bag(span)
        numbers = {word for word in right if as_number(word) is not None}
        if numbers and not numbers & said:
            continue
        common = len(right & said)
        precision, recall = (common / len(some) if some else 1.0 for some in (said, right))
        best = max(best, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return round(best / len(spans), 2)


def bag(text: str) -> set[str]:
    return set(" ".join(filter(None, map(plain_word, re.split(" |-", text)))).split())


def plain_word(word: str) -> str:
    word = word.lower()
    if as_number(word) is None:
        word = "".join(c for c in word if c not in string.punctuation)
    value = as_number(word)
    return words(ARTICLES.sub(" ", word if value is None else str(value)))


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def alternatives(value: Any) -> list[tuple[str, ...]]:
    """The answers that a field of a benchmark's record holds: a text, a list of texts each of which is right, or DROP's own:
    a mapping of `number`, `date` and `spans`, a mapping of lists of these, or of `spans` and `types`.
    """
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return [(str(value),)] if str(value) else []
    if isinstance(value, list):
        return [answer for one in value for answer in alternatives(one)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("number"), list):
        kinds = ("number", "date", "spans")
        return alternatives([dict(zip(kinds, one)) for one in zip(*(value[kind] for kind in kinds))])
    if value.get("number"):
        return [(str(value["number"]),)]
    spans = tuple(value.get("spans") or ())
    if "types" in value:  # the spans of all who were asked, in a list
        return [(span,) for span in dict.fromkeys(spans)] + (
            [tuple(dict.fromkeys(spans))] if len(set(spans)) > 1 else []
        )
    date = value.get("date") or {}
    whole = " ".join(str(date.get(part) or "") for part in ("day", "month", "year")).strip()
    return [spans] if spans else [(whole,)] if whole else []


METRICS: dict[str, Callable[[str, Expected], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "number": number,
    "boxed": boxed,
    "choice": choice,
    "f1": f1,
}
