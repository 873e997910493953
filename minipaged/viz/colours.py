"""One colour for each sequence, the same in the terminal, in the SVG and on the site.

Paul Tol's "light" scheme: made to fill cells that carry black text, and told apart by colour-blind eyes too. After
eight sequences the colours come again; the letters do not. Source: https://sronpersonalpages.nl/~pault/
"""

from minipaged.viz.snapshot import Owner, Snapshot

PALETTE = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#99DDFF", "#BBCC33", "#AAAA00")
SHARED = "#DDDDDD"


def colours(snapshot: Snapshot) -> dict[str, str]:
    """Sequence -> its colour, by its place in the order of arrival, so that it stays the same through a trace."""
    return {seq: PALETTE[place % len(PALETTE)] for place, seq in enumerate(snapshot.labels)}


def sign(owners: list[Owner] | None, labels: dict[str, str], shades: dict[str, str]) -> tuple[str, str | None]:
    """A block of a large pool, and its colour: its owner's letters, + for several owners, # for none, · if free."""
    if owners is None:
        return "·", None
    if len(owners) != 1:
        return ("+", SHARED) if owners else ("#", None)
    return labels[owners[0].seq], shades[owners[0].seq]
