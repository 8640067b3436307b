"""The prompt: its static part first, so that a model decodes it once; pure."""

from collections.abc import Sequence

from edged.types import Citation

# Tried with SmolLM2-135M on 100 XQuAD questions and 50 about the manuals; its texts that hold a right answer, of all
# sentences of a budget of 160 tokens:
#   facts as a list under "Facts:"  36 and 22; of those about the manuals that pass the check 18 are right, 0 wrong
#   facts as one paragraph          39 and 21; 12 right, 3 wrong
#   one example before the facts    24 and 22; its words leak into answers, and it costs 56 tokens
#   facts under documents' titles   15 of 50 and 21, where the list has 16 and 22
# Later, in turn, of the sentences near the best one (rag.select): the list under "Facts:" 37 and 27; the list alone, as
# here, 42 and 36, and four tokens fewer; half the answers begin with its mark, which rag.opening removes.
SYSTEM = (
    "Answer the question from the facts given. Use their own words, numbers and units. Answer in one short sentence."
)
SYSTEM_FORMATTED = (
    "Fill in the answer to the question from the facts given. Use their own words, numbers and units. Be brief."
)
NOT_FOUND = "Not in the documents."


def messages(
    question: str, cited: Sequence[Citation], evidence: str = "", *, formatted: bool = False
) -> list[tuple[str, str]]:
    """Chat messages (role, content): the fixed instruction, then facts, then what the event itself says."""
    facts = "\n".join(f"- {fact}" for fact in facts_of(cited))
    reading = f"\nReading: {evidence}" if evidence else ""
    return [
        ("system", SYSTEM_FORMATTED if formatted else SYSTEM),
        ("user", f"{facts}{reading}\nQuestion: {question}"),
    ]


def facts_of(cited: Sequence[Citation]) -> list[str]:
    """The cited sentences as a model reads them."""
    return [citation.text for citation in cited]
