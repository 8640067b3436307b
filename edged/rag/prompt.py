"""The prompt: its static part first, so that a model decodes it once; pure."""

from collections.abc import Sequence

from edged.types import Citation

SYSTEM = (
    "Answer the question from the facts given. Use their own words, numbers and units. Answer in one short sentence."
)
NOT_FOUND = "Not in the documents."


def messages(question: str, cited: Sequence[Citation], evidence: str = "") -> list[tuple[str, str]]:
    """Chat messages (role, content): the fixed instruction, then facts, then what the event itself says."""
    facts = "\n".join(f"- {fact}" for fact in facts_of(cited))
    reading = f"\nReading: {evidence}" if evidence else ""
    return [("system", SYSTEM), ("user", f"Facts:\n{facts}{reading}\nQuestion: {question}")]


def facts_of(cited: Sequence[Citation]) -> list[str]:
    """The cited sentences as a model reads them."""
    return [citation.text for citation in cited]
