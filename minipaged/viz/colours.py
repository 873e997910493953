"""One colour for each sequence, the same in the terminal, in the SVG and on the site.

Paul Tol's "light" scheme: made to fill cells that carry black text, and told apart by colour-blind eyes too. After
eight sequences the colours come again; the letters do not. Source: https://sronpersonalpages.nl/~pault/
"""

from minipaged.viz.snapshot import Snapshot

PALETTE = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#99DDFF", "#BBCC33", "#AAAA00")
SHARED = "#DDDDDD"


def colours(snapshot: Snapshot) -> dict[str, str]:
    """Sequence -> its colour, by its place in the order of arrival, so that it stays the same through a trace."""
    return {seq: PALETTE[place % len(PALETTE)] for place, seq in enumerate(snapshot.labels)}
