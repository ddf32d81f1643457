"""Column names people use for texts, pairs of texts and labels, in order of preference."""

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("query", "passage"),
    ("question", "context"),
)
TEXTS = (
    "text",
    "sentence",
    "content",
    "message",
    "review",
    "comment",
    "body",
    "document",
    "utterance",
    "query",
    "question",
    "tweet",
    "input",
)
LABELS = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "target",
    "sentiment",
    "topic",
    "score",
    "rating",
    "stars",
    "similarity",
    "quality",
    "gold_label",
)
# Lists and objects that are part of one row.
NESTED = frozenset(
    {
        "messages",
        "conversations",
        "conversation",
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "history",
        "instances",
        "tools",
    }
)
KNOWN = frozenset({*TEXTS, *LABELS, *(name for pair in PAIRS for name in pair)})


def plain(name: str) -> str:
    """Return a column name as it is compared: no blanks around it, lower case."""
    return name.strip().lower()
