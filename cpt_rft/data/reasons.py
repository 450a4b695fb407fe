"""Why the checks drop rows. The words are fixed: they are counted, compared and shown to people.

Tasks add words of their own for what they leave out by choice (``no_picture``, ``not_sampled``, ...).
"""

from enum import StrEnum


class Reason(StrEnum):
    """A fault of a row, of its picture, or of its standing beside another row."""

    ROW_MALFORMED = "row_malformed"
    UNSAFE_NAME = "unsafe_name"
    ANSWER_EMPTY = "answer_empty"
    ANSWER_NOT_ACCEPTED = "answer_not_accepted"
    IMAGE_TAGS = "image_tags"
    RESERVED_TOKEN = "reserved_token"
    TOO_LONG = "too_long"
    PICTURE_MISSING = "picture_missing"
    PICTURE_UNREADABLE = "picture_unreadable"
    PICTURE_TRUNCATED = "picture_truncated"
    PICTURE_TOO_SMALL = "picture_too_small"
    PICTURE_TOO_THIN = "picture_too_thin"
    PICTURE_BOMB = "picture_bomb"
    ID_REPEATED = "id_repeated"
    DUPLICATE = "duplicate"
    CONTRADICTION = "contradiction"
    OVERLAP = "overlap"


_TEXTS = {
    Reason.ROW_MALFORMED: "a cell is missing or of the wrong type",
    Reason.UNSAFE_NAME: "a file name leads out of its folder",
    Reason.ANSWER_EMPTY: "the answer is empty",
    Reason.ANSWER_NOT_ACCEPTED: "the answer is not among the accepted answers",
    Reason.IMAGE_TAGS: "not one <image> tag a picture",
    Reason.RESERVED_TOKEN: "the text holds a token that stands for a picture or a turn",
    Reason.TOO_LONG: "prompt and pictures have more tokens than the limit",
    Reason.PICTURE_MISSING: "the picture is missing",
    Reason.PICTURE_UNREADABLE: "the picture does not decode",
    Reason.PICTURE_TRUNCATED: "the picture is cut short",
    Reason.PICTURE_TOO_SMALL: "a side is under 28 pixels",
    Reason.PICTURE_TOO_THIN: "one side is over 200 times the other",
    Reason.PICTURE_BOMB: "the picture claims more pixels than are safe to decode",
    Reason.ID_REPEATED: "the id was already used",
    Reason.DUPLICATE: "pictures, question and answer stand in an earlier row",
    Reason.CONTRADICTION: "an earlier row answers the same question about the same pictures differently",
    Reason.OVERLAP: "pictures and question stand in a split that must stay unseen",
}


def explain(reason: str) -> str:
    """A reason in words.

    >>> explain("picture_truncated"), explain("not_sampled")
    ('the picture is cut short', 'not sampled')
    """
    return _TEXTS[Reason(reason)] if reason in set(Reason) else reason.replace("_", " ")
