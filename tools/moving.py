"""The moving picture of the README: the steps of a request script, one after the other, in one SVG. (make pictures)

    python tools/moving.py tutorials/traces/two_requests.json docs/two_requests_moving.svg

No script is in it: a style sheet shows one picture after the other, so it moves inside an <img>, too. Who asked their
system for less motion sees the last step, standing still.
"""

import re
import sys
from pathlib import Path

from minipaged.viz.replay import steps
from minipaged.viz.script import load_script, run_script
from minipaged.viz.svg import to_svg

SECONDS = 2.0  # a step is shown


def moving(script: Path) -> str:
    """One SVG of all steps of a request script."""
    pictures = [to_svg(snapshot) for snapshot in steps(run_script(load_script(script)))]
    sizes = [re.search(r'viewBox="0 0 (\d+) (\d+)"', picture) for picture in pictures]
    width, height = (max(int(size[n]) for size in sizes if size) for n in (1, 2))
    style = re.search(r"<style>.*?</style>", pictures[0], flags=re.DOTALL)
    inner = [re.sub(r"<style>.*?</style>", "", picture, flags=re.DOTALL) for picture in pictures]
    share = 100 / len(pictures)
    rules = [
        ".mp-step{visibility:hidden;animation:mp-turn "
        f"{SECONDS * len(pictures):g}s steps(1) infinite}}@keyframes mp-turn{{0%{{visibility:visible}}"
        f"{share:.4f}%{{visibility:hidden}}}}",
        *(f".mp-step:nth-of-type({n + 1}){{animation-delay:{n * SECONDS:g}s}}" for n in range(len(pictures))),
        "@media (prefers-reduced-motion:reduce){.mp-step{animation:none}.mp-step:last-of-type{visibility:visible}}",
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mp-picture" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="Two requests grow in one pool of blocks, step by step">'
        f"{style[0] if style else ''}<style>{''.join(rules)}</style>"
        f'<rect class="mp-paper" width="{width}" height="{height}" rx="8"/>'
        + "".join(f'<g class="mp-step">{picture}</g>' for picture in inner)
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(moving(Path(sys.argv[1])), encoding="utf-8")
