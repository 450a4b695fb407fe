"""MMMU: multiple choice and open answers out of free text.

Source: MMMU-Benchmark/MMMU@bb0b95a9 mmmu/utils/eval_utils.py ``parse_multi_choice_response``,
``parse_open_response``, ``normalize_str``, ``extract_numbers``, ``eval_open``.
Differs from: (1) wrappings are removed first; (2) where no option is found the answer is wrong, not drawn at random;
(3) of a longer open answer only the last `OPEN_CHARACTERS` characters are read, which keeps hostile text cheap;
(4) an empty reference is none.
lmms-eval also reads a letter at the end of a word (``USA`` is A) and loses open answers by reading one as a list of
characters; neither is followed.
"""

import re
from collections.abc import Sequence

from cpt_rft.scoring.choice import letters
from cpt_rft.scoring.extract import without_wrappers

OPEN_CHARACTERS = 2000
_OUTER_MARKS = ",.!?;:'"
_WORDS_OF_A_SENTENCE = 5
_SIGNS_OF_A_RESULT = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """The letter that stands last: of ``(B)`` forms, else of lone letters, else, in a sentence, of option texts.

    >>> [parse_choice(text, ["cat", "dog"]) for text in ("(A) or (B)", "It is B.", "this must be a dog I think", "b")]
    ['B', 'B', 'B', None]
    """
    text = without_wrappers(response)
    for mark in _OUTER_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form in "({})", " {} ":
        if found := {text.rfind(form.format(letter)): letter for letter in reversed(letters(options))}:
            last = max(found)
            if last >= 0:
                return found[last]
    if len(text.split()) <= _WORDS_OF_A_SENTENCE:
        return None
    lowered = text.lower()
    places = {lowered.rfind(option.lower()): at for at, option in reversed(list(enumerate(options)))}
    return letters(options)[places[max(places)]] if places and max(places) >= 0 else None


def normalise(text: str) -> list[str | float]:
    """A number to two decimals, or lower-cased text; a single character keeps a space on one side or the other.

    >>> normalise("1,000.456"), normalise("Paris"), normalise("x")
    ([1000.46], ['paris'], [' x', 'x '])
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [" " + lowered, lowered + " "] if len(lowered) == 1 else [lowered]


def parse_open(response: str) -> set[str | float]:
    """What an open response may mean: the shortest tails behind words such as "is", and every number in them.

    >>> sorted(map(str, parse_open("The area is 24 cm")))
    ['24 cm', '24.0']
    """
    text = without_wrappers(response)[-OPEN_CHARACTERS:].strip().strip(".").lower()
    lines = text.split("\n")
    tails = [_tail(line, last=at == len(lines) - 1) for at, line in enumerate(lines)]
    kept = [tail for tail in tails if tail and tail not in (":", *_OUTER_MARKS)] or [text]
    numbers = [number for tail in kept for pattern in _NUMBERS for number in pattern.findall(tail)]
    return {form for part in kept + numbers for form in normalise(part)}


def _tail(line: str, *, last: bool) -> str:
    """The shortest text behind a sign of a result; an equation counts in the last line only."""
    shortest = ""
    for sign in (*_SIGNS_OF_A_RESULT, "=") if last else _SIGNS_OF_A_RESULT:
        if sign in line:
            tail = line.rpartition(sign)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def open_is_right(response: str, references: Sequence[str]) -> bool:
    """Whether a reference occurs in a text of the response or equals a number of it.

    >>> open_is_right("It is Paris, France", ["Paris"]), open_is_right("", ["yes"])
    (True, False)
    """
    gold = [form for reference in references for form in normalise(reference)]
    texts = [form for form in gold if isinstance(form, str) and form]
    return any(
        any(text in given for text in texts) if isinstance(given, str) else given in gold
        for given in parse_open(response)
    )


def equals(candidate: str, references: Sequence[str]) -> bool:
    """Whether the candidate is a reference and nothing more, in the same normal form: what strict scoring asks."""
    return normalise(candidate)[0] in [normalise(reference)[0] for reference in references]
