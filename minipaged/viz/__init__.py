"""From a trace, or from live block tables, to a picture: in a terminal, as SVG, and as JSON for the site.

    Trace --replay--> Snapshot --draw----> a terminal        (terminal.py, needs rich)
                               --to_svg--> a notebook        (svg.py)
                               --to_json-> the site          (export.py)

Only terminal.py needs anything outside the standard library and minipaged.memory.
"""
