"""The course as exercises: stubs made from the reference, a learner's modules in its place, and the grader.

    chapters.py    which files a chapter's exercise has, and which suite grades it
    generate.py    the stubs, out of the reference's own source
    impl.py        a learner's file stands for our module: `pytest --impl DIR`, `minipaged check 6`
    recorder.py    the calls that led to a failure, and the memory before and after each
    plugin.py      what pytest found, as one JSON file
    grade.py       runs a chapter's suite beside the caller, and reads that file
    hints.toml     three hints for each property
    report.py      the answer in the chapter's words: what holds, the first thing that is wrong, drawn, and a hint
    museum.py      the planted bugs of tests/bugs/, and hunt.py, which hands one to the learner
    properties.py  the learner's own property, graded by what it accepts and what it refuses

None of these imports a module of an exercise at its top: a learner's file must come first.
"""
