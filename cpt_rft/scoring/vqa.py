"""VQA accuracy against the answers of several annotators (TextVQA, VizWiz).

Source: GT-Vision-Lab/VQA@a013f004 PythonEvaluationTools/vqaEvaluation/vqaEval.py ``VQAEval.evaluate``,
``processPunctuation`` and ``processDigitArticle``.
Differs from: (1) answers are normalised even where all references are identical, as the ports of lmms-eval and
VLMEvalKit do; (2) with fewer than three references a match is worth 1, because leave-one-out over thirds would score
every single-label row 0; (3) what normalises to nothing (an article, a question mark) matches only itself, and an
empty answer matches nothing.
"""

import re
from collections.abc import Sequence

ENOUGH_ANNOTATORS = 3
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # the official call passes re.UNICODE, which is 32, where `sub` expects a count
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
# Words that the official table knows without their apostrophe, and words of two, either of which may be missing.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock shan't should've shouldn't somebody'll
    somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
    they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've oughtn't
"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
_ODD = {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = _ODD | {
    short: word for word in (_ONE_APOSTROPHE + _TWO_APOSTROPHES).split() for short in _without_one_apostrophe(word)
}


def punctuation_removed(text: str) -> str:
    """The text without punctuation, letter case kept; its outer white space decides and is not stripped.

    A mark goes without a trace if it stands beside a space anywhere in the text, or if a digit,comma,digit does;
    else a space takes its place.
    """
    joins_digits = _DIGIT_COMMA.search(text) is not None
    replaced = text
    for mark in _MARKS:
        if mark in text:
            beside_space = joins_digits or mark + " " in text or " " + mark in text
            replaced = replaced.replace(mark, "" if beside_space else " ")
    return _FULL_STOP.sub("", replaced, count=_FULL_STOPS)


def normalise(text: str) -> str:
    """The normal form of an answer: punctuation and articles gone, number words as digits, apostrophes in place.

    >>> [normalise(text) for text in ("The two cats.", "black-and-white", "1,000 people", "dont")]
    ['2 cats', 'black and white', '1000 people', "don't"]
    """
    words = punctuation_removed(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    numbers = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbers if word not in _ARTICLES)


def accuracy(candidate: str, references: Sequence[str]) -> float:
    """The share of agreement with the annotators: the mean over them of how many *others* agree, three being enough.

    >>> accuracy("cat", ["cat"] * 3 + ["dog"] * 7), accuracy("The cat.", ["cat"]), accuracy("", [""] * 10)
    (0.9, 1.0, 0.0)
    >>> accuracy("A", ["a"]), accuracy("the", ["a"])
    (1.0, 0.0)
    """
    given = _key(candidate)
    if not given:
        return 0.0
    matching, count = sum(_key(reference) == given for reference in references), len(references)
    if count < ENOUGH_ANNOTATORS:
        return float(matching > 0)
    thirds = matching * min(3, matching - 1) + (count - matching) * min(3, matching) if matching else 0
    return thirds / (3 * count)


def _key(text: str) -> str:
    return normalise(text) or text.strip().lower()
