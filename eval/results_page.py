"""Pages of results with a section for each benchmark."""

from pathlib import Path


def put_section(page: Path, section: str) -> None:
    """Put a section into a page in the place of the one with the same heading, or at its end.

    Args:
        page: A Markdown file; made where it is missing.
        section: Its first line is its heading, ``## ...``.
    """
    heading = section.splitlines()[0] + "\n"
    text = page.read_text() if page.exists() else f"# {page.stem.capitalize()}\n"
    start = text.find(heading)
    if start < 0:
        page.write_text(f"{text.rstrip()}\n\n{section.rstrip()}\n")
        return
    end = text.find("\n## ", start)
    page.write_text(text[:start] + section.rstrip() + "\n" + (text[end:] if end >= 0 else ""))
