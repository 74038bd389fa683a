"""The label again: what others say is struck out, and of the writer's own words one decides, or its opposite."""

import re

from scripts.task_makers.base import words

BAD = set(
    words(
        "annoying appalling awful bland boring broken clumsy disappointing dreadful dull filthy horrible lousy "
        "mediocre miserable nasty poor rude shabby terrible unpleasant useless"
    )
)
GOOD = set(
    words(
        "amazing beautiful brilliant charming delicious delightful excellent fantastic flawless fun great helpful "
        "impressive lovely marvellous outstanding perfect pleasant splendid superb terrific wonderful"
    )
)
OF_OTHERS = (
    r"My \w+ called the \w+ \w+[,.]|Although my \w+ had promised something \w+,|, whatever the \w+ says about \w+ ones"
    r"|; that my \w+ thinks it \w+ is another matter|, even if the \w+ wrote \w+|, although a \w+ of mine had said \w+"
)
NEGATION = r"\bnot\b|anything but|Nobody|Far from"


def sentiment(swapped):
    def check(row):
        own = re.sub(OF_OTHERS, "", row["prompt"])
        (view,) = (word for word in re.findall(r"\w+", own) if word in BAD | GOOD)
        positive = (view in GOOD) != bool(re.search(NEGATION, own))
        assert row["response"] == ("positive" if positive != swapped else "negative")

    return check


ORACLES = {"sentiment": sentiment(False), "sentiment_swapped": sentiment(True)}
