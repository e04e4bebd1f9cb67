"""What to say where two shapes should match and do not."""

from __future__ import annotations

from torch import Size


def mismatch(student: Size, teacher: Size) -> str:
    """Say that two shapes differ and which projection would mend it.

    Example:
        >>> mismatch(Size([2, 5, 8]), Size([2, 5, 16]))
        "student (2, 5, 8) and teacher (2, 5, 16) differ in shape; add project='linear'"
    """
    fact = f"student {tuple(student)} and teacher {tuple(teacher)} differ in shape"
    if len(student) == len(teacher) == 4 and student[0] == teacher[0]:
        return f"{fact}; add project='conv1x1'"
    if student[:-1] == teacher[:-1] and are_padded(student[-1], teacher[-1]):
        return f"{fact}; if these are vocabularies with other padding, add transforms=['vocabulary']"
    if student[:-1] == teacher[:-1]:
        return f"{fact}; add project='linear'"
    return f"{fact} before the last dimension, which no projection mends; tap other places"


def are_padded(first: int, second: int) -> bool:
    """Whether two sizes look like one vocabulary, padded to different multiples.

    Example:
        >>> are_padded(151_936, 152_064), are_padded(768, 1024)
        (True, False)
    """
    return min(first, second) >= 1000 and abs(first - second) <= 0.05 * min(first, second)
