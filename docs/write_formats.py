"""Write README's table of accepted files from `recofuse_images.formats`: `python -m docs.write_formats`."""

from __future__ import annotations

from pathlib import Path

from recofuse_images.formats import markdown

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- accepted files, by make docs -->\n", "<!-- end of accepted files -->\n"


def main() -> None:
    """Replace what stands between the marks."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + markdown() + END + after, "utf-8")


if __name__ == "__main__":
    main()
